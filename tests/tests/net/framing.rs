//! What the board does too, with a peer at the other end of the wire.

use super::*;
use std::io;
use xen_virtio_tests::framing::{check_all, peer};

/// The other end of the first pair's.
struct End(Wire);

impl peer::Cable for End {
    fn receive(&mut self, wait: bool) -> io::Result<Option<Vec<u8>>> {
        if wait {
            return Ok(Some(self.0.receive()));
        }
        Ok(self.0.try_receive())
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame);
        Ok(())
    }
}

#[test]
fn everything_listed_holds_with_a_peer_on_the_wire() {
    let mut bench = Bench::new(2, NO_LIMITS);
    let wire = bench.wires.remove(0);
    let served = thread::spawn(|| peer::serve(&mut End(wire)));
    let lines = check_all(&bench.driver).unwrap();
    assert_eq!(lines.len(), 6, "{lines:#?}");
    served.join().unwrap().unwrap();
    assert!(!bench.driver.needs_reset());
    assert_eq!(bench.end().metrics["dropped_too_large"], 2);
}
