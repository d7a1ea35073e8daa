//! State files of each layout, damaged ones, and what is kept over each.

use super::*;
use crate::toolstack::libxl::EntryForm;

const BASE: u64 = 0x0200_0000;

fn key(devid: u32) -> EntryKey {
    EntryKey {
        form: EntryForm::Disk,
        devid,
    }
}

const DISK: Backing = Backing {
    device: 0x801,
    inode: 12,
};

fn disk(devid: u32, base: u64) -> Name {
    Name {
        key: key(devid),
        base,
        backing: Some(DISK),
        device_type: DeviceType::BLOCK.0,
    }
}

/// A file of each layout.
fn files() -> [(StateArea, usize); 2] {
    [FIRST_FORMAT_BYTES, file_bytes(100_000)]
        .map(|bytes| (StateArea::private(bytes).unwrap(), bytes))
}

#[test]
fn the_next_worker_finds_what_the_last_one_left() {
    for (area, bytes) in files() {
        let first = GuestState::new(area.clone(), bytes).unwrap();
        assert_eq!(first.server().unwrap(), None);
        first.set_server(0);
        for devid in 0..3 {
            let name = disk(devid, BASE + 0x200 * u64::from(devid));
            let records = first.device(&name, false).unwrap();
            for index in 0..2 {
                let value = u64::from(7 + 10 * u32::from(index) + devid);
                records.own(index, 8).unwrap().store(0, value);
            }
        }
        first.forget(key(1)).unwrap();
        let second = GuestState::new(area, bytes).unwrap();
        assert_eq!(second.server().unwrap(), Some(0));
        let devices = second.devices().unwrap();
        let mut keys: Vec<_> = devices.iter().map(|(key, ..)| key.devid).collect();
        keys.sort_unstable();
        assert_eq!(keys, [0, 2]);
        let own = |name: &Name, served, index| {
            let records = second.device(name, served).unwrap();
            records.own(index, 8).unwrap().load(0)
        };
        assert_eq!(own(&disk(2, BASE + 0x400), true, 0), 9);
        assert_eq!(own(&disk(2, BASE + 0x400), true, 1), 19);
        for (devid, base) in [(1, BASE + 0x200), (0, BASE + 0xa00)] {
            for index in 0..2 {
                assert_eq!(own(&disk(devid, base), false, index), 0);
            }
        }
    }
}

#[test]
fn a_device_that_the_guest_has_had_is_refused_for_good_if_nothing_is_recorded_of_it() {
    for (area, bytes) in files() {
        let state = GuestState::new(area, bytes).unwrap();
        for _ in 0..2 {
            let unrecorded = state.device(&disk(0, BASE), true);
            assert!(matches!(unrecorded, Err(GuestStateError::Unrecorded)));
        }
        for is_new in [true, false] {
            let records = state.device(&disk(0, BASE), false).unwrap();
            assert_eq!(records.is_new(), is_new);
        }
    }
}

#[test]
fn there_is_room_for_every_device_of_a_guest_and_no_more() {
    let [first, _] = files();
    let state = GuestState::new(first.0, first.1).unwrap();
    for devid in 0..16 {
        state.device(&disk(devid, BASE), false).unwrap();
    }
    let full = state.device(&disk(16, BASE), false);
    assert!(matches!(full, Err(GuestStateError::Full)));
    state.forget(key(3)).unwrap();
    assert!(state.device(&disk(16, BASE), false).is_ok());
    // What the first layout has no place for.
    let records = state.device(&disk(16, BASE), true).unwrap();
    assert!(records.own(2, 8).is_err() && records.own(1, 16).is_err());
    assert!(records.device_state(&[512; 4]).is_ok());
    assert!(records.device_state(&[512; 5]).is_err());
}

#[test]
fn a_file_has_room_for_what_its_devices_need_and_grows_for_more() {
    let (own, queues) = ([16, 8], [512; 4]);
    let each = device_bytes(&own, &queues);
    let area = StateArea::private(MAX_BYTES).unwrap();
    let state = GuestState::new(area, file_bytes(0)).unwrap();
    let add = |devid| -> Result<(), GuestStateError> {
        let records = state.device(&disk(devid, BASE + 0x200 * u64::from(devid)), false)?;
        for (len, index) in own.iter().zip(0..) {
            records.own(index, *len)?;
        }
        records.device_state(&queues).map(drop)
    };
    for devid in 0..11 {
        state.grow(file_bytes(each * (devid as usize + 1)));
        add(devid).unwrap();
    }
    // Devices that come and go need no more of it, whatever was there in between.
    for devid in 0..11 {
        state.forget(key(devid)).unwrap();
        add(devid + 20).unwrap();
    }
    let refused = GuestState::new(state.area.clone(), file_bytes(each));
    assert!(matches!(refused, Err(GuestStateError::Length { .. })));
}

#[test]
fn what_is_no_state_of_ours_is_told_apart() {
    let error = |word: usize, value| {
        let [_, (area, bytes)] = files();
        drop(GuestState::new(area.clone(), bytes).unwrap());
        area.store(word, value);
        GuestState::new(area, bytes)
            .and_then(|state| state.server().map(drop))
            .unwrap_err()
            .to_string()
    };
    assert!(error(MAGIC_WORD, 5).contains("0x5"));
    assert!(error(FORMAT_WORD, 0).contains("layout 0"));
    assert!(error(FORMAT_WORD, FIRST_FORMAT).contains("should have 921600"));
    assert!(error(FORMAT_WORD, FORMAT + 1).contains("newer"));
    assert!(error(SERVER_WORD, 1 << 20).contains("ioreq server"));
    assert!(error(LENGTH_WORD, 1 << 40).contains("bytes should have"));
    for entries in [1 << 14, u64::MAX] {
        assert!(error(DIRECTORY_WORD, entries).contains("directory"));
    }
}

#[test]
fn another_device_in_a_devices_place_is_refused() {
    for (area, bytes) in files() {
        let state = GuestState::new(area, bytes).unwrap();
        let first = disk(0, BASE);
        state.device(&first, false).unwrap();
        let backing = Some(Backing { inode: 13, ..DISK });
        for backing in [backing, None] {
            let other = Name {
                backing,
                ..first.clone()
            };
            let replaced = state.device(&other, true).err();
            assert!(matches!(replaced, Some(GuestStateError::Replaced)));
        }
        let other = Name {
            device_type: 4,
            ..first.clone()
        };
        let error = state.device(&other, true).err().unwrap().to_string();
        assert!(
            error.contains("type 2 here, and it is of type 4 now"),
            "{error}"
        );
        assert!(state.device(&first, true).is_ok());
        // At another address there is another device.
        let elsewhere = Name {
            backing,
            base: BASE + 0x200,
            ..first
        };
        assert!(state.device(&elsewhere, false).is_ok());
    }
}

/// As versions up to 0.1 wrote them, word by word.
#[test]
fn a_file_of_the_first_layout_is_gone_on_with() {
    let area = StateArea::private(FIRST_FORMAT_BYTES).unwrap();
    for (word, value) in [MAGIC, 1, 6].into_iter().enumerate() {
        area.store(word, value);
    }
    let slot = area.part(4096 + 57344, 57344);
    let name = br#"{"key":{"form":"disk","devid":0},"base":33554432}"#;
    StateCell::new(slot.part(0, 1024)).store(name).unwrap();
    slot.store(1024 / 8 + 1, 5);
    slot.store(4096 / 8 - 1, 1 << 20);
    let registers = StateCell::new(slot.part(4096, 4096));
    registers.store(b"the registers").unwrap();
    slot.store((8192 + 12288) / 8, 3);

    let state = GuestState::new(area, FIRST_FORMAT_BYTES).unwrap();
    assert_eq!(state.server().unwrap(), Some(5));
    let records = state.device(&disk(0, BASE), true).unwrap();
    assert_eq!(records.own(0, 16).unwrap().load(1), 5);
    assert_eq!(records.own(1, 8).unwrap().load(0), 1 << 20);
    let layout = &*state.layout;
    let place = records.place;
    let registers = layout.registers(place, 512).unwrap();
    assert_eq!(registers.load().unwrap(), b"the registers");
    assert_eq!(layout.journal(place, 1, 512).unwrap().load(0), 3);
    // Its disk, which the first version did not record, is now.
    let backing = Some(Backing { inode: 13, ..DISK });
    let other = Name {
        backing,
        ..disk(0, BASE)
    };
    let replaced = state.device(&other, true);
    assert!(matches!(replaced, Err(GuestStateError::Replaced)));
}

#[test]
fn no_file_that_grows_is_as_long_as_one_of_the_first_layout() {
    assert!(is_file_length(FIRST_FORMAT_BYTES as u64));
    for devices in [0, 1, 200_000, 430_000, 440_000, usize::MAX / 4] {
        let bytes = file_bytes(devices);
        assert!(bytes != FIRST_FORMAT_BYTES && is_file_length(bytes as u64));
    }
    for bytes in [0, 5, FIRST_FORMAT_BYTES as u64 + 1, u64::MAX, 32 << 20] {
        assert!(!is_file_length(bytes));
    }
}

#[test]
fn a_file_keeps_its_identity_over_its_paths() {
    let directory = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
    let first = Backing::of(&File::create(&a).unwrap()).unwrap();
    std::fs::rename(&a, &b).unwrap();
    let second = Backing::of(&File::create(&a).unwrap()).unwrap();
    assert_ne!(first, second);
    assert_eq!(Backing::of(&File::open(&b).unwrap()).unwrap(), first);
}

/// The other devices of its guest are served.
#[test]
fn a_name_of_a_form_that_a_later_version_has_is_nobodys() {
    for (area, bytes) in files().into_iter().skip(1) {
        let state = GuestState::new(area, bytes).unwrap();
        for devid in 0..2 {
            let name = disk(devid, BASE + 0x200 * u64::from(devid));
            state.device(&name, false).unwrap();
        }
        let (place, name) = state.layout.names().unwrap().remove(0);
        let text = serde_json::to_string(&name).unwrap();
        let later = text.replace("\"disk\"", "\"later\"");
        state.layout.set_name(place, later.as_bytes()).unwrap();
        let names = state.layout.names().unwrap();
        let left: Vec<_> = names.into_iter().map(|(_, name)| name.key).collect();
        assert_eq!(left.len(), 1);
        assert_ne!(left[0], name.key);
    }
}

#[test]
fn a_name_that_is_none_is_an_error() {
    for (area, bytes) in files() {
        let state = GuestState::new(area, bytes).unwrap();
        state.device(&disk(0, BASE), false).unwrap();
        let (place, _) = state.layout.names().unwrap()[0];
        state.layout.set_name(place, b"{\"key\":7}").unwrap();
        assert!(matches!(
            state.device(&disk(0, BASE), false),
            Err(GuestStateError::Name(_))
        ));
    }
}
