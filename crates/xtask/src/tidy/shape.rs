//! How files look: length, opening words, names, leftovers, and nothing of the machine they were written
//! on.

use super::Finding;
use super::sources::SourceFile;

const MAX_LINES: usize = 600;

/// Kinds of file whose length is limited.
const WRITTEN: [&str; 4] = [".rs", ".proto", ".py", ".sh"];

/// Macros that stand for work not done.
const LEFTOVERS: [&str; 3] = ["todo", "unimplemented", "dbg"];

/// Modules are named for what they hold.
const NAMELESS: [&str; 5] = ["utils", "util", "common", "helpers", "helper"];

/// Folders at the root of a file system that mean one machine. The first three are so in every file;
/// scratch folders only in code, as a command for a reader may name one.
const MACHINE_FOLDERS: [&str; 3] = ["work", "root", "home"];
const SCRATCH_FOLDER: &str = "tmp";

pub fn check(files: &[SourceFile]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in files {
        check_length(file, &mut findings);
        check_opening(file, &mut findings);
        check_name(file, &mut findings);
        check_leftovers(file, &mut findings);
        check_machine(file, &mut findings);
        check_registry(file, &mut findings);
    }
    findings
}

fn check_length(file: &SourceFile, findings: &mut Vec<Finding>) {
    let num_lines = file.text.lines().count();
    if WRITTEN.iter().any(|kind| file.path.ends_with(kind)) && num_lines > MAX_LINES {
        let message = format!("{num_lines} lines; a file has at most {MAX_LINES}");
        findings.push(Finding::new(&file.path, MAX_LINES + 1, message));
    }
}

fn check_opening(file: &SourceFile, findings: &mut Vec<Finding>) {
    let is_crate_root = ["/src/lib.rs", "/src/main.rs"].iter().any(|end| file.path.ends_with(end));
    if is_crate_root && !file.text.starts_with("//!") {
        let message = "a crate opens with `//!`: its purpose, invariants and modules";
        findings.push(Finding::new(&file.path, 1, message));
    }
}

fn check_name(file: &SourceFile, findings: &mut Vec<Finding>) {
    let names = file.path.split('/').map(|name| name.split('.').next().unwrap_or(name));
    for name in names.filter(|name| file.is_rust() && NAMELESS.contains(name)) {
        let message = format!("`{name}` says nothing: name a module for what it holds");
        findings.push(Finding::new(&file.path, 1, message));
    }
}

fn check_leftovers(file: &SourceFile, findings: &mut Vec<Finding>) {
    for (number, line) in file.code_lines() {
        for name in LEFTOVERS {
            let is_call = |at: usize| {
                let is_whole = !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
                is_whole && line[at + name.len()..].starts_with('!')
            };
            if line.match_indices(name).any(|(at, _)| is_call(at)) {
                findings.push(Finding::new(&file.path, number, format!("`{name}!` is left over")));
            }
        }
    }
}

fn check_machine(file: &SourceFile, findings: &mut Vec<Finding>) {
    let is_code = file.is_rust() || file.path.ends_with(".toml");
    let scratch = is_code.then_some(SCRATCH_FOLDER);
    for (number, line) in file.text_lines() {
        for folder in MACHINE_FOLDERS.into_iter().chain(scratch) {
            let path = format!("/{folder}/");
            let is_absolute = |at: usize| {
                // `a/work/b`, `$HOME/work/` and `https://host/work/` lead elsewhere.
                let before = line[..at].chars().next_back();
                !before.is_some_and(|c| c.is_alphanumeric() || "_-./}$~".contains(c))
            };
            if line.match_indices(&path).any(|(at, _)| is_absolute(at)) {
                let message = format!("`{path}…` is a path of one machine");
                findings.push(Finding::new(&file.path, number, message));
            }
        }
    }
}

/// The lock file must be usable by everyone.
fn check_registry(file: &SourceFile, findings: &mut Vec<Finding>) {
    const PUBLIC: &str = "registry+https://github.com/rust-lang/crates.io-index";
    if !file.path.ends_with("Cargo.lock") {
        return;
    }
    for (number, line) in file.text_lines() {
        if line.starts_with("source = ") && !line.contains(PUBLIC) {
            let message = "a dependency comes from elsewhere than crates.io";
            findings.push(Finding::new(&file.path, number, message));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(&[SourceFile::new(path, text)]).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn a_file_has_at_most_600_lines() {
        assert_eq!(found("crates/a/src/b.rs", &"x\n".repeat(600)), [""; 0]);
        let long = found("crates/a/src/b.rs", &"x\n".repeat(601));
        assert_eq!(long, ["crates/a/src/b.rs:601: 601 lines; a file has at most 600"]);
        assert_eq!(found("Cargo.lock", &"x\n".repeat(601)), [""; 0]);
    }

    #[test]
    fn a_crate_opens_with_its_purpose() {
        assert_eq!(found("crates/a/src/lib.rs", "//! Purpose.\n"), [""; 0]);
        for root in ["crates/a/src/lib.rs", "crates/a/src/main.rs", "tests/src/lib.rs"] {
            assert_eq!(found(root, "mod b;\n").len(), 1);
        }
        assert_eq!(found("crates/a/src/b.rs", "mod c;\n"), [""; 0]);
    }

    #[test]
    fn modules_have_names() {
        for path in ["crates/a/src/utils.rs", "crates/a/tests/common/mod.rs"] {
            assert_eq!(found(path, "").len(), 1, "{path}");
        }
        assert_eq!(found("crates/a/src/utility_bill.rs", ""), [""; 0]);
        assert_eq!(found("docs/common.md", ""), [""; 0]);
    }

    #[test]
    fn nothing_is_left_over() {
        for name in LEFTOVERS {
            let line = format!("fn f() {{\n    {name}!()\n}}");
            assert_eq!(
                found("crates/a/src/b.rs", &line),
                [format!("crates/a/src/b.rs:2: `{name}!` is left over")]
            );
            assert_eq!(
                found("crates/a/src/b.rs", &format!("// {name}!()\nlet {name} = 1;")),
                [""; 0]
            );
        }
        assert_eq!(found("crates/a/src/b.rs", "my_dbg!(x)"), [""; 0]);
    }

    #[test]
    fn paths_of_a_machine_are_seen_in_code_comments_and_pages() {
        for folder in MACHINE_FOLDERS {
            for text in [format!("see /{folder}/x"), format!("\"/{folder}/a/b\"")] {
                assert_eq!(found("docs/a.md", &text).len(), 1, "{text}");
                assert_eq!(found("crates/a/src/b.rs", &format!("// {text}")).len(), 1, "{text}");
            }
            for text in
                [format!("a/{folder}/b"), format!("https://h.org/{folder}/x"), folder.into()]
            {
                assert_eq!(found("docs/a.md", &text), [""; 0], "{text}");
            }
        }
        let scratch = format!("/{SCRATCH_FOLDER}/x");
        assert_eq!(found("docs/a.md", &scratch), [""; 0]);
        assert_eq!(found("crates/a/src/b.rs", &format!("let a = \"{scratch}\";")).len(), 1);
    }

    #[test]
    fn the_lock_file_names_the_public_registry() {
        let line = |host: &str| format!("source = \"registry+https://{host}/crates.io-index\"\n");
        assert_eq!(found("Cargo.lock", &line("github.com/rust-lang")), [""; 0]);
        assert_eq!(found("Cargo.lock", &line("mirror.example")).len(), 1);
    }
}
