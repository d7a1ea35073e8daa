//! What outlives a worker, and when one may sleep.

use super::*;

#[test]
fn what_the_driver_has_set_outlives_the_process_that_it_told() {
    // Frames for another address, which nobody may see after the first command.
    let make = |records: &DeviceRecords<'_>| {
        let flood = Flood::new(frame(OTHER, 60, 7)).unwrap();
        let kept = records.own(0, Net::kept_bytes(1)).unwrap();
        network(vec![Box::new(flood)], NO_LIMITS, kept, true).unwrap()
    };
    let make: Arc<MakeDevice> = Arc::new(make);
    let mut died = 0;
    for death in (500..4000).step_by(200) {
        died += drive_over_deaths(&[death, 700], 0, &make, |guest| {
            let driver = driver(guest, 0);
            let [mut receive, mut control] = start(&driver, 0, [RECEIVE, 2]);
            assert_eq!(command(&driver, &mut control, 2, &[0, 0, 0]).0, 0);
            assert_eq!(
                command(&driver, &mut control, 2, &[1, 1, 2, 2, 2, 2, 2, 2]).0,
                0
            );
            let _buffers = post(&driver, &mut receive, RECEIVE, 0, &[256; 8]);
            for _ in 0..4 {
                driver.settle();
                assert_eq!(receive.used_index(), 0);
                assert_eq!(driver.raw_read(0x100, Width::Four), 0x0202_0202);
                assert_eq!(status(&driver), 1);
            }
        });
    }
    assert!(died > 10, "{died}");
}

#[test]
fn a_cable_that_was_unplugged_is_told_of_by_the_next_process_and_carries_nothing() {
    // The first process has it plugged in.
    let is_up = AtomicBool::new(true);
    let make = move |records: &DeviceRecords<'_>| {
        let flood = Flood::new(frame(MAC, 60, 7)).unwrap();
        let kept = records.own(0, Net::kept_bytes(1)).unwrap();
        let is_up = is_up.swap(false, Ordering::SeqCst);
        network(vec![Box::new(flood)], NO_LIMITS, kept, is_up).unwrap()
    };
    let make: Arc<MakeDevice> = Arc::new(make);
    let died = drive_over_deaths(&[4000], 0, &make, |guest| {
        let driver = driver(guest, 0);
        let generation = driver.read(Register::ConfigGeneration);
        let [mut receive] = start(&driver, 0, [RECEIVE]);
        assert_eq!(status(&driver), 1);
        let _buffers = post(&driver, &mut receive, RECEIVE, 0, &[256; 8]);
        let mut next = 8u16;
        while status(&driver) == 1 {
            if receive.used_index() == next {
                receive.offer_together(&[0, 1, 2, 3, 4, 5, 6, 7]);
                driver.notify(RECEIVE);
                next = next.wrapping_add(8);
            }
        }
        assert_ne!(driver.read(Register::ConfigGeneration), generation);
        let before = receive.used_index();
        driver.settle();
        assert_eq!(receive.used_index(), before);
        // The next driver finds it so.
        let [_receive] = start(&driver, 0, [RECEIVE]);
        assert_eq!(status(&driver), 0);
    });
    assert_eq!(died, 1);
}

#[test]
fn a_cable_that_is_plugged_in_has_the_driver_announce_itself() {
    const ACKNOWLEDGE: [u8; 2] = [3, 0];
    let is_up = AtomicBool::new(false);
    let make = move |records: &DeviceRecords<'_>| {
        let flood = Flood::new(frame(MAC, 60, 7)).unwrap();
        let kept = records.own(0, Net::kept_bytes(1)).unwrap();
        let is_up = is_up.swap(true, Ordering::SeqCst);
        network(vec![Box::new(flood)], NO_LIMITS, kept, is_up).unwrap()
    };
    let make: Arc<MakeDevice> = Arc::new(make);
    let died = drive_over_deaths(&[4000], 0, &make, |guest| {
        let driver = driver(guest, 0);
        let [mut control] = start(&driver, 0, [2]);
        assert_eq!(driver.raw_read(0x10a, Width::Two), 1500, "the MTU");
        assert_eq!(status(&driver), 0);
        // Commands bring the death on.
        while status(&driver) == 0 {
            command(&driver, &mut control, 2, &[0, 0, 0]);
        }
        let (up, announce) = (ids::VIRTIO_NET_S_LINK_UP, ids::VIRTIO_NET_S_ANNOUNCE);
        assert_eq!(status(&driver), u64::from(up | announce));
        assert_eq!(command(&driver, &mut control, 2, &ACKNOWLEDGE).0, 0);
        assert_eq!(status(&driver), u64::from(up));
    });
    assert_eq!(died, 1);
}

/// A device of `pairs` pairs, of which the driver has started `queues`, with buffers in the first receiving one if that is
/// among them.
fn still<const N: usize>(
    pairs: u16,
    without: u64,
    queues: [u32; N],
) -> (
    GuestDevices<SimHypervisor>,
    SimGuest,
    Vec<Wire>,
    [RawQueue; N],
) {
    let (hypervisor, guest) = simulate(1024).unwrap();
    let (wires, interfaces): (Vec<_>, Vec<_>) = (0..pairs).map(|_| Wire::new().unwrap()).unzip();
    let interfaces = interfaces.into_iter().map(|one| one as Box<dyn Interface>);
    let kept = StateArea::private(Net::kept_bytes(pairs)).unwrap();
    let net = network(interfaces.collect(), NO_LIMITS, kept, true).unwrap();
    let state = DeviceState::private().unwrap();
    let net = MmioDevice::new(net, &hypervisor, AddressMode::Grants, FIRST_IRQ, state);
    let mut machine = GuestDevices::new(hypervisor);
    machine.add(FIRST_DEVICE, net.unwrap()).unwrap();
    let queues = drive(&mut machine, &guest, move |driver| {
        let mut queues = start(driver, without, queues);
        if let Some(receive) = queues.first_mut() {
            post(driver, receive, RECEIVE, 0, &[256; 8]);
        }
        queues
    });
    // What the driver has set is followed some time later.
    thread::sleep(Duration::from_millis(60));
    come_to_rest(&mut machine);
    (machine, guest, wires, queues)
}

#[test]
fn a_device_with_nothing_to_do_lets_its_worker_sleep() {
    let (mut machine, _guest, wires, [receive, _sending]) = still(1, 0, [RECEIVE, SEND]);
    sleeps(&mut machine);
    // What has woken it is found, whatever the step before has looked at.
    for mark in 0..8u16 {
        wires[0].send(&frame(MAC, 60, 1));
        for _ in 0..mark {
            machine.step();
        }
        come_to_rest(&mut machine);
        assert_eq!(receive.used_index(), mark + 1);
    }
}

#[test]
fn queues_that_the_driver_does_not_use_keep_no_worker_awake() {
    let mq = 1 << ids::VIRTIO_NET_F_MQ;
    sleeps(&mut still(2, 0, [RECEIVE, SEND, 2, 3]).0);
    sleeps(&mut still(2, mq, [RECEIVE, SEND]).0);
    let (mut machine, _guest, wires, _queues) = still(2, 0, [2]);
    wires[0].send(&frame(MAC, 60, 1));
    wires[1].send(&frame(MAC, 60, 1));
    sleeps(&mut machine);
}

#[test]
fn a_driver_that_is_gone_leaves_nothing_to_wait_for() {
    let (mut machine, guest, _wires, _queues) = still(2, 0, [RECEIVE, SEND]);
    drive(&mut machine, &guest, |driver| {
        let [mut control] = start(driver, 0, [4]);
        // More changes than the interface follows at once.
        for pairs in [2, 1, 2, 1] {
            assert_eq!(command(driver, &mut control, 4, &[4, 0, pairs, 0]).0, 0);
        }
        driver.write(Register::Status, 0);
    });
    come_to_rest(&mut machine);
    assert_eq!(machine.try_again_at(), None);
}
