//! A progress bar for people at a terminal.

use std::io::{IsTerminal, stderr};

use indicatif::{ProgressBar, ProgressStyle};
use tessera_model::LoadProgress;

/// Bytes done, of all; gone from the terminal when dropped.
pub struct Bar(ProgressBar);

/// A bar on standard error, if that is a terminal.
pub fn bar(what: &'static str) -> Option<Bar> {
    if !stderr().is_terminal() {
        return None;
    }
    let template = "{msg} [{bar:40}] {bytes}/{total_bytes}, {bytes_per_sec}";
    let style = ProgressStyle::with_template(template).expect("the template is well-formed");
    Some(Bar(ProgressBar::new(0).with_style(style).with_message(what)))
}

impl Bar {
    pub fn show(&self, progress: LoadProgress) {
        self.0.set_length(progress.total_bytes);
        self.0.set_position(progress.loaded_bytes);
        if progress.total_bytes > 0 && progress.loaded_bytes == progress.total_bytes {
            self.0.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
