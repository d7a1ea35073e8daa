//! Any contents of a vCPU's slot in the ioreq page.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use xen_virtio_fuzz::Numbers;
use xen_virtio_transport::xen::abi::{self, Ioreq};

fuzz_target!(|input: &[u8]| {
    let mut numbers = Numbers(input);
    let slot = Ioreq {
        flags: AtomicU8::new(numbers.byte()),
        kind: AtomicU8::new(numbers.byte()),
        size: AtomicU32::new(numbers.u32()),
        addr: AtomicU64::new(numbers.u64()),
        data: AtomicU64::new(numbers.u64()),
        count: AtomicU32::new(numbers.u32()),
        vp_eport: AtomicU32::new(numbers.u32()),
        pad0: 0,
    };
    let state = || slot.flags.load(Ordering::Relaxed) & abi::IOREQ_STATE_MASK;
    let was_ready = state() == abi::STATE_IOREQ_READY;
    assert_eq!(slot.take(), was_ready);
    if was_ready {
        assert!(slot.is_taken());
        let _ = slot.request();
        slot.answer(numbers.u64());
        assert_eq!(state(), abi::STATE_IORESP_READY);
        assert!(!slot.take());
    }
});
