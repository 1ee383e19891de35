//! Tables and numbers for people and scripts. Pure.

use comfy_table::presets::NOTHING;
use serde_json::Value;

/// Columns of text under headings.
pub(super) struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(headings: &[&'static str]) -> Self {
        Self {
            headings: headings.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, with one text for each heading.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.headings.len(), "one for each heading");
        self.rows.push(cells);
    }

    /// The table; for scripts without headings, and with one tab between columns.
    pub(super) fn render(&self, for_scripts: bool) -> String {
        if for_scripts {
            let lines = self.rows.iter().map(|row| row.join("\t") + "\n");
            return lines.collect();
        }
        let mut table = comfy_table::Table::new();
        table.load_style(NOTHING).set_header(&self.headings);
        for row in &self.rows {
            table.add_row(row);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let lines = table.lines().map(|line| line.trim_end().to_owned() + "\n");
        lines.collect()
    }
}

/// The entries of a list; none of what is none.
pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A value in a cell.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        other => other.to_string(),
    }
}

/// Bytes in the largest binary unit that leaves at least one, with up to two decimals.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    let scaled = bytes as f64 / (1_u64 << (unit * 10)) as f64;
    let digits = format!("{scaled:.2}");
    let digits = digits.trim_end_matches('0').trim_end_matches('.');
    format!("{digits} {}", UNITS[unit])
}

/// Nanoseconds in a unit that suits them.
pub(super) fn time(nanoseconds: u64) -> String {
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} µs", nanoseconds as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", nanoseconds as f64 / 1e6),
        _ => format!("{:.1} s", nanoseconds as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_scripts_get_tabs() {
        let mut table = Table::new(&["ID", "NODE"]);
        table.row(vec!["a".into(), "long name".into()]);
        table.row(vec!["bcd".into(), "x".into()]);
        assert_eq!(table.render(false), "ID   NODE\na    long name\nbcd  x\n");
        assert_eq!(table.render(true), "a\tlong name\nbcd\tx\n");
    }

    #[test]
    fn numbers_have_units_that_suit_them() {
        for (given, shown) in [
            (0, "0 B"),
            (512, "512 B"),
            (1 << 20, "1 MiB"),
            (3 << 19, "1.5 MiB"),
        ] {
            assert_eq!(bytes(given), shown);
        }
        for (given, shown) in [
            (5, "5 ns"),
            (1500, "1.5 µs"),
            (2_500_000, "2.5 ms"),
            (3_000_000_000, "3.0 s"),
        ] {
            assert_eq!(time(given), shown);
        }
    }
}
