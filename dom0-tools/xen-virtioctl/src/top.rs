//! `xen-virtioctl top`: a terminal that shows what the devices of all guests do.

mod table;
mod view;

use anyhow::{Context, Result, ensure};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use std::time::{Duration, Instant};
use table::Table;
use xen_virtio_dom0_tools::ctl::control::{self, ControlError};
use xen_virtio_dom0_tools::ctl::rates;
use xen_virtio_dom0_tools::ctl::report::Report;

/// Shows it, anew after each `period`, until q.
///
/// # Errors
///
/// What keeps it from being shown.
pub(crate) fn run(period: Duration) -> Result<String> {
    ensure!(
        rustix::termios::isatty(rustix::stdio::stdout()),
        "top shows a terminal: xen-virtioctl stats, or list --json, without one"
    );
    let first = ask()?;
    let mut terminal = ratatui::try_init().context("preparing the terminal")?;
    let shown = show(&mut terminal, first, period);
    ratatui::restore();
    shown.map(|()| String::new())
}

fn ask() -> Result<Report, ControlError> {
    control::list(control::SOCKET_PATH.as_ref())
}

fn show(terminal: &mut ratatui::DefaultTerminal, first: Report, period: Duration) -> Result<()> {
    let mut table = Table::default();
    // When the last answer came, and when the last question was asked.
    let (mut last, mut answered, mut asked) = (first, Instant::now(), Instant::now());
    table.update(rates::between(&last, &last, period));
    loop {
        terminal.draw(|frame| view::draw(frame, &table, &last))?;
        let rest = period.saturating_sub(asked.elapsed());
        if event::poll(rest)? {
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => {
                    let is_end =
                        key.code == KeyCode::Char('c') && key.modifiers == KeyModifiers::CONTROL;
                    if is_end || table.take(key.code) == table::Next::Leave {
                        return Ok(());
                    }
                }
                _ => {}
            }
            continue;
        }
        asked = Instant::now();
        match ask() {
            Ok(report) => {
                table.update(rates::between(&last, &report, answered.elapsed()));
                answered = Instant::now();
                table.problem = None;
                last = report;
            }
            // It may come back.
            Err(error) => table.problem = Some(error.to_string()),
        }
    }
}
