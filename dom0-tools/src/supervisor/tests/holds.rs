//! Guests that are kept from running until their devices are served.

use super::*;
use crate::toolstack::Pause;

const RNG: &str = "[[device]]\ntype = \"rng\"\n";

fn attach(dom0: &mut Dom0, index: usize, key: EntryKey) {
    dom0.says(index, &FromWorker::Attached { key, known: None });
}

/// A service that knows guest `ivi` by a file of two devices.
fn with_file() -> Dom0 {
    let dom0 = Dom0::new();
    let guests = dom0.directory.path().join("guests");
    std::fs::create_dir(&guests).unwrap();
    std::fs::write(guests.join("ivi.toml"), RNG.repeat(2)).unwrap();
    dom0
}

const SECOND: EntryKey = EntryKey { devid: 1, ..FIRST };

/// The service is followed by another one of the same store.
fn follow(dom0: Dom0) -> Dom0 {
    let directory = Rc::clone(&dom0.directory);
    let store = dom0.store.clone();
    drop(dom0);
    let connection = store.connect();
    Dom0::with(store, connection, directory, Config::default())
}

#[test]
fn a_guest_of_a_file_runs_when_all_its_devices_are_served() {
    let mut dom0 = with_file();
    dom0.store.introduce(3, "ivi", "a");
    // As xl does until it is built.
    dom0.store.pause(3).unwrap();
    dom0.until("it to be held", |dom0| {
        (dom0.store.paused(3) == 2).then_some(())
    });
    dom0.begins(0, 3, &[(FIRST, false)]);
    dom0.hands(0, SECOND, false);
    dom0.rest();
    assert_eq!(dom0.store.paused(3), 2);
    attach(&mut dom0, 0, SECOND);
    dom0.until("it to be let run", |dom0| {
        (dom0.store.paused(3) == 1).then_some(())
    });
    assert_eq!(dom0.store.read("backend/virtio_held/3"), None);
    // A worker's death is no reason to.
    dom0.kill(0);
    dom0.begins(1, 3, &[(FIRST, true), (SECOND, true)]);
    assert_eq!(dom0.store.paused(3), 1);
}

#[test]
fn the_next_service_lets_go_of_a_guest_that_this_one_holds() {
    let mut dom0 = with_file();
    dom0.store.introduce(3, "ivi", "a");
    dom0.begins(0, 3, &[(FIRST, false)]);
    assert_eq!(dom0.store.paused(3), 1);
    let mut dom0 = follow(dom0);
    // Both at once, for the guest may be served by an earlier worker.
    dom0.begins(0, 3, &[(FIRST, true), (SECOND, false)]);
    dom0.until("it to be let run", |dom0| {
        (dom0.store.paused(3) == 0).then_some(())
    });
}

#[test]
fn a_guest_that_was_served_and_not_let_run_is_let_run() {
    let mut dom0 = with_file();
    dom0.store.introduce(3, "ivi", "a");
    dom0.begins(0, 3, &[(FIRST, false)]);
    // What a service has written last that was killed then.
    dom0.set_state(3, SECOND, 2);
    dom0.store.write("backend/virtio_held/4", "/vm/gone");
    let dom0 = follow(dom0);
    assert_eq!(dom0.store.paused(3), 0);
    assert_eq!(dom0.store.read("backend/virtio_held/4"), None);
}

#[test]
fn who_ends_while_it_is_held_leaves_nothing_to_the_next_of_its_number() {
    let mut dom0 = with_file();
    dom0.store.introduce(3, "ivi", "a");
    dom0.begins(0, 3, &[(FIRST, false)]);
    dom0.store.release(3);
    dom0.until("it to be forgotten", |dom0| {
        let held = dom0.store.read("backend/virtio_held/3");
        held.is_none().then_some(())
    });
    assert_eq!(dom0.store.paused(3), 1);
}
