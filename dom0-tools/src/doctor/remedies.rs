//! Why what the service says of a device matters, and what to do: the table of docs/troubleshooting.md, for what is said with
//! its reason alone.

/// What follows from a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Advice {
    pub(super) why: &'static str,
    pub(super) remedy: &'static str,
}

/// What is in a text, and what follows from it: of two that are, the first.
type Table = [(&'static str, Advice)];

/// Of what a worker says, which its guest may have taken over: nothing that anybody else could be harmed by.
const OF_WORKERS: &Table = &[
    (
        "a transfer of the disk failed for want of something in dom0: No space left on device",
        Advice {
            why: "the guest's writes wait until there is room; nothing is lost meanwhile",
            remedy: "make room in the file system of the image (df), which is found by itself; so that it does not happen again: \
                     fallocate -l SIZE IMAGE",
        },
    ),
    (
        "waits for dom0 since",
        Advice {
            why: "the guest's requests wait; nothing is lost",
            remedy: "it goes on by itself when dom0 has what it lacks: free -m, df, dmesg",
        },
    ),
    (
        "its back-end is away",
        Advice {
            why: "the guest's requests wait for it",
            remedy: "start the back-end at the socket that is named; journalctl -u xen-virtiod has the last lines of a program of exec",
        },
    ),
    (
        "cannot be mapped",
        Advice {
            why: "the device does nothing until the guest's driver resets it",
            remedy: "dmesg in the guest; if its kernel has pages of 64 KiB (getconf PAGESIZE there), it grants wrong frames: grant_usage=0, or \
                     CONFIG_ARM64_4K_PAGES=y in it",
        },
    ),
];

/// Of what the service says.
const OF_SERVICE: &Table = &[
    (
        "has dom0's kernel CONFIG_",
        Advice {
            why: "the device is not served",
            remedy: "modprobe the module of the option that is named, or build dom0's kernel with it",
        },
    ),
    (
        "is in use, and one of its users writes it",
        Advice {
            why: "a file system with two writers that do not know of each other is destroyed",
            remedy: "end the other use (umount, losetup -d, xl destroy), or, if both know of each other, [[disk]] path = \"…\", shared = \
                     true in /etc/xen-virtiod/config.toml",
        },
    ),
    (
        "another program uses the image",
        Advice {
            why: "a file system with two writers that do not know of each other is destroyed",
            remedy: "end that program (lslocks names it), or [[disk]] path = \"…\", shared = true in /etc/xen-virtiod/config.toml",
        },
    ),
    (
        "is the disk",
        Advice {
            why: "a file system with two writers that do not know of each other is destroyed",
            remedy: "give each disk a file of its own, or access=ro to all of them",
        },
    ),
    (
        "is a read-only device",
        Advice {
            why: "the guest would see its writes fail",
            remedy: "blockdev --setrw the device (a loop device: losetup it again without -r), or access=ro in the disk's line",
        },
    ),
    (
        "has a lock on the disk",
        Advice {
            why: "what an earlier worker or another program has under way would overwrite what the guest writes next",
            remedy: "lslocks names who has it; an earlier worker's transfers end with the disk that hangs",
        },
    ),
    (
        "bytes allocated; the guest waits once",
        Advice {
            why: "dom0's file system may be full before the guest's disk is",
            remedy: "fallocate as it is said, or watch the file system's room",
        },
    ),
    (
        "no back-end is at",
        Advice {
            why: "the guest's requests wait for it",
            remedy: "start the back-end at the socket that is named; journalctl -u xen-virtiod has the last lines of a program of exec",
        },
    ),
    (
        "there is no bridge",
        Advice {
            why: "the guest's network interface is not made",
            remedy: "make the bridge, by the command that is said or in the system's network configuration; or name another one: \
                     bridge=",
        },
    ),
    (
        "there is no interface",
        Advice {
            why: "the guest's network device is not served",
            remedy: "make it, by the command that is said; or have one made for a bridge: bridge= in place of tap=",
        },
    ),
    (
        "cannot be opened for reading and writing: No such file or directory",
        Advice {
            why: "the device is not served, and xl gives the guest up",
            remedy: "make the file or block device that is named, or mend its path in the guest's file",
        },
    ),
    (
        "cannot be opened for reading: No such file or directory",
        Advice {
            why: "the device is not served, and xl gives the guest up",
            remedy: "make the file or block device that is named, or mend its path in the guest's file",
        },
    ),
    (
        "cannot be opened for",
        Advice {
            why: "the device is not served, and xl gives the guest up",
            remedy: "see that the file or block device that is named is there, has a driver, and that root may open it",
        },
    ),
    (
        "is neither a regular file nor a block device",
        Advice {
            why: "the device is not served, and xl gives the guest up",
            remedy: "target= names a raw image or a block device",
        },
    ),
    (
        "less than a sector",
        Advice {
            why: "a disk has one sector at least: the device is not served",
            remedy: "make the image as large as the disk is to be: truncate -s 8G IMAGE",
        },
    ),
    (
        "no driver has begun",
        Advice {
            why: "the guest does without the device, or hangs early in its boot",
            remedy: "build the guest's kernel with the options that are said; a guest that cannot grant wants grant_usage=0",
        },
    ),
    (
        "Xen gives no ioreq server",
        Advice {
            why: "the guest's register accesses do not reach dom0",
            remedy: "build Xen with CONFIG_EXPERT=y, CONFIG_UNSUPPORTED=y and CONFIG_IOREQ_SERVER=y",
        },
    ),
    (
        "ANY page of the guest",
        Advice {
            why: "a worker that is taken over could read all of the guest",
            remedy: "grant_usage=1 in the device's line, if the guest's kernel has CONFIG_XEN_VIRTIO",
        },
    ),
    (
        "root=/dev/xvd",
        Advice {
            why: "the guest does not find its root file system, and panics",
            remedy: "write root= as it is said",
        },
    ),
    (
        "has no virtio = [ … ] (4.18)",
        Advice {
            why: "xl does not understand the devices of the guest",
            remedy: "xl of Xen 4.19 or later, or a file for the guest (docs/configuration.md)",
        },
    ),
];

/// Of anything else.
const OTHER: Advice = Advice {
    why: "the guest has not all of the device that it is to have",
    remedy: "as it says; docs/troubleshooting.md has more, and journalctl -u xen-virtiod what came before",
};

impl Advice {
    /// What follows from `text`, of the service or of an xl file.
    pub(super) fn on(text: &str) -> Self {
        found(OF_SERVICE, text).unwrap_or_else(|| Self::on_worker(text))
    }

    /// What follows from `text`, of a worker.
    pub(super) fn on_worker(text: &str) -> Self {
        found(OF_WORKERS, text).unwrap_or(OTHER)
    }
}

fn found(table: &Table, text: &str) -> Option<Advice> {
    let found = table.iter().find(|(part, _)| text.contains(part));
    found.map(|(_, advice)| *advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the crates say is what the table knows.
    #[test]
    fn what_is_said_has_its_advice() {
        let gone = std::path::Path::new("/there/is/none");
        let error = xen_virtio_backend::blk::Disk::open(gone, true).unwrap_err();
        let error = format!("{:#}", anyhow::Error::from(error));
        let advice = Advice::on(&error);
        assert!(advice.remedy.starts_with("make the file"), "{error}");
        let full = "waits for dom0 since 3 s: a transfer of the disk failed for want of something in dom0: No space left on \
                    device (os error 28)";
        assert!(Advice::on_worker(full).remedy.contains("fallocate"));
        let tap = "opening /dev/net/tun (has dom0's kernel CONFIG_TUN?): No such file or directory (os error 2)";
        assert!(Advice::on(tap).remedy.contains("modprobe"));
        // A worker that its guest has taken over does not have others destroyed.
        let lie = "disk /x: is in use, and one of its users writes it";
        assert_eq!(Advice::on_worker(lie), OTHER);
        assert_eq!(Advice::on("something new"), OTHER);
    }
}
