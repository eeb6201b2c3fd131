//! What the README tells people to type, so that tests can type it.

use std::fs;
use std::path::{Path, PathBuf};

/// Root of the repository, where its commands are run.
pub fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().expect("the package lies in the repository").to_owned()
}

/// Lines of the shell block under a heading.
///
/// # Panics
/// When there is no such heading or no block.
pub fn commands(heading: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("README.md")).expect("the README is there");
    let section = text
        .split("\n## ")
        .find(|section| section.starts_with(heading))
        .unwrap_or_else(|| panic!("the README has no section {heading:?}"));
    let block = section
        .split("```")
        .find_map(|block| block.strip_prefix("sh\n"))
        .unwrap_or_else(|| panic!("the section {heading:?} has no shell block"));
    block.lines().map(str::to_owned).collect()
}
