//! A guest that keeps its worker busy keeps it from nothing else.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use xen_virtio_dom0_tools::worker::event_loop::EventLoop;
use xen_virtio_sim::simulate;
use xen_virtio_tests::Staged;
use xen_virtio_transport::{Hypervisor, Trap, TrapRequest};

/// Serves a guest that does nothing but trap, each of which takes long to answer; and how many were answered.
fn storm(cpu_percent: u32) -> (EventLoop<impl Hypervisor>, Rc<Cell<u64>>) {
    let (hypervisor, _) = simulate(1).unwrap();
    let answered = Rc::new(Cell::new(0));
    let count = Rc::clone(&answered);
    let staged = Staged::new(hypervisor, move |hypervisor| {
        let began = Instant::now();
        while began.elapsed() < Duration::from_micros(100) {}
        count.set(count.get() + 1);
        Some(Trap::new(TrapRequest::Unknown, 0, hypervisor))
    });
    let server = EventLoop::new(staged, Duration::ZERO, cpu_percent).unwrap();
    (server, answered)
}

#[test]
fn the_worker_looks_round() {
    let (mut server, answered) = storm(100);
    server.serve(None).unwrap();
    // As many turns as are made between looks at the clock, with 64 traps each.
    assert_eq!(answered.get(), 8 * 64);
}

/// A guest that has had its share of the processor is not served, and others are heard meanwhile.
#[test]
fn the_worker_rests_and_looks_round() {
    let (mut server, answered) = storm(1);
    // The other test's processor time counts too, and may have to be rested for.
    while answered.get() == 0 {
        server.serve(None).unwrap();
    }
    let served = answered.get();
    for _ in 0..3 {
        let began = Instant::now();
        server.serve(None).unwrap();
        let rest = began.elapsed();
        assert!(rest >= Duration::from_millis(50), "{rest:?}");
        assert!(rest < Duration::from_secs(1), "{rest:?}");
        assert_eq!(answered.get(), served);
    }
}
