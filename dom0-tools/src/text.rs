//! Text of others, for logs and terminals.

/// `text` on one line, without what a terminal would handle_commands.
pub(crate) fn without_controls(text: impl Iterator<Item = char>) -> String {
    let shown = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.map(shown).collect()
}
