use super::*;
use tempfile::NamedTempFile;

fn check_text(text: &str) -> Findings {
    check(text.as_bytes(), &Config::default())
}

/// An image of `bytes` bytes, none of which is a hole.
fn image(bytes: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![1_u8; bytes]).unwrap();
    file.as_file().sync_all().unwrap();
    file
}

#[test]
fn what_xl_would_misread_is_a_problem() {
    let disk = "specification=virtio, backendtype=standalone, vdev=xvda";
    for (lines, expected) in [
        (vec![], "no virtio device"),
        (vec!["phy:/dev/vg/a,xvda,w".to_owned()], "no virtio device"),
        (
            vec![format!("{disk}, specificaton=virtio, target=/x")],
            "xl knows no \"specificaton\"",
        ),
        (
            vec!["specification=virtio, target=/x, vdev=xvda".to_owned()],
            "target= must come last; xl takes vdev=xvda for a part",
        ),
        (
            vec![format!("{disk}, target=/x, access=r")],
            "disk xvda: target= must come last; xl takes access=r for a part",
        ),
        (
            vec![format!("{disk}, format=qcow2, target=/x")],
            "disk xvda: format=qcow2 is not served: an image must be raw",
        ),
        (
            vec![format!("{disk}, transport=mmio, target=/x")],
            "xl knows no \"transport\"",
        ),
        (
            vec!["specification=virtio, backendtype=phy, vdev=xvda, target=/x".to_owned()],
            "backendtype=phy does not go",
        ),
        (
            vec!["specification=virtio, backendtype=standalone, target=/x".to_owned()],
            "has no vdev=",
        ),
        (
            vec!["specification=virtio, vdev=, target=/x".to_owned()],
            "has no vdev=",
        ),
        (
            vec!["specification=virtio, vdev=nonsense, target=/x".to_owned()],
            "vdev=nonsense is no device",
        ),
        (
            vec!["specification=virtio, vdev=xvda, vdev=xvda, target=/x".to_owned()],
            "vdev is there twice",
        ),
        (vec![format!("{disk}, target=x.img")], "no absolute path"),
        (
            vec![format!("{disk}, script=block-iscsi, target=/x")],
            "script=block-iscsi does not go",
        ),
        (vec![format!("{disk}, colo, target=/x")], "colo does not go"),
        (
            vec![format!("{disk}, backend=storage, target=/x")],
            "backend=storage is not served",
        ),
        (
            vec!["backendtype=standalone, vdev=xvda, target=/x".to_owned()],
            "disk xvda: has no specification=virtio",
        ),
        (
            vec![format!("target=/x, {disk}")],
            "target= must come last; xl takes specification=virtio for",
        ),
        (
            vec![
                format!("{disk}, target=/x"),
                "specification=virtio, vdev=51712, target=/y".to_owned(),
            ],
            "disk 51712: is there twice",
        ),
    ] {
        let text = format!(
            "name = 'a'\ndisk = [ {} ]",
            format!("{lines:?}").trim_matches(['[', ']'])
        );
        let problems = check_text(&text).problems.join("\n");
        assert!(problems.contains(expected), "{text}: {problems}");
    }
}

fn check_one(disk: &str) -> Findings {
    check_text(&format!(
        "# a guest\nname = 'ivi'\nmemory=128\ndisk = [\n '{disk}', # first\n 'phy:/dev/vg/x,xvdb,w' ]\n"
    ))
}

#[test]
fn a_good_disk_is_described() {
    let file = image(4096);
    let path = file.path().to_str().unwrap();
    for (line, how) in [
        (
            format!(
                "backendtype=standalone, specification=virtio, grant_usage=1, vdev=xvda, access=rw, target={path}"
            ),
            "read-write",
        ),
        (
            format!("specification=virtio, grant_usage=1, {path}, raw, xvda:cdrom, w"),
            "read-only",
        ),
        (
            format!("access=r, specification=virtio, grant_usage=1, {path}, raw, xvda, w"),
            "read-write",
        ),
    ] {
        let Findings {
            good,
            warnings,
            problems,
            ..
        } = check_one(&line);
        assert_eq!((warnings, problems), (vec![], vec![]), "{line}");
        assert_eq!(
            good,
            [format!(
                "disk xvda: {path}, 4096 bytes, {how}; touches granted pages only"
            )]
        );
    }
}

#[test]
fn a_target_that_is_not_last_is_a_problem_beside_a_good_disk() {
    let file = image(4096);
    let good = format!(
        "specification=virtio, vdev=xvda, target={}",
        file.path().display()
    );
    for bad in [
        "target=/x, vdev=xvdb, specification=virtio",
        "target=/x, vdev=xvdb",
        "specification=virtio, target=/x, vdev=xvdb",
    ] {
        for (lines, count) in [(format!("'{good}', '{bad}'"), 1), (format!("'{bad}'"), 0)] {
            let Findings { good, problems, .. } = check_text(&format!("disk = [ {lines} ]"));
            assert_eq!((good.len(), problems.len()), (count, 1), "{problems:?}");
            assert!(
                problems[0].contains("target= must come last"),
                "{problems:?}"
            );
        }
    }
}

#[test]
fn a_problem_is_one_line_that_names_the_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    for (target, expected) in [
        (path, "is neither a regular file nor a block device"),
        (
            "/no/such.img",
            "cannot be opened for reading and writing: No such file",
        ),
        ("/dev/null", "is neither a regular file nor a block device"),
    ] {
        let Findings { problems, .. } =
            check_one(&format!("specification=virtio,vdev=xvda,target={target}"));
        let [problem] = &problems[..] else {
            panic!("{problems:?}")
        };
        assert!(
            problem.contains(target) && problem.contains(expected) && !problem.contains('\n'),
            "{problem}"
        );
    }
    assert!(check_one("specification=virtio,vdev=xvda").problems[0].contains("target="));
}

#[test]
fn disks_of_a_guest_share_no_file_that_one_of_them_writes() {
    let file = image(1000);
    let path = file.path().display();
    let problems = |first: &str, second: &str| {
        let disk = |vdev, access| {
            format!("'specification=virtio, vdev={vdev}, access={access}, target={path}'")
        };
        check_text(&format!(
            "disk = [ {}, {} ]",
            disk("xvda", first),
            disk("xvdb", second)
        ))
    };
    let both = problems("r", "r");
    assert_eq!((both.good.len(), both.problems.len()), (2, 0));
    assert!(both.good[0].contains("512 bytes (and 488 more"), "{both:?}");
    for (first, second) in [("rw", "rw"), ("r", "rw"), ("rw", "r")] {
        let Findings { good, problems, .. } = problems(first, second);
        assert_eq!((good.len(), problems.len()), (1, 1));
        assert!(problems[0].contains("is the disk xvda too"), "{problems:?}");
    }
}

/// Whichever list they stand in.
#[test]
fn a_disk_of_our_list_is_no_other_disk_either() {
    let file = image(1024);
    let path = file.path().display();
    let Findings { good, problems, .. } = check_text(&format!(
        "disk = [ 'specification=virtio, vdev=xvda, access=rw, target={path}' ]\nxen_virtio = [ 'blk, path={path}' ]"
    ));
    assert_eq!((good.len(), problems.len()), (1, 1));
    assert!(problems[0].contains("is the disk xvda too"), "{problems:?}");
    // Unless that is meant.
    let shared = format!("[[disk]]\npath = \"{path}\"\nshared = true\n");
    let shared = Config::parse("c.toml".as_ref(), &shared).unwrap();
    let text = format!("xen_virtio = [ 'blk, path={path}', 'blk, path={path}, read_only=true' ]");
    assert_eq!(
        check(text.as_bytes(), &shared).problems,
        <[String; 0]>::default()
    );
}

/// A guest whose devices are in a file of its own.
#[test]
fn a_guest_is_told_what_it_lacks_to_find_the_devices_of_its_file() {
    for (text, lacks) in [
        ("name = 'g'", 2),
        ("name = 'g'\ndevice_tree = '/tmp/g.dtb'", 1),
        ("name = 'g'\ndevice_tree = '/tmp/g.dtb'\nnr_spis = 4", 0),
        (
            "name = 'g'\ndevice_tree = '/tmp/g.dtb'\nvuart = 'sbsa_uart'",
            0,
        ),
    ] {
        assert!(check_text(text).is_without_devices());
        assert_eq!(name(text.as_bytes()).as_deref(), Some("g"));
        let warnings = warnings_of_guest_file(text.as_bytes());
        assert_eq!(warnings.len(), lacks, "{text}: {warnings:?}");
    }
}

#[test]
fn what_a_terminal_would_obey_is_not_printed() {
    let vdev = "disk = [ 'specification=virtio, vdev=\u{1b}[2J, target=/x' ]";
    let bare = "disk = \u{1b}[2J";
    let name = "memory = 1\r\n";
    for text in [vdev, bare, name] {
        let problem = &check_text(text).problems[0];
        assert!(!problem.contains(char::is_control), "{problem:?}");
        assert!(problem.contains("\u{fffd}"), "{problem:?}");
    }
    let root =
        "disk = [ 'specification=virtio, vdev=xvda, target=/x' ]\nextra='root=/dev/xvda\u{1b}'";
    let warning = &check_text(root).warnings[0];
    assert!(!warning.contains(char::is_control), "{warning:?}");
}

#[test]
fn other_disks_are_let_alone() {
    let findings = check_one("format=raw, vdev=xvda, access=rw, target=/x");
    assert!(
        findings.problems[0].starts_with("no virtio device"),
        "{findings:?}"
    );
}

#[test]
fn a_source_of_entropy_needs_none() {
    let findings =
        check_text("name='ivi'\nvirtio = [ 'type=virtio,device4, transport=mmio, grant_usage=1' ]");
    assert_eq!(findings.good, ["virtio 0: rng; touches granted pages only"]);
    assert!(findings.problems.is_empty(), "{:?}", findings.problems);
}

#[test]
fn the_other_form_needs_its_configuration() {
    let problems = check_text(
        "name='ivi'\nvirtio = [ 'type=virtio,device2, transport=mmio', 'type=virtio,device22, transport=mmio' ]",
    )
    .problems;
    assert!(
        problems[0].contains("guest = \"ivi\" and index = 0"),
        "{problems:?}"
    );
    assert!(
        problems[1].contains("and not virtio,device22"),
        "{problems:?}"
    );
}

#[test]
fn a_device_of_the_other_form_is_described() {
    let file = image(512);
    let path = file.path().to_str().unwrap();
    let config = format!("[[virtio]]\nguest = 'ivi'\nindex = 0\npath = {path:?}\nread-only = true");
    let config = Config::parse(CONFIG_PATH.as_ref(), &config).unwrap();
    let text = "name='ivi'\nvirtio = [ 'type=virtio,device2, transport=mmio' ]";
    let memory = "ANY page of the guest: add grant_usage=1 unless that is meant";
    assert_eq!(
        check(text.as_bytes(), &config).good,
        [format!(
            "virtio 0: {path}, 512 bytes, read-only; touches {memory}"
        )]
    );
}

#[test]
fn a_file_that_xl_cannot_read_has_one_problem() {
    for (text, expected) in [
        ("disk = [ 'specification=virtio", "line 1: "),
        (
            "disk = 'specification=virtio'",
            "disk = \"specification=virtio\" is no list",
        ),
        (
            "memory = 128M\ndisk = [ 'specification=virtio' ]",
            "line 1: ",
        ),
    ] {
        let Findings { good, problems, .. } = check_text(text);
        assert!(good.is_empty() && problems.len() == 1, "{problems:?}");
        assert!(problems[0].starts_with(expected), "{problems:?}");
    }
}

#[test]
fn a_list_in_the_list_ends_it() {
    let file = image(512);
    let disk = |vdev| {
        format!(
            "'specification=virtio, vdev={vdev}, target={}'",
            file.path().display()
        )
    };
    let text = format!(
        "disk = [ {}, [ {} ], 'nonsense=1' ]",
        disk("xvda"),
        disk("xvdb")
    );
    let Findings { good, problems, .. } = check_text(&text);
    assert_eq!((good.len(), problems.len()), (1, 1), "{problems:?}");
    assert!(
        problems[0].starts_with("disk = [ … ] has a list as its item 2"),
        "{problems:?}"
    );
}

#[test]
fn a_guest_has_eleven_virtio_devices() {
    let problem = |disks: usize, others: usize| {
        let disks: Vec<_> = (0..disks)
            .map(|index| format!("'specification=virtio, vdev=d{index}p0, target=/x'"))
            .collect();
        let others = vec!["'type=virtio,device22, transport=mmio'"; others];
        let text = format!(
            "disk = [ {} ]\nvirtio = [ {} ]",
            disks.join(", "),
            others.join(", ")
        );
        let mut problems = check_text(&text).problems.into_iter();
        problems.find(|problem| problem.contains("virtio devices"))
    };
    assert_eq!(problem(11, 0), None);
    assert_eq!(problem(4, 7), None);
    let disks = problem(13, 0).unwrap();
    assert!(
        disks.starts_with("13 virtio devices") && disks.ends_with("remove 2"),
        "{disks}"
    );
    let both = problem(9, 3).unwrap();
    assert!(
        both.starts_with("12 virtio devices, 9 of disk = [ … ] and 3 of virtio = [ … ]"),
        "{both}"
    );
}

#[test]
fn what_a_guest_may_not_find_is_a_warning() {
    let file = image(4096);
    let path = file.path().display();
    let disk =
        format!("disk = [ 'specification=virtio, grant_usage=1, vdev=xvda, target={path}' ]\n");
    for (text, expected) in [
        ("extra = 'root=/dev/xvda1 rw'", "write root=/dev/vda1"),
        ("kernel = '/boot/u-boot.bin'", "write grant_usage=0"),
        ("memory = 128M", "line 2: xl leaves out the last byte"),
    ] {
        let Findings {
            good,
            warnings,
            problems,
            ..
        } = check_text(&format!("{disk}{text}"));
        assert_eq!((good.len(), problems.len()), (1, 0), "{problems:?}");
        let [warning] = &warnings[..] else {
            panic!("{text}: {warnings:?}");
        };
        assert!(warning.contains(expected), "{warning}");
    }
    let without_grants = disk.replace("grant_usage=1", "grant_usage=0");
    let findings = check_text(&format!("{without_grants}kernel = '/boot/u-boot.bin'"));
    assert_eq!(findings.warnings, Vec::<String>::new());
    file.as_file().set_len(1 << 20).unwrap();
    let warnings = check_text(&disk).warnings;
    assert!(
        warnings[0].starts_with("disk xvda: ") && warnings[0].contains("fallocate -l 1048576"),
        "{warnings:?}"
    );
}
