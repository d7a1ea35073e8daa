//! How it is drawn.

use super::table::{Table, resident_kib};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, Table as Grid, TableState, Wrap};
use xen_virtio_dom0_tools::ctl::inspect::Inspection;
use xen_virtio_dom0_tools::ctl::rates::{BEYOND, DeviceRates, Rates};
use xen_virtio_dom0_tools::ctl::report::Report;

/// A column: its name, its width, and how soon it is left out where there is no room: 0 never.
struct Column(&'static str, u16, u8);

const COLUMNS: [Column; 14] = [
    Column("GUEST", 10, 0),
    Column("DEVICE", 17, 0),
    Column("TYPE", 7, 5),
    Column("STATE", 9, 0),
    Column("REQ/S", 6, 0),
    Column("B/S", 6, 0),
    Column("50%", 6, 0),
    Column("99%", 6, 0),
    Column("TRAPS", 6, 3),
    Column("IRQS", 6, 2),
    Column("BUSY", 5, 4),
    Column("PAGES", 6, 1),
    Column("CPU%", 6, 0),
    Column("MIB", 6, 0),
];

/// The places of the columns that `width` has room for.
fn shown_columns(width: u16) -> Vec<usize> {
    let mut shown: Vec<usize> = (0..COLUMNS.len()).collect();
    for next in 1..=5 {
        let taken: u16 = shown.iter().map(|place| COLUMNS[*place].1 + 1).sum();
        if taken <= width + 1 {
            break;
        }
        shown.retain(|place| COLUMNS[*place].2 != next);
    }
    shown
}

const KEYS: &str = "q leave  s order  / filter  ↑↓ choose  Enter one device  Esc back";

/// Draws `table`, or the device on which its cursor is, as the last `report` knows it.
pub(super) fn draw(frame: &mut Frame<'_>, table: &Table, report: &Report) {
    let [top, middle, bottom] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Line::from(header(table, report)), top);
    let rows = table.rows();
    let chosen = rows.get(table.cursor()).filter(|_| table.is_whole);
    let whole =
        chosen.and_then(|row| Inspection::of(report, &row.domid.to_string(), &row.device).ok());
    match whole {
        Some(inspection) => {
            let text = Paragraph::new(inspection.to_string()).wrap(Wrap { trim: false });
            frame.render_widget(text, middle);
        }
        None => {
            let shown = shown_columns(middle.width);
            let header = Row::new(shown.iter().map(|place| COLUMNS[*place].0))
                .style(Style::new().add_modifier(Modifier::BOLD));
            let widths = shown
                .iter()
                .map(|place| Constraint::Length(COLUMNS[*place].1));
            let cells = |row: &&DeviceRates| {
                let cells = cells(row);
                Row::new(shown.iter().map(|place| Cell::from(cells[*place].clone())))
            };
            let grid = Grid::new(rows.iter().map(cells), widths)
                .header(header)
                .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
            let mut state = TableState::new().with_selected(Some(table.cursor()));
            frame.render_stateful_widget(grid, middle, &mut state);
        }
    }
    let last = match table.is_typing {
        true => format!("filter: {}_", table.filter),
        false => KEYS.to_owned(),
    };
    frame.render_widget(Line::from(last), bottom);
}

fn header(table: &Table, report: &Report) -> String {
    if let Some(problem) = &table.problem {
        return problem.clone();
    }
    let devices: usize = report.guests.iter().map(|guest| guest.devices.len()).sum();
    let mut text = format!(
        "guests: {}, devices: {devices}, ordered by {}",
        report.guests.len(),
        table.order.name()
    );
    if !table.filter.is_empty() && !table.is_typing {
        text += &format!(", filter: {}", table.filter);
    }
    text
}

fn cells(device: &DeviceRates) -> [String; COLUMNS.len()] {
    let rates = device.rates.as_ref();
    let of = |show: &dyn Fn(&Rates) -> String| rates.map_or_else(String::new, show);
    let time = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), time);
    let resident = device.worker.and_then(resident_kib);
    [
        device.guest.clone(),
        device.device.clone(),
        device.kind.clone(),
        device.state.to_owned(),
        of(&|rates| short(rates.requests)),
        of(&|rates| short(rates.bytes)),
        of(&|rates| time(rates.half_us)),
        of(&|rates| time(rates.most_us)),
        of(&|rates| each(rates.traps)),
        of(&|rates| each(rates.interrupts)),
        of(&|rates| short(rates.under_way as f64)),
        of(&|rates| short(rates.mapped as f64)),
        device
            .cpu_percent
            .map_or_else(String::new, |percent| format!("{percent:.1}")),
        resident.map_or_else(String::new, |kib| format!("{:.1}", kib as f64 / 1024.0)),
    ]
}

/// What there is of something for each request.
fn each(number: f64) -> String {
    match number < 100.0 {
        true => format!("{number:.2}"),
        false => short(number),
    }
}

/// A time that was not exceeded.
fn time(us: u64) -> String {
    match us {
        BEYOND => ">8s".to_owned(),
        0..1000 => format!("{us}µs"),
        1000..1_000_000 => format!("{}ms", us / 1000),
        _ => format!("{:.1}s", us as f64 / 1e6),
    }
}

/// With the unit of thousands that leaves three digits before the point at most.
fn short(number: f64) -> String {
    let units = ["", "k", "M", "G"];
    let mut number = number;
    let mut unit = 0;
    while number >= 1000.0 && unit + 1 < units.len() {
        number /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{number:.0}"),
        _ => format!("{number:.1}{}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::device;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::KeyCode;

    fn screen(table: &Table, report: &Report) -> String {
        let mut terminal = Terminal::new(TestBackend::new(115, 5)).unwrap();
        terminal.draw(|frame| draw(frame, table, report)).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = buffer.content().chunks(115).map(|cells| {
            let line: String = cells.iter().map(|cell| cell.symbol()).collect();
            line.trim_end().to_owned() + "\n"
        });
        lines.collect()
    }

    #[test]
    fn the_screen_is_as_it_was_drawn_before() {
        let mut table = Table::default();
        table.update(vec![
            device("ivi", "virtio_disk/51712", 12_345.6),
            device("nav", "virtio/0", 0.0),
        ]);
        let expected = "\
guests: 0, devices: 0, ordered by guest
GUEST      DEVICE            TYPE    STATE     REQ/S  B/S    50%    99%    TRAPS  IRQS   BUSY  PAGES  CPU%   MIB
ivi        virtio_disk/51712 blk     running   12.3k  50.6M  64µs   >8s    0.25   1.00   2     6      12.5
nav        virtio/0          blk     running                                                          12.5
q leave  s order  / filter  ↑↓ choose  Enter one device  Esc back
";
        assert_eq!(screen(&table, &Report::default()), expected);
        for key in [KeyCode::Char('/'), KeyCode::Char('n')] {
            table.take(key);
        }
        let screen = screen(&table, &Report::default());
        assert!(
            screen.contains("filter: n_") && !screen.contains("ivi"),
            "{screen}"
        );
    }

    #[test]
    fn a_service_that_does_not_answer_is_told_of() {
        let mut table = Table::default();
        table.problem = Some("xen-virtiod does not answer".to_owned());
        assert!(screen(&table, &Report::default()).starts_with("xen-virtiod does not answer\n"));
    }

    #[test]
    fn a_narrow_terminal_has_what_matters_most() {
        let names = |width| {
            let shown = shown_columns(width).into_iter();
            shown
                .map(|place| COLUMNS[place].0)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(shown_columns(115).len(), COLUMNS.len());
        assert!(!names(114).contains("PAGES") && names(114).contains("IRQS"));
        assert_eq!(names(80), "GUEST DEVICE STATE REQ/S B/S 50% 99% CPU% MIB");
    }

    #[test]
    fn times_have_their_units() {
        for (us, text) in [
            (1, "1µs"),
            (512, "512µs"),
            (1024, "1ms"),
            (524_288, "524ms"),
            (2_097_152, "2.1s"),
            (8_388_608, "8.4s"),
            (BEYOND, ">8s"),
        ] {
            assert_eq!(time(us), text);
        }
        assert_eq!(
            (each(99.9), each(12_345.0)),
            ("99.90".to_owned(), "12.3k".to_owned())
        );
    }

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (999.4, "999"),
            (1000.0, "1.0k"),
            (5e12, "5000.0G"),
        ] {
            assert_eq!(short(number), text);
        }
    }
}
