//! Files of guests, and what is written to xenstore of them.

use super::*;
use crate::toolstack::xenstore::sim::SimStore;

const FILE: &str = "[[device]]\ntype = \"blk\"\npath = \"/dev/vg/ivi\"\n\n[[device]]\ntype = \"rng\"\n\
                    grant-usage = false\nbase = 0x2100000\ninterrupt = 50\nbytes-per-second = 4096\n";

fn files(text: &str) -> (tempfile::TempDir, GuestFiles) {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("ivi.toml"), text).unwrap();
    let files = GuestFiles::new(directory.path());
    (directory, files)
}

#[test]
fn a_guest_has_the_devices_of_the_file_of_its_name() {
    let (directory, files) = files(FILE);
    assert_eq!(files.names(), ["ivi"]);
    let devices = files.devices("ivi").unwrap();
    let places = devices.iter().map(|device| {
        (
            device.device_type,
            device.base,
            device.interrupt,
            device.grant_usage,
        )
    });
    assert_eq!(
        places.collect::<Vec<_>>(),
        [(2, 0x200_0000, 33, true), (4, 0x210_0000, 50, false)]
    );
    let shown: Vec<_> = devices.iter().map(FileDevice::to_string).collect();
    assert_eq!(
        shown[1],
        "rng at 0x2100000, interrupt 50; touches any page of the guest"
    );
    assert!(devices[0].warnings()[0].contains("/dev/vg/ivi"));
    // As xl spells it.
    let (_other, xl) = super::tests::files("[[device]]\ntype = \"rng\"\ngrant_usage = false\n");
    assert!(!xl.devices("ivi").unwrap()[0].grant_usage);
    fs::write(directory.path().join("rtos.tml"), "").unwrap();
    assert_eq!(files.strangers(), ["rtos.tml"]);
    for other in ["rtos", "", "../ivi", ".", "a/b"] {
        assert_eq!(files.devices(other).unwrap(), [], "{other}");
    }
    let none = GuestFiles::new(Path::new("/nonexistent"));
    assert_eq!(none.devices("ivi").unwrap(), []);
    assert!(none.names().is_empty());
}

#[test]
fn what_cannot_be_served_is_named_with_its_file() {
    let disk = "[[device]]\ntype = \"blk\"\npath = \"/a\"\n";
    for (text, expected) in [
        ("[[device]]\n", "missing field `type`"),
        ("[[devices]]\n", "unknown field `devices`"),
        (
            "[[device]]\ntype = \"gpu\"\n",
            "type \"gpu\" is none of blk, console, empty, fs, gpio",
        ),
        (
            "[[device]]\ntype = \"blk\"\n",
            "number 0: missing field `path`",
        ),
        (
            "[[device]]\ntype = \"blk\"\npath = \"a\"\n",
            "no absolute path",
        ),
        (
            "[[device]]\ntype = \"rng\"\npath = \"/a\"\n",
            "unknown field `path`",
        ),
        (
            &format!("{disk}base = 0x2000100\n"),
            "base = 0x2000100 is no multiple",
        ),
        (&format!("{disk}base = 0\n"), "base = 0x0"),
        (
            &format!("{disk}interrupt = 31\n"),
            "interrupt = 31 is no shared one",
        ),
        (
            &format!("{disk}{disk}base = 0x2000000\n"),
            "number 1: base = 0x2000000 is another",
        ),
        (
            &format!("{disk}{disk}interrupt = 33\n"),
            "number 1: interrupt = 33 is another",
        ),
        (
            &disk.replace("/a", &format!("/{}", "a".repeat(4000))),
            "xenstore has room for 3500",
        ),
        (&disk.repeat(12), "12 devices, and a guest can have 11"),
    ] {
        let (_directory, files) = files(text);
        let error = files.devices("ivi").unwrap_err().to_string();
        assert!(
            error.contains("ivi.toml") && error.contains(expected),
            "{text}: {error}"
        );
    }
}

fn guest(domid: u16, vm: &str) -> Identity {
    Identity {
        domid,
        vm: Some(format!("/vm/{vm}")),
    }
}

#[test]
fn what_a_file_says_is_written_once_and_outlives_it() {
    let (directory, files) = files(FILE);
    let (sim, mut store) = SimStore::new();
    let count = |store: &mut XenStore| libxl::entries(store).unwrap().len();
    let [ivi, rtos] = [guest(3, "a"), guest(4, "b")];
    sim.introduce(3, "ivi", "a");
    sim.introduce(4, "rtos", "b");
    files.announce(&mut store, &ivi, false).unwrap();
    files.announce(&mut store, &rtos, false).unwrap();
    assert_eq!(count(&mut store), 2);
    let key = |devid| EntryKey {
        form: EntryForm::File,
        devid,
    };
    let entry = libxl::read_entry(&mut store, 3, key(1)).unwrap();
    assert_eq!(
        (entry.base, entry.irq, entry.grant_usage),
        (0x210_0000, 50, false)
    );
    let libxl::EntryKind::Virtio {
        device_type,
        settings,
    } = entry.kind
    else {
        panic!("{:?}", entry.kind)
    };
    assert_eq!(device_type, 4);
    assert_eq!(
        settings.unwrap()["bytes-per-second"].as_integer(),
        Some(4096)
    );
    // Neither a file that goes nor one that comes later is a running guest's.
    let later = directory.path().join("rtos.toml");
    fs::rename(directory.path().join("ivi.toml"), later).unwrap();
    for guest in [&ivi, &rtos] {
        files.announce(&mut store, guest, false).unwrap();
    }
    let domids = written(&mut store).unwrap();
    assert_eq!(domids, ["3", "4"].map(str::to_owned).into());
    for guest in [&ivi, &rtos] {
        keep_only(&mut store, &guest.domid.to_string(), Some(guest)).unwrap();
    }
    assert_eq!(count(&mut store), 2);
    // The next guest of a domid is another one, and what was the last one's does not go with it.
    let next = guest(3, "c");
    sim.introduce(3, "rtos", "c");
    files.announce(&mut store, &next, false).unwrap();
    forget(&mut store, &ivi).unwrap();
    assert_eq!(count(&mut store), 2);
    keep_only(&mut store, "3", Some(&ivi)).unwrap();
    keep_only(&mut store, "4", None).unwrap();
    assert_eq!(count(&mut store), 0);
}

#[test]
fn a_guest_that_was_served_before_gets_nothing_new() {
    let (_directory, files) = files(FILE);
    let (sim, mut store) = SimStore::new();
    sim.introduce(3, "ivi", "a");
    for served in [true, false] {
        files.announce(&mut store, &guest(3, "a"), served).unwrap();
        assert!(libxl::entries(&mut store).unwrap().is_empty());
    }
}

/// Whoever has the name has the devices.
#[test]
fn a_guest_cannot_take_another_ones_name() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["ivi", "dom0less-3", "dom0less-4"] {
        fs::write(directory.path().join(format!("{name}.toml")), FILE).unwrap();
    }
    let files = GuestFiles::new(directory.path());
    for (name, count) in [("ivi", 0), ("dom0less-4", 0), ("dom0less-3", 2)] {
        let (sim, mut store) = SimStore::new();
        sim.introduce_owner(3, name, "a");
        files.announce(&mut store, &guest(3, "a"), false).unwrap();
        let entries = libxl::entries(&mut store).unwrap();
        assert_eq!(entries.len(), count, "{name}");
    }
}

#[test]
fn what_was_not_written_to_its_end_is_written_again() {
    let (_directory, files) = files(FILE);
    let (sim, mut store) = SimStore::new();
    sim.introduce(3, "ivi", "a");
    // As far as a process had got that was killed.
    sim.write("backend/virtio_file/3/0/type", "virtio,device2");
    files.announce(&mut store, &guest(3, "a"), false).unwrap();
    assert_eq!(libxl::entries(&mut store).unwrap().len(), 2);
}

#[test]
fn the_page_on_configuration_has_a_file_that_the_service_takes() {
    let page = include_str!("../../../../docs/configuration.md");
    let section = page.split("## In a file for the guest").nth(1).unwrap();
    let example = section.split("| key").next().unwrap();
    let example = example.lines().filter_map(|line| line.strip_prefix("    "));
    let devices = parse(
        Path::new("ivi.toml"),
        &example.collect::<Vec<_>>().join("\n"),
    )
    .unwrap();
    let defaults =
        "[[device]]\ntype = \"blk\"\npath = \"/dev/vg/guest\"\n[[device]]\ntype = \"rng\"\n";
    assert_eq!(devices, parse(Path::new("ivi.toml"), defaults).unwrap());
}

#[test]
fn a_device_tree_has_what_a_guest_must_know() {
    let (_directory, files) = files(FILE);
    let tree = device_tree("ivi", &files.devices("ivi").unwrap());
    for expected in [
        "nr_spis = 19 ",
        "xen,grant-dma",
        "virtio@2000000",
        "reg = <0x0 0x2000000 0x0 0x200>;",
        "interrupts = <0 1 1>;",
        "virtio@2100000",
        "interrupts = <0 18 1>;",
    ] {
        assert!(tree.contains(expected), "{expected}: {tree}");
    }
    assert_eq!(tree.matches("iommus").count(), 1, "{tree}");
    let frames = files.devices("ivi").unwrap().split_off(1);
    assert!(!device_tree("ivi", &frames).contains("grant"));
}
