//! The figures of `tessera bench kernels`.

use std::path::Path;

use serde::Serialize;

use super::args::Plan;
use crate::bench::limits::Paired;
use crate::bench::machine::Machine;
use crate::bench::shape::Shape;
use crate::bench::table::{format_row, number};
use crate::bench::write_json;
use crate::error::Result;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    benchmark: &'static str,
    machine: Machine,
    shape: &'a Shape,
    settings: &'a Plan,
    kernels: Vec<Row>,
}

/// One kernel at one size.
#[derive(Debug, Serialize)]
pub struct Row {
    pub kernel: &'static str,
    pub what: String,
    pub rows: u32,
    pub context: Option<u32>,
    #[serde(flatten)]
    pub paired: Paired,
}

const WIDTHS: [usize; 8] = [17, 19, 6, 8, 9, 9, 20, 8];

impl<'a> Report<'a> {
    pub fn new(plan: &'a Plan) -> Self {
        Self {
            benchmark: "kernels",
            machine: Machine::read(),
            shape: &plan.shape,
            settings: plan,
            kernels: Vec::new(),
        }
    }

    /// What is measured, and the headings of the rows to come.
    pub fn print_head(&self) {
        let plan = self.settings;
        println!("{}", self.machine.describe());
        println!(
            "kernels of {}; device {}, {} threads",
            plan.shape.name, plan.device, plan.threads
        );
        println!("medians of {} pairs; share as median [p10, p90]", plan.repeats);
        let headings = ["kernel", "what", "rows", "context", "ms", "limit ms", "share", "bound"];
        println!("{}", format_row(&WIDTHS, &headings.map(str::to_owned)));
    }

    /// Prints a row and keeps it.
    pub fn row(&mut self, row: Row) {
        let Paired { ms, limit_ms, share, bound, .. } = row.paired;
        let shares =
            format!("{} [{}, {}]", number(share.median), number(share.p10), number(share.p90));
        let cells = [
            row.kernel.to_owned(),
            row.what.clone(),
            row.rows.to_string(),
            row.context.map_or_else(|| "-".to_owned(), |context| context.to_string()),
            format!("{:.3}", ms.median),
            format!("{:.3}", limit_ms.median),
            shares,
            bound.to_owned(),
        ];
        println!("{}", format_row(&WIDTHS, &cells));
        self.kernels.push(row);
    }

    /// Writes the figures as JSON.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        write_json(self, file)
    }
}
