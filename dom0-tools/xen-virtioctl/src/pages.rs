//! The commands that the pages show are those that there are, and somebody runs each.

use clap::{CommandFactory, Parser};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use xen_virtio_dom0_tools::ctl::arguments::Arguments;

const NAME: &str = "xen-virtioctl ";

/// What else the pages have people call; scripts of ours besides.
const OTHERS: [&str; 24] = [
    "xen-virtioctl",
    "xen-virtiod",
    "apt",
    "bitbake",
    "bitbake-layers",
    "cargo",
    "cp",
    "echo",
    "ethtool",
    "install",
    "ip",
    "journalctl",
    "mkdir",
    "mount",
    "passt",
    "qemu-img",
    "qemu-storage-daemon",
    "qemu-system-aarch64",
    "socat",
    "systemctl",
    "systemd-analyze",
    "truncate",
    "virtiofsd",
    "xl",
];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn pages() -> Vec<PathBuf> {
    let top = top();
    let mut pages = vec![top.join("README.md"), top.join("CONTRIBUTING.md")];
    for directory in ["docs", "docs/devices"] {
        let files = fs::read_dir(top.join(directory)).unwrap();
        let files = files.map(|file| file.unwrap().path());
        pages.extend(files.filter(|path| path.extension().is_some_and(|kind| kind == "md")));
    }
    pages
}

/// What may be a command in `text`, and whether it is a line of code: others are spans of code in a sentence. A line may have two.
fn spans(text: &str) -> Vec<(&str, bool)> {
    let mut found = Vec::new();
    for line in text.lines() {
        if line.starts_with("    ") {
            let parts = line.split(" && ").map(str::trim_start);
            found.extend(parts.map(|part| (part.strip_prefix("$ ").unwrap_or(part), true)));
        } else {
            // Every other part is between backquotes.
            found.extend(line.split('`').skip(1).step_by(2).map(|span| (span, false)));
        }
    }
    found
}

/// Our commands in `text`, without our name.
fn commands(text: &str) -> Vec<String> {
    let starting = spans(text).into_iter();
    let starting = starting.filter_map(|(span, _)| span.strip_prefix(NAME));
    starting
        .map(|command| before_others(command).to_owned())
        .collect()
}

/// All commands in `text`, as somebody would type them. Of other programs, a word alone and one with what it does are spoken of.
fn typed_commands(text: &str) -> BTreeSet<String> {
    let whole = text.replace("\\\n", "");
    let mut found = BTreeSet::new();
    for (span, is_code) in spans(&whole) {
        let command = span.split(" #").next().unwrap_or(span);
        let words: Vec<&str> = command.split_whitespace().collect();
        let Some(program) = words.first() else {
            continue;
        };
        let is_script = program.starts_with("scripts/") && !program.contains(".d");
        let is_known = OTHERS.contains(program);
        let least = if is_code || *program == NAME.trim() {
            2
        } else {
            3
        };
        if is_script || is_known && words.len() >= least && words[1] != "──" {
            found.insert(words.join(" "));
        }
    }
    found
}

/// `command` without a comment, and without what a shell has after it.
fn before_others(command: &str) -> &str {
    let ends = [" #", " | ", " && ", " > ", "; "];
    let end = ends.iter().filter_map(|end| command.find(end)).min();
    command[..end.unwrap_or(command.len())].trim()
}

/// The words of `command` that are not in brackets, as a shell parts them, and those that are.
fn words(command: &str) -> (Vec<String>, Vec<String>) {
    let (mut words, mut optional) = (Vec::new(), Vec::new());
    let (mut word, mut quoted, mut depth) = (None::<String>, false, 0);
    for c in command.chars().chain([' ']) {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '[' if !quoted => depth += 1,
            ']' if !quoted => {}
            ' ' if !quoted => {
                let to = if depth > 0 { &mut optional } else { &mut words };
                to.extend(word.take());
            }
            c => word.get_or_insert_default().push(c),
        }
        if c == ']' && !quoted {
            optional.extend(word.take());
            depth -= 1;
        }
    }
    (words, optional)
}

/// # Errors
///
/// What is wrong with it.
fn check(command: &str) -> Result<(), String> {
    let (words, optional) = words(command);
    let (name, rest) = words.split_first().ok_or("it has no subcommand")?;
    let program = Arguments::command();
    let subcommand = program.find_subcommand(name);
    let subcommand = subcommand.ok_or_else(|| format!("there is no {name}"))?;
    for option in optional.iter().filter_map(|word| word.strip_prefix("--")) {
        let mut options = subcommand.get_arguments();
        if !options.any(|known| known.get_long() == Some(option)) {
            return Err(format!("{name} has no --{option}"));
        }
    }
    // Alone, it is spoken of.
    if rest.is_empty() {
        return Ok(());
    }
    let parsed =
        Arguments::try_parse_from(std::iter::once(&"xen-virtioctl".to_owned()).chain(&words));
    parsed.map(drop).map_err(|error| error.to_string())
}

#[test]
fn the_commands_of_the_pages_are_understood() {
    let mut count = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for command in commands(&text) {
            if let Err(error) = check(&command) {
                panic!("{}: {NAME}{command}: {error}", page.display());
            }
            count += 1;
        }
    }
    assert!(count > 50, "{count}");
}

/// A line of tests/board/commands.
struct Runner<'a> {
    who: &'a str,
    command: &'a str,
    /// What is run, or why nothing is.
    as_run: &'a str,
}

fn runners(text: &str) -> impl Iterator<Item = Runner<'_>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| {
        let (who, rest) = line.split_once(": ").expect(line);
        let (command, as_run) = rest.split_once(" => ").unwrap_or((rest, rest));
        Runner {
            who,
            command,
            as_run,
        }
    })
}

/// Whether `command` has the board run cases that there are.
fn is_case(command: &str) -> bool {
    let cases = top().join("tests/board/cases");
    command
        .strip_prefix("scripts/board test ")
        .is_some_and(|names| {
            let mut names = names.split(' ');
            names.all(|name| cases.join(format!("{name}.sh")).exists())
        })
}

#[test]
fn somebody_runs_each_command_of_the_pages() {
    let top = top();
    let listed = fs::read_to_string(top.join("tests/board/commands")).unwrap();
    let read = |page: &PathBuf| typed_commands(&fs::read_to_string(page).unwrap());
    let shown: BTreeSet<String> = pages().iter().flat_map(read).collect();
    let (mut run, mut wrong) = (BTreeSet::new(), Vec::new());
    for Runner {
        who,
        command,
        as_run,
    } in runners(&listed)
    {
        let is_run = match who {
            "pages" => true,
            "not" => command != as_run,
            file => fs::read_to_string(top.join(file)).is_ok_and(|text| text.contains(as_run)),
        };
        if !shown.contains(command) {
            wrong.push(format!("no page has {command}"));
        }
        if !is_run {
            wrong.push(format!("{who} has no {as_run}"));
        }
        if !run.insert(command.to_owned()) {
            wrong.push(format!("{command} is there twice"));
        }
    }
    let left = shown.difference(&run).filter(|command| !is_case(command));
    wrong.extend(left.map(|command| format!("it lacks {command}")));
    assert!(wrong.is_empty(), "tests/board/commands: {wrong:#?}");
}

#[test]
fn commands_are_told_from_what_is_spoken_of() {
    let text = "With `xl create`, `xl create -p g.cfg` or `scripts/test`; `xen-virtioctl list`.\n\n    $ systemctl stop && apt install x   # why\n    qemu-img check \\\n        -r leaks\n    xl ── xenstore ──> ours\n    path = \"/dev\"\n";
    let expected = [
        "apt install x",
        "qemu-img check -r leaks",
        "scripts/test",
        "systemctl stop",
        "xen-virtioctl list",
        "xl create -p g.cfg",
    ];
    assert_eq!(Vec::from_iter(typed_commands(text)), expected);
}

#[test]
fn a_command_that_is_not_there_is_found() {
    for (text, wrong) in [
        ("`xen-virtioctl lsit`", "there is no lsit"),
        ("`xen-virtioctl list --jsn`", "--jsn"),
        ("`xen-virtioctl list [--jsn]`", "list has no --jsn"),
        (
            "    true && xen-virtioctl link g virtio/0 sideways # why",
            "sideways",
        ),
        ("`xen-virtioctl attach g`, and more", ""),
        (
            "`xen-virtioctl attach GUEST \"blk, path=…\" [--slot virtio/1]`",
            "",
        ),
    ] {
        let commands = commands(text);
        let [command] = &commands[..] else {
            panic!("{text}: {commands:?}")
        };
        match check(command) {
            Ok(()) => assert!(text.contains("path="), "{text}"),
            Err(error) => assert!(error.contains(wrong) && !text.contains("path="), "{error}"),
        }
    }
}
