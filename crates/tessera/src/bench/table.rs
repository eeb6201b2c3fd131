//! Figures for people: right-aligned columns under their names.

/// Rows of text under headings.
#[derive(Debug, Clone)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<const N: usize>(headings: [&str; N]) -> Self {
        Self { rows: vec![headings.map(str::to_owned).to_vec()] }
    }

    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }

    /// The table as text, one line per row.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        self.rows.iter().map(|row| format_row(&widths, row) + "\n").collect()
    }
}

/// One line of right-aligned cells.
pub fn format_row(widths: &[usize], cells: &[String]) -> String {
    cells
        .iter()
        .zip(widths)
        .fold(String::new(), |line, (cell, width)| format!("{line}  {cell:>width$}"))
}

/// A number with as many decimals as its size deserves.
pub fn number(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "-".to_owned(),
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["batch", "ms"]);
        table.row(["1".to_owned(), number(1234.56)]);
        table.row(["16".to_owned(), number(0.256)]);
        assert_eq!(table.render(), "  batch    ms\n      1  1235\n     16  0.26\n");
        assert_eq!(number(f64::NAN), "-");
    }
}
