//! Writes the seeds of the targets to the directories below the one that is named: what the tests' own driver
//! does, and what the README shows.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use xen_virtio_fuzz::{driver, make_device, reset_device, state_area};
use xen_virtio_guest_io::{Driver, GrantedMemory, Negotiated, Platform};
use xen_virtio_transport::Width;

fn main() -> std::io::Result<()> {
    let directory = std::env::args().nth(1).expect("usage: seeds DIRECTORY");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let directory = Path::new(&directory).join(target);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(name), bytes)
    };
    write("registers", "a-driver-starts", &recorded())?;
    write("rings", "a-read", &one_request(0, 2))?;
    write("rings", "a-write", &one_request(1, 0))?;
    write("rings", "a-flush", &one_request(4, 0))?;
    write(
        "ioreq",
        "a-read",
        &[1 | 1 << 5, 1, 4, 0, 0, 0, 0x50, 0, 0, 2],
    )?;
    write("ioreq", "a-write", &[1, 1, 4, 0, 0, 0, 0x50, 0, 0, 2])?;
    write(
        "xenstore",
        "a-disk",
        b"\0mmio\n33554432\n33\n1\nw\n/dev/vg/guest\nxvda",
    )?;
    write(
        "xenstore",
        "a-virtio",
        b"\x02mmio\n0x2000000\n33\n1\nvirtio,device2",
    )?;
    write(
        "config",
        "an-xl-file",
        b"name = 'g'\ndisk = [ \"backendtype=standalone, specification=virtio, grant_usage=1, vdev=xvda, \
          access=rw, target=/dev/vg/guest\" ]\nvirtio = [ \"type=virtio,device2, transport=mmio\" ]\n",
    )?;
    write(
        "config",
        "a-configuration",
        b"[[virtio]]\nguest = \"g\"\nindex = 0\npath = \"/dev/vg/guest\"\nread-only = false\n[polling]\nlimit-us = 1000\n",
    )?;
    write("messages", "a-back-end", &conversed())?;
    write("shadow", "a-request", &relayed())?;
    write("state", "a-running-device", &running_device())?;
    Ok(())
}

/// A back-end that answers all that it is asked while a driver comes, goes and comes again, as the target `messages` reads it.
fn conversed() -> Vec<u8> {
    // A disk, whose back-end has said what it has.
    let mut bytes = vec![1, 7];
    let answers = [0; 12];
    bytes.push(7);
    bytes.extend(answers);
    bytes.push(7);
    // The driver stops it, which the back-end does, and starts it.
    bytes.extend([9, 0, 1]);
    bytes.extend(answers);
    bytes.extend([8, 7]);
    bytes.extend(answers);
    // Another back-end comes.
    bytes.push(6);
    bytes.extend(answers);
    bytes.extend(answers);
    bytes
}

/// A request that a back-end answers, as the target `shadow` reads it.
fn relayed() -> Vec<u8> {
    let mut bytes = vec![1];
    // 16 bytes to read and 64 to write, at head 0.
    bytes.extend([0, 2]);
    bytes.extend([0, 0, 0, 0, 16, 0, 0, 0, 1, 1]);
    bytes.extend([1, 1, 0, 0, 64, 0, 0, 0, 2, 0]);
    bytes.extend([0, 0, 1]);
    // It is taken in; the back-end has used head 1, which is the first that a shadow queue gives; it is taken out.
    bytes.extend([2, 3, 0, 0, 1, 8, 0, 1, 5, 6]);
    bytes
}

/// What the driver does from reset to the first kick, as the target `registers` reads it.
fn recorded() -> Vec<u8> {
    assert!(make_device(state_area()));
    let record = Record::default();
    let writes = Arc::clone(&record.writes);
    let recording = Driver::new(record);
    let queue = recording.start(16);
    recording.notify(0);
    drop(queue);
    reset_device();
    let mut bytes = std::mem::take(&mut *writes.lock().expect("one thread"));
    bytes.push(3 << 3);
    bytes
}

#[derive(Default)]
struct Record {
    writes: Arc<Mutex<Vec<u8>>>,
}

impl Platform for Record {
    fn read(&self, offset: u64, width: Width) -> u64 {
        driver().raw_read(offset, width)
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        let mut bytes = self.writes.lock().expect("one thread");
        bytes.extend([2 << 3 | 2, (offset / 4).to_le_bytes()[0]]);
        bytes.extend(value.to_le_bytes());
        driver().raw_write(offset, width, value);
    }

    fn allocate(&self, len: usize, device_writes: bool) -> Box<dyn GrantedMemory> {
        // The target has no such memory; the device finds that the queue is not usable.
        struct Lent(xen_virtio_guest_io::Buffer);
        impl GrantedMemory for Lent {
            fn address(&self) -> u64 {
                self.0.address()
            }
            fn frame_address(&self) -> u64 {
                self.0.frame_address()
            }
            fn slice(&self, _len: usize) -> vm_memory::VolatileSlice<'_> {
                unreachable!("nothing is read from it")
            }
            fn revoke(self: Box<Self>) {
                self.0.revoke();
            }
        }
        Box::new(Lent(driver().buffer(len, device_writes)))
    }
}

/// A request of `kind` with one buffer of data, as the target `rings` reads it.
fn one_request(kind: u8, data_flags: u8) -> Vec<u8> {
    let mut bytes = vec![0, 0, 3];
    for (index, buffer, len, flags, next) in [
        (0, 0, 16u32, 1, 1),
        (
            1,
            if data_flags == 0 { 0 } else { 2 },
            512,
            1 | data_flags,
            2,
        ),
        (2, 1, 1, 2, 0),
    ] {
        // Which buffer, and where in it.
        bytes.extend([index, buffer, 0, 0]);
        bytes.extend(len.to_le_bytes());
        bytes.extend([flags, next]);
    }
    // The header; one entry of the available ring, its index, and the used index to be told of.
    bytes.extend([0, 0, kind, 1, 0, 1, 0, 1, 0]);
    bytes
}

/// A device with a queue that runs and two requests that were taken, as the target `state` reads it.
fn running_device() -> Vec<u8> {
    assert!(make_device(state_area()));
    let driver = driver();
    let negotiated = driver.negotiate(driver.offered_features());
    assert_eq!(negotiated, Negotiated::Accepted);
    reset_device();
    // The first three references of the simulated guest are the queue's of the target.
    let area = |reference: u64| 1u64 << 63 | reference << 12;
    let registers = format!(
        "{{\"status\":15,\"device_features_sel\":0,\"driver_features_sel\":1,\"driver_features\":{},\
         \"driver_features_beyond\":false,\"queue_sel\":0,\"queues\":[{{\"size\":16,\"ready\":true,\
         \"descriptors\":{},\"available\":{},\"used\":{}}},{{\"size\":0,\"ready\":false,\"descriptors\":0,\
         \"available\":0,\"used\":0}}],\"config_generation\":0}}",
        driver.offered_features(),
        area(8),
        area(9),
        area(10)
    );
    let mut bytes = vec![0];
    bytes.extend(u16::try_from(registers.len()).expect("short").to_le_bytes());
    bytes.extend(registers.bytes());
    // Queue 0: three elements published; heads 3 and 6 taken, in this order.
    for (word, value) in [(0u16, 3u16), (1 + 3, 3 << 2 | 1), (1 + 6, 4 << 2 | 1)] {
        bytes.push(0);
        bytes.extend(word.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes
}
