use super::*;
use proptest::prelude::*;

fn parse(line: &str) -> DiskLine {
    DiskLine::parse(line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
}

#[test]
fn names_and_positions_say_the_same() {
    let named = parse("format=raw,vdev=xvda,access=w,specification=virtio,target=/x");
    for line in [
        "/x,raw,xvda,w,specification=virtio",
        "specification=virtio, /x, raw, xvda, w",
        "raw:/x,xvda,w,specification=virtio",
        "format=raw, /x, xvda, specification=virtio, w",
        "vdev=xvda,discard,specification=virtio,/x,raw,w",
        "access=r, specification=virtio, /x, raw, xvda, w",
        "/x,,xvda,,specification=virtio,specification=virtio,=",
        "vdev=,vdev=xvda,,specification=virtio,target=/x,",
    ] {
        assert_eq!(parse(line), named, "{line}");
    }
    assert_eq!(
        parse("vdev=xvda, target=/a, b").target(),
        Some("/a, b"),
        "the target ends with the line"
    );
    let by_path = parse("/dev/disk/by-path/pci-0000:00:1,raw,xvda,w");
    assert_eq!(by_path.target(), Some("/dev/disk/by-path/pci-0000:00:1"));
    let short = parse("/x,,xvda");
    assert_eq!(
        (short.format(), short.vdev(), short.is_writable()),
        ("raw", "xvda", true)
    );
}

#[test]
fn a_word_of_old_stands_for_a_format_a_type_or_a_script() {
    for (line, format, script) in [
        ("phy:/x,xvda:disk,r", "raw", None),
        ("tap:qcow2:/x,xvda,r", "qcow2", None),
        ("drbd:/x,xvda,r", "raw", Some("block-drbd")),
    ] {
        let disk = parse(line);
        assert_eq!(
            (disk.format(), disk.script(), disk.is_writable()),
            (format, script, false),
            "{line}"
        );
        assert_eq!((disk.vdev(), disk.target()), ("xvda", Some("/x")), "{line}");
    }
}

#[test]
fn a_cdrom_is_never_written() {
    for (line, target, format) in [
        ("/x,,xvda,cdrom,access=w,access=rw", Some("/x"), "raw"),
        ("/x,raw,xvda:cdrom,w", Some("/x"), "raw"),
        (",xvda:cdrom,w", Some(""), "empty"),
        ("vdev=xvda,devtype=cdrom", None, "empty"),
    ] {
        let disk = parse(line);
        assert!(disk.is_cdrom() && !disk.is_writable(), "{line}");
        assert_eq!((disk.target(), disk.format()), (target, format), "{line}");
    }
    assert!(parse("cdrom,/x,raw,xvda:disk,w").is_writable());
}

#[test]
fn what_xl_refuses_is_refused() {
    for (line, expected) in [
        ("/x,raw,xvda,w,more", "\"more\" is one value too many"),
        ("access=wr,target=/x", "access=wr is none of r, ro, rw, w"),
        (
            "grant_usage=yes,target=/x",
            "grant_usage=yes is none of 0, 1",
        ),
        (
            "specification=virtoi,target=/x",
            "specification=virtoi is none of virtio, xen",
        ),
        (
            "specificaton=virtio,target=/x",
            "xl knows no \"specificaton\"",
        ),
        ("Vdev=xvda,target=/x", "xl knows no \"Vdev\""),
        (
            "vdev=xvda,vdev=xvdb",
            "vdev is there twice, as \"xvda\" and \"xvdb\"",
        ),
        ("vdev=xvda,vdev=xvda", "vdev is there twice"),
        (
            "format=raw,format=qcow2",
            "format is there twice, as \"raw\" and \"qcow2\"",
        ),
        ("/x,qcow3,xvda", "format=qcow3 is none of empty, "),
        ("phy:/x,raw,xvda,w", "access=xvda is none of"),
        ("vmdk:/x,xvda,w", "xl knows no prefix vmdk:"),
        ("/x,raw,xvda:floppy", "devtype=floppy is none of"),
        ("/x,raw,xvda,=w", "an = has no name before it"),
        ("colo-port=4294967296,", "colo-port=4294967296 is no port"),
        ("target=/x", "has no vdev="),
        ("target=/x, vdev=xvda", "must come last; xl takes vdev=xvda"),
        ("vdev=xvda", "has no target="),
    ] {
        let error = DiskLine::parse(line).unwrap_err();
        assert!(error.contains(expected), "{line}: {error}");
    }
}

proptest! {
    #[test]
    fn any_line_is_judged(text: String, known in "(target=|vdev=|/x|,| |raw|:|=|\n){0,12}") {
        for line in [text, known] {
            let _ = DiskLine::parse(&line);
        }
    }
}
