//! The commands that the pages show are those that there are.

use clap::{CommandFactory, Parser};
use std::fs;
use std::path::{Path, PathBuf};
use xen_virtio_dom0_tools::ctl::arguments::Arguments;

const NAME: &str = "xen-virtioctl ";

fn pages() -> Vec<PathBuf> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut pages = vec![top.join("README.md")];
    for directory in ["docs", "docs/devices"] {
        let files = fs::read_dir(top.join(directory)).unwrap();
        let files = files.map(|file| file.unwrap().path());
        pages.extend(files.filter(|path| path.extension().is_some_and(|kind| kind == "md")));
    }
    pages
}

/// The commands in `text`: in code spans, and in lines of code, of which one may be the second of two.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.lines() {
        let is_code = line.starts_with("    ");
        let spans: Vec<&str> = match is_code {
            true => line.split(" && ").map(str::trim_start).collect(),
            // Every other part is between backquotes.
            false => line.split('`').skip(1).step_by(2).collect(),
        };
        let starting = spans.iter().filter_map(|span| span.strip_prefix(NAME));
        found.extend(starting.map(|command| before_others(command).to_owned()));
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
