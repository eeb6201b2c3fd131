//! The files that the rules read.

use std::io;
use std::path::Path;

use super::strip;

/// Folders that hold no sources of ours.
const SKIPPED: [&str; 6] = ["target", ".git", ".venv", ".cache", "node_modules", "fixtures"];

/// Names without an extension that are text all the same.
const NAMED_TEXTS: [&str; 4] = ["Makefile", "Dockerfile", ".gitignore", "run"];

const TEXTS: [&str; 11] =
    ["rs", "toml", "md", "py", "sh", "proto", "yml", "yaml", "json", "lock", "txt"];

/// A text file of the workspace.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// From the workspace's root, with `/`.
    pub path: String,
    pub text: String,
    /// For Rust: the text with comments and the insides of strings blanked, line for line. Else empty.
    pub code: String,
    /// As `code`, with `#[cfg(test)]` items blanked too; all blank in files that are tests as a whole.
    pub product: String,
}

impl SourceFile {
    pub fn new(path: &str, text: &str) -> Self {
        let is_rust = path.ends_with(".rs");
        let code = if is_rust { strip::code(text) } else { String::new() };
        let product = match is_test(path) {
            true => String::new(),
            false => strip::without_tests(&code),
        };
        Self { path: path.to_owned(), text: text.to_owned(), code, product }
    }

    /// Name of the crate that the file belongs to; `tests` for the package of that name.
    pub fn crate_name(&self) -> Option<&str> {
        match self.path.strip_prefix("crates/") {
            Some(rest) => rest.split('/').next(),
            None if self.path.starts_with("tests/") => Some("tests"),
            None => None,
        }
    }

    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Lines of the product code with their numbers, from 1.
    pub fn product_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.product.lines())
    }

    /// Lines of all code, tests included.
    pub fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.code.lines())
    }

    /// Lines as they were written.
    pub fn text_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }
}

/// Test code by its place: the tests package, a crate's `tests` or `benches`, and `tests.rs` modules.
fn is_test(path: &str) -> bool {
    let mut folders: Vec<&str> = path.split('/').collect();
    let name = folders.pop().unwrap_or_default();
    name == "tests.rs" || folders.iter().any(|folder| matches!(*folder, "tests" | "benches"))
}

/// Every text file below `root`, in order.
pub fn load(root: &Path) -> io::Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    walk(root, root, &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn walk(root: &Path, folder: &Path, files: &mut Vec<SourceFile>) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        let name = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
            walk(root, &path, files)?;
        }
        if !kind.is_file() || !is_text(&name) {
            continue;
        }
        let relative =
            path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        match std::fs::read_to_string(&path) {
            Ok(text) => files.push(SourceFile::new(&relative, &text)),
            // It went away while we walked, or is no text after all.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_text(name: &str) -> bool {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    NAMED_TEXTS.contains(&name) || extension.is_some_and(|extension| TEXTS.contains(&extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_known_by_their_place() {
        for path in ["tests/src/lib.rs", "crates/a/tests/b.rs", "crates/a/src/b/tests.rs"] {
            let file = SourceFile::new(path, "fn f() {}");
            assert!(file.product.is_empty() && !file.code.is_empty(), "{path}");
        }
        assert!(!SourceFile::new("crates/a/src/attests.rs", "fn f() {}").product.is_empty());
    }

    #[test]
    fn a_file_knows_its_crate() {
        let name = |path| SourceFile::new(path, "").crate_name().map(str::to_owned);
        assert_eq!(name("crates/tessera-media/src/lib.rs").as_deref(), Some("tessera-media"));
        assert_eq!(name("tests/src/lib.rs").as_deref(), Some("tests"));
        assert_eq!(name("README.md"), None);
    }
}
