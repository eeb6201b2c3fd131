//! What code may not reach for: clocks, sockets and the like in L1, the environment outside the binary,
//! `unsafe` outside the crates that own it.

use super::Finding;
use super::layers::is_logic;
use super::sources::SourceFile;

/// Words that pure logic does not contain, and what they stand for.
const IMPURE: &[(&str, &str)] = &[
    ("Instant", "a clock"),
    ("SystemTime", "a clock"),
    ("TcpListener", "a socket"),
    ("TcpStream", "a socket"),
    ("ToSocketAddrs", "name resolution"),
    ("UdpSocket", "a socket"),
    ("UnixListener", "a socket"),
    ("UnixStream", "a socket"),
    ("async", "async code"),
    ("await", "async code"),
    ("candle", "tensors"),
    ("candle_core", "tensors"),
    ("cudarc", "a device"),
    ("tokio", "async code"),
    ("unsafe", "unsafe code"),
];

/// Who may read the environment: the binary turns strings into configuration, once.
const ENVIRONMENT_READERS: &[&str] = &["tessera", "xtask", "tests"];

/// Who may hold `unsafe`, per item and with a SAFETY sentence.
const UNSAFE_OWNERS: &[&str] = &["tessera-kernels", "tessera-collective", "tessera-model"];

pub fn check(files: &[SourceFile]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let name = file.crate_name().unwrap_or_default();
        // Examples are programs: they take arguments and the time.
        let is_program = file.path.contains("/examples/");
        if is_logic(name) && !is_program {
            check_logic(file, name, &mut findings);
        }
        let may_read =
            ENVIRONMENT_READERS.contains(&name) || file.path.ends_with("/build.rs") || is_program;
        if !may_read {
            check_environment(file, &mut findings);
        }
        if !UNSAFE_OWNERS.contains(&name) && (!is_logic(name) || is_program) {
            check_unsafe(file, &mut findings);
        }
    }
    findings
}

fn check_logic(file: &SourceFile, name: &str, findings: &mut Vec<Finding>) {
    for (number, line) in file.product_lines() {
        for (word, what) in IMPURE {
            if words(line).any(|found| found == *word) {
                let message = format!("{name} is pure logic and may not use {what} (`{word}`)");
                findings.push(Finding::new(&file.path, number, message));
            }
        }
    }
}

fn check_environment(file: &SourceFile, findings: &mut Vec<Finding>) {
    for (number, line) in file.product_lines() {
        if reads_environment(line) {
            let message = "only the binary reads the environment: pass the value in a constructor";
            findings.push(Finding::new(&file.path, number, message));
        }
    }
}

fn check_unsafe(file: &SourceFile, findings: &mut Vec<Finding>) {
    for (number, line) in file.code_lines() {
        if words(line).any(|word| word == "unsafe") {
            let message = format!("unsafe code belongs to {}", UNSAFE_OWNERS.join(", "));
            findings.push(Finding::new(&file.path, number, message));
        }
    }
}

/// `std::env::consts` are constants of the build, not the environment.
fn reads_environment(line: &str) -> bool {
    let mut uses = line.match_indices("std::env");
    let is_read = |rest: &str| !rest.starts_with("::consts") && !rest.starts_with(is_word);
    uses.any(|(at, found)| is_read(&line[at + found.len()..]))
        || words_with_path(line).any(|path| path == "env::var" || path == "env::args")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Identifiers and keywords of a line.
pub fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c| !is_word(c)).filter(|word| !word.is_empty())
}

fn words_with_path(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c| !is_word(c) && c != ':').filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(&[SourceFile::new(path, text)]).iter().map(Finding::to_string).collect()
    }

    const LOGIC: &str = "crates/tessera-scheduler/src/pool.rs";

    #[test]
    fn logic_has_no_clock_socket_tensor_or_async() {
        let impure = [
            "use std::time::Instant;",
            "fn f(t: std::time::SystemTime) {}",
            "use std::net::TcpStream;",
            "async fn f() {}",
            "fn f() { unsafe { g() } }",
            "use candle_core::Tensor;",
            "type T = tokio::sync::Notify;",
            "fn f() { std::env::var(\"X\").ok(); }",
        ];
        for line in impure {
            let found = found(LOGIC, &format!("fn pure() {{}}\n{line}\n"));
            assert_eq!(found.len(), 1, "{line}: {found:?}");
            assert!(found[0].starts_with("crates/tessera-scheduler/src/pool.rs:2: "), "{found:?}");
        }
        let pure = "// Instant\nuse std::net::IpAddr;\nfn f() -> &'static str { \"tokio unsafe\" }\n\
                    #[cfg(test)]\nmod tests { use std::time::Instant; }\nstruct Instants;\n";
        assert_eq!(found(LOGIC, pure), [""; 0]);
        let example = "crates/tessera-scheduler/examples/a.rs";
        assert_eq!(found(example, "use std::time::Instant;"), [""; 0]);
        assert_eq!(found(example, "fn f() { unsafe { g() } }").len(), 1);
        // The same is nobody's business elsewhere.
        assert_eq!(found("crates/tessera-engine/src/a.rs", "use std::time::Instant;"), [""; 0]);
    }

    #[test]
    fn only_the_binary_reads_the_environment() {
        for line in ["let x = std::env::var(\"X\");", "use std::env;", "env::args().next();"] {
            assert_eq!(found("crates/tessera-router/src/a.rs", line).len(), 1, "{line}");
            for free in ["crates/tessera/src/a.rs", "crates/xtask/src/a.rs", "tests/src/a.rs"] {
                assert_eq!(found(free, line), [""; 0]);
            }
            assert_eq!(found("crates/tessera-proto/build.rs", line), [""; 0]);
            assert_eq!(found("crates/tessera-router/examples/a.rs", line), [""; 0]);
            assert_eq!(found("crates/tessera-router/tests/a.rs", line), [""; 0]);
        }
        let constant = "let a = std::env::consts::ARCH; let b = env!(\"CARGO_PKG_VERSION\");";
        assert_eq!(found("crates/tessera-router/src/a.rs", constant), [""; 0]);
    }

    #[test]
    fn unsafe_has_owners() {
        let line = "fn f() { unsafe { g() } }";
        assert!(
            found("crates/tessera-engine/src/a.rs", line)[0].contains("unsafe code belongs to")
        );
        assert_eq!(found("crates/tessera-kernels/src/a.rs", line), [""; 0]);
        assert_eq!(found("crates/tessera-engine/src/a.rs", "#![deny(unsafe_code)]"), [""; 0]);
    }
}
