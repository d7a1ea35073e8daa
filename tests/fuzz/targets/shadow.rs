//! A back-end that writes anything over its shadow rings, and a guest that offers anything, while requests are relayed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::cell::OnceCell;
use vm_memory::Bytes;
use xen_virtio_backend::shadow::{Loss, Relay, RelayError, Rules, ShadowRecord};
use xen_virtio_backend::{DeviceError, QueueSet, Unfinished};
use xen_virtio_fuzz::{Numbers, QueueGuest};
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};
use xen_virtio_sim::{Fault, SimAccess};

const RULES: Rules = Rules {
    loss: &[Loss::Repeat],
    overstate: false,
    alike: true,
};

const SIZE: u16 = 8;
const BASE: u64 = 1 << 32;
const POOL: usize = 16 << 12;
const EVENT_IDX: u64 = 1 << 29;

/// Read-only for the device, writable, and of several pages.
const BUFFERS: [(usize, bool); 3] = [(4096, false), (4096, true), (8 * 4096, true)];

thread_local! {
    static GUEST: OnceCell<QueueGuest> = const { OnceCell::new() };
}

/// What relays.
struct Relaying<'a> {
    guest: &'a QueueGuest,
    access: SimAccess,
    queues: QueueSet,
    relay: Relay,
    /// The back-end was given up.
    is_lost: bool,
}

impl Relaying<'_> {
    fn start(&mut self, event_idx: bool) {
        let features = if event_idx { EVENT_IDX } else { 0 };
        let start = self.guest.start(SIZE, features);
        let unfinished = Unfinished::Repeat;
        let started = self
            .queues
            .start(QueueGuest::index(), start, unfinished, &mut self.access);
        started.expect("a good queue");
        self.relay.start(QueueGuest::index(), event_idx);
    }

    fn stop(&mut self) {
        self.queues.stop(QueueGuest::index());
        self.relay.stop(QueueGuest::index());
        self.relay.settle(QueueGuest::index());
    }

    fn take_in(&mut self) -> Result<(), DeviceError> {
        let (queues, access) = (&mut self.queues, &mut self.access);
        self.relay.take_in(queues, access, &mut |_| {}).map(drop)
    }

    /// As a device does with what its back-end got wrong.
    fn take_out(&mut self) -> Result<(), DeviceError> {
        match self
            .relay
            .take_out(&mut self.queues, &mut self.access, true)
        {
            Ok(_) => {}
            Err(RelayError::Device(error)) => return Err(error),
            Err(RelayError::Backend { .. }) => self.is_lost = true,
        }
        if self.is_lost {
            self.is_lost = !self.relay.resume(true).expect("memory");
        }
        Ok(())
    }

    /// The guest offers a chain.
    fn offer(&mut self, numbers: &mut Numbers<'_>) {
        let queue = &self.guest.queue;
        for _ in 0..numbers.byte() % 4 {
            let index = u16::from(numbers.byte()) % SIZE;
            let buffer = &self.guest.buffers[usize::from(numbers.byte() % 3)];
            let address = buffer.address() + u64::from(numbers.u16() & 0xfff);
            let (len, flags) = (numbers.u32() & 0xffff, numbers.byte() & 3);
            let next = u16::from(numbers.byte());
            queue.set_descriptor(index, address, len, flags.into(), next);
        }
        let slot = usize::from(u16::from(numbers.byte()) % SIZE);
        let head = u16::from(numbers.byte()).to_le_bytes();
        queue.available.write(4 + 2 * slot, &head);
        queue.set_available_index(u16::from(numbers.byte()) % (2 * SIZE));
    }

    /// The back-end writes over its rings.
    fn write(&self, numbers: &mut Numbers<'_>) {
        let region = self.relay.region();
        let used = region.rings()[0].used;
        let memory = region.memory();
        match numbers.byte() & 3 {
            // An element, and the index.
            0..=2 => {
                let slot = usize::from(u16::from(numbers.byte()) % SIZE);
                let (id, len) = (numbers.byte(), numbers.u16());
                let element = u64::from(len) << 32 | u64::from(id);
                let index = u16::from(numbers.byte());
                memory
                    .write_obj(element, used + 4 + 8 * slot)
                    .expect("in the region");
                memory.write_obj(index, used + 2).expect("in the region");
            }
            _ => {
                let place = usize::from(numbers.u16()) % (used + 4096 - 8);
                memory
                    .write_obj(numbers.u64(), place)
                    .expect("in the region");
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    GUEST.with(|cell| {
        let guest = cell.get_or_init(|| QueueGuest::new(SIZE, &BUFFERS));
        let mut numbers = Numbers(input);
        let records = vec![ShadowRecord::private(SIZE).expect("memory")];
        let mut relaying = Relaying {
            access: guest.guest.memory().access(AddressMode::Grants),
            guest,
            queues: QueueSet::new(1),
            relay: Relay::new(&[SIZE], POOL, BASE, RULES, records).expect("memory"),
            is_lost: false,
        };
        let event_idx = numbers.byte() & 1 != 0;
        relaying.start(event_idx);
        while !numbers.is_empty() {
            let done = match numbers.byte() & 7 {
                0 | 1 => {
                    relaying.offer(&mut numbers);
                    Ok(())
                }
                2 => relaying.take_in(),
                3 | 4 => {
                    relaying.write(&mut numbers);
                    Ok(())
                }
                5 => relaying.take_out(),
                6 => {
                    let slept = relaying.relay.prepare_sleep(&mut relaying.queues);
                    slept.map(drop)
                }
                _ => {
                    let faults = guest.guest.memory().faults();
                    faults.order(Fault::CopyCall, u32::from(numbers.byte() & 1));
                    faults.order(Fault::RevokedCopy, u32::from(numbers.byte() & 1));
                    Ok(())
                }
            };
            // As a driver whose device needs a reset.
            if done.is_err() {
                relaying.stop();
                relaying.start(event_idx);
            }
        }
        relaying.stop();
        let mapped = relaying.access.counters().grants_mapped;
        assert_eq!(mapped, 0);
    });
});
