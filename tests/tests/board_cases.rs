//! What tests/board/dom0.sh makes of cases that fail, on this machine's bash: no board is needed for that.

use std::path::Path;
use std::process::Command;

/// Each is a case, with another command behind it.
const FAILING: [&str; 5] = [
    "fail at once",
    "note \"in an argument: $(fail there)\"",
    "[ \"$(fail in a condition)\" = '' ] || true",
    "fail beside the case & sleep 1",
    "false",
];

#[test]
fn a_case_fails_wherever_it_says_so_and_passes_otherwise() {
    let dir = std::env::temp_dir().join(format!("board-cases-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("cases")).expect("a folder for the cases");
    let lines = FAILING.iter().copied().chain(["note all is well"]);
    for (number, line) in lines.enumerate() {
        let file = dir.join(format!("cases/case{number}.sh"));
        std::fs::write(file, format!("{line}\nnote went on\n")).expect("the case is written");
    }
    let dom0 = Path::new(env!("CARGO_MANIFEST_DIR")).join("board/dom0.sh");
    // What belongs to the board is not there, or not to be done here.
    let script = format!(
        "XEN_VERSION=4.20; . {}; DAEMON_LOG=/dev/null; CONSOLES={}
        xl() {{ :; }}; xen-virtioctl() {{ :; }}; dmesg() {{ :; }}; clean_up() {{ :; }}
        run_cases case{{0..5}}",
        dom0.display(),
        dir.display()
    );
    let mut bash = Command::new("bash");
    let ran = bash.args(["-c", &script]).current_dir(&dir).output();
    std::fs::remove_dir_all(&dir).expect("the folder goes");
    let ran = ran.expect("bash runs");
    let printed = String::from_utf8_lossy(&ran.stdout);
    assert!(!ran.status.success(), "{printed}");
    for (number, line) in FAILING.iter().enumerate() {
        let failed = format!("CASE-END case{number} FAILED");
        assert!(printed.contains(&failed), "{line}: {printed}");
    }
    assert!(printed.contains("CASE-END case5 ok"), "{printed}");
    assert_eq!(printed.matches("went on").count(), 1, "{printed}");
}
