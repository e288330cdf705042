//! Tables, readable by people and `awk`.
//!
//! Columns are as wide as their widest cell, separated by three spaces and left-aligned; the last
//! one is not padded. A cell cannot break the layout: control characters are shown as `?`, since
//! names and labels come from outside and could otherwise move the cursor of a terminal.

/// Between two columns: wide enough to be distinct from a space in a cell.
const GAP: &str = "   ";

/// A heading, and rows with as many cells.
#[derive(Debug)]
pub(crate) struct Table<const COLUMNS: usize> {
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// A table with a heading and no rows.
    pub(crate) fn new(heading: [&str; COLUMNS]) -> Self {
        Self { rows: vec![heading.map(str::to_owned)] }
    }

    /// Adds a row. An empty cell is shown as `-`, so that columns can be counted.
    pub(crate) fn row(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(cells.map(|cell| if cell.is_empty() { "-".to_owned() } else { printable(&cell) }));
    }

    /// The table as text, a line feed after each row.
    pub(crate) fn render(&self) -> String {
        let mut widths = [0; COLUMNS];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                line.push_str(&format!("{cell:width$}{GAP}"));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// The text with `?` for every character that a terminal would interpret, that changes the text
/// direction, or that is invisible.
pub(crate) fn printable(text: &str) -> String {
    let is_shown = |character: char| {
        if character.is_ascii() {
            !character.is_ascii_control()
        } else {
            character.escape_debug().eq([character])
        }
    };
    text.chars().map(|character| if is_shown(character) { character } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(["ID", "NAME", "STATE"]);
        table.row(["1".into(), "a longer name".into(), "up".into()]);
        table.row(["22222".into(), "ü".into(), "down".into()]);
        assert_eq!(
            table.render(),
            "ID      NAME            STATE\n\
             1       a longer name   up\n\
             22222   ü               down\n"
        );
    }

    #[test]
    fn a_table_without_rows_is_its_heading() {
        assert_eq!(Table::new(["A", "B"]).render(), "A   B\n");
    }

    #[test]
    fn hostile_cells_cannot_break_a_row_or_steer_the_terminal() {
        let mut table = Table::new(["A", "B"]);
        table.row(["x\ny\t\0".into(), "\u{1b}[2J\u{9b}".into()]);
        table.row([String::new(), "\u{202e}\u{2028}".into()]);
        assert_eq!(table.render(), "A       B\nx?y??   ?[2J?\n-       ??\n");
    }
}
