//! A guest's connections to dom0's sockets are made for its worker, and those to the guest handed on.

use super::super::dialling;
use super::*;
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// A guest with a socket device whose sockets are in `folder`, and where dom0's programs connect to it.
fn with_sockets(folder: &Path) -> (Dom0, PathBuf) {
    let path = folder.join("v");
    let dom0 = serving(&format!(
        "[[device]]\ntype = \"vsock\"\ncid = 42\nlisten = {path:?}\n"
    ));
    (dom0, path)
}

fn dial(number: u64, port: u32) -> FromWorker {
    FromWorker::Dials {
        key: FIRST,
        number,
        port,
    }
}

/// What the worker is told of the dial of this number: a connection, or none.
fn answer(dom0: &mut Dom0, index: usize, number: u64) -> Option<UnixStream> {
    let (message, descriptors) = dom0.next_with_descriptors(index);
    let expected = json!({"dialled": {"number": number}});
    assert!(
        matches!(&message, ToWorker::Change { key: FIRST, change } if *change == expected),
        "{message:?}"
    );
    descriptors.into_iter().next().map(UnixStream::from)
}

#[test]
fn a_guest_is_connected_to_the_socket_of_its_port_and_to_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let (mut dom0, path) = with_sockets(folder.path());
    let listener = UnixListener::bind(folder.path().join("v_52")).unwrap();
    let mut connect = |index, number| {
        dom0.says(index, &dial(number, 52));
        let mut theirs = answer(&mut dom0, index, number).expect("a connection");
        let (mut ours, _) = listener.accept().unwrap();
        ours.write_all(b"hello").unwrap();
        drop(ours);
        let mut read = String::new();
        theirs.read_to_string(&mut read).unwrap();
        assert_eq!(read, "hello", "nobody else has it");
    };
    connect(0, 7);
    connect(0, 8);
    // Nobody is there; a file; a link to a socket that is.
    std::fs::write(folder.path().join("v_54"), "").unwrap();
    std::os::unix::fs::symlink(folder.path().join("v_52"), folder.path().join("v_55")).unwrap();
    for port in [53, 54, 55, u32::MAX] {
        dom0.says(0, &dial(9, port));
        assert!(answer(&mut dom0, 0, 9).is_none(), "{port}");
    }
    // Who connects to the guest is handed on.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 80\n").unwrap();
    let mut theirs = handed(&mut dom0, 0, &json!("visitor"));
    let mut read = [0; 11];
    theirs.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"CONNECT 80\n");
    // The next worker's dials are as good.
    dom0.kill(0);
    dom0.begins(1, 3, &[(FIRST, true)]);
    dom0.says(1, &dial(0, 52));
    assert!(answer(&mut dom0, 1, 0).is_some());
    dom0.store.release(3);
    dom0.until("the socket to go", |_| (!path.exists()).then_some(()));
}

#[test]
fn a_guest_that_connects_without_end_waits_and_a_worker_that_keeps_to_no_number_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let (mut dom0, _) = with_sockets(folder.path());
    // Four periods' worth of what may be had in one.
    let began = Instant::now();
    for number in 0..256 {
        dom0.says(0, &dial(number, 53));
        if number % 16 == 15 {
            for number in number - 15..=number {
                assert!(answer(&mut dom0, 0, number).is_none());
            }
        }
    }
    assert!(began.elapsed() >= Duration::from_millis(300));
    for number in 0..=u64::try_from(dialling::MOST).unwrap() {
        let workers = dom0.workers.launched.borrow();
        workers[0].channel.send(&dial(number, 53)).unwrap();
    }
    dom0.begins(1, 3, &[(FIRST, true)]);
}
