//! Who connects to a device is handed on to its worker.

use super::*;
use crate::ctl::control;
use crate::devices::Order;
use serde_json::json;
use std::io::{Read, Write};
use std::os::fd::AsFd;

/// What comes of attaching the other end of the socket.
fn attach(dom0: &mut Dom0, device: Option<&'static str>) -> (Result<String, String>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let attached = ask(dom0, move |path| {
        let order = Order::Attach {
            port: "0".to_owned(),
            from: Some(5),
        };
        control::attach(path, "ivi", device, order, theirs.as_fd())
    });
    (attached, ours)
}

#[test]
fn who_asks_to_be_attached_is_handed_to_the_consoles_worker() {
    let mut dom0 = serving("[[device]]\ntype = \"console\"\n[[device]]\ntype = \"rng\"\n");
    let change = json!({"messages": {"port": 0, "from": 5}});
    for device in [None, Some("virtio_file/0")] {
        let (attached, mut ours) = attach(&mut dom0, device);
        let done = "guest ivi (3), virtio_file/0: attached to port 0";
        assert_eq!(attached.unwrap(), done);
        let mut theirs = handed(&mut dom0, 0, &change);
        theirs.write_all(b"hello").unwrap();
        drop(theirs);
        let mut read = String::new();
        ours.read_to_string(&mut read).unwrap();
        assert_eq!(read, "hello", "nobody else has it");
    }
    let refused = ask(&mut dom0, |path| {
        let order = Order::Attach {
            port: "0".to_owned(),
            from: None,
        };
        let device = Some("virtio_file/0".to_owned());
        control::change(path, "ivi".to_owned(), device, order)
    });
    assert!(refused.unwrap_err().contains("no connection came"));
    let (refused, mut ours) = attach(&mut dom0, Some("virtio_file/1"));
    assert!(
        refused
            .unwrap_err()
            .contains("a device of type rng has no ports")
    );
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    // The next worker has it behind the device.
    dom0.kill(0);
    let rng = EntryKey { devid: 1, ..FIRST };
    dom0.begins(1, 3, &[(FIRST, true), (rng, true)]);
    assert!(attach(&mut dom0, None).0.is_ok());
}

#[test]
fn of_several_consoles_one_is_to_be_named() {
    let mut dom0 = serving(&"[[device]]\ntype = \"console\"\n".repeat(2));
    let (refused, _) = attach(&mut dom0, None);
    let error = refused.unwrap_err();
    let expected = "virtio_file/0 and virtio_file/1 have ports: name one";
    assert!(error.contains(expected), "{error}");
    let mut dom0 = serving("[[device]]\ntype = \"rng\"\n");
    let (refused, _) = attach(&mut dom0, None);
    assert!(refused.unwrap_err().contains("it has no device with ports"));
}

#[test]
fn who_connects_to_a_consoles_socket_is_handed_to_its_worker() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console.sock");
    let mut dom0 = serving(&format!(
        "[[device]]\ntype = \"console\"\nlisten = {path:?}\n"
    ));
    let change = json!({"stream": {"port": 0}});
    let connect = |dom0: &mut Dom0, index| {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"a").unwrap();
        let mut theirs = handed(dom0, index, &change);
        let mut read = [0; 2];
        assert_eq!(theirs.read(&mut read).unwrap(), 1);
        // Its worker does not wait for it.
        let error = theirs.read(&mut read).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    };
    connect(&mut dom0, 0);
    // However many come at once.
    let clients: Vec<_> = (0..40)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    for _ in &clients {
        handed(&mut dom0, 0, &change);
    }
    // The socket stays while workers come and go; nobody is kept waiting who cannot be served.
    dom0.kill(0);
    dom0.begins(1, 3, &[(FIRST, true)]);
    connect(&mut dom0, 1);
    dom0.store.release(3);
    dom0.until("the socket to go", |_| (!path.exists()).then_some(()));
}
