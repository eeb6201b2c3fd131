//! Epochs and attempts are compared in `tessera-cluster` alone, where the machines decide what is stale
//! (CLUSTER). A text check sees comparisons by operator; it does not see `match` or `Ord` methods.

use super::Finding;
use super::sources::SourceFile;

const OWNER: &str = "crates/tessera-cluster/";

/// Comparisons elsewhere that are right where they are: file, a part of the line, and why.
const ALLOWED: &[(&str, &str, &str)] = &[
    (
        "crates/tessera-collective/src/tcp/accept.rs",
        "hello.epoch != epoch",
        "a communicator admits ranks of its own epoch only; no protocol runs below it",
    ),
    (
        "crates/tessera-scheduler/src/table.rs",
        "plan.epoch != self.epoch",
        "a sequence table lives for one epoch and refuses another's plan as it refuses a gap",
    ),
    (
        "crates/tessera-scheduler/src/fake_model.rs",
        "read.epoch != Some(rank.table.epoch())",
        "the fake KV cache catches reads of what another epoch wrote; it decides nothing",
    ),
    (
        "crates/tessera-engine/src/local_ranks.rs",
        "epoch == ended.epoch",
        "the engine waits for its own rank threads to leave an epoch that has ended already",
    ),
    (
        "crates/tessera-engine/src/local_ranks.rs",
        "epoch.epoch == report.epoch",
        "reports of rank threads that were under way when their epoch ended are dropped",
    ),
];

/// Longer operators first, so that `<=` is not taken for `<`. The single ones need spaces around them,
/// which rustfmt writes for comparisons and not for generics.
const OPERATORS: &[&str] = &["==", "!=", "<=", ">=", " < ", " > "];

pub fn check(files: &[SourceFile]) -> Vec<Finding> {
    check_with(files, ALLOWED)
}

fn check_with(files: &[SourceFile], allowed: &[(&str, &str, &str)]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut used = vec![false; allowed.len()];
    let judged = files.iter().filter(|file| file.is_rust() && !file.path.starts_with(OWNER));
    for file in judged {
        for (number, line) in file.product_lines() {
            let Some(name) = compared(line) else { continue };
            let excuse = allowed
                .iter()
                .position(|&(path, part, _)| path == file.path && line.contains(part));
            match excuse {
                Some(at) => used[at] = true,
                None => {
                    let message = format!("`{name}` is compared outside tessera-cluster");
                    findings.push(Finding::new(&file.path, number, message));
                }
            }
        }
    }
    for (&(path, part, _), _) in allowed.iter().zip(&used).filter(|(_, used)| !**used) {
        let message = format!("the exception for `{part}` is no longer needed: remove it");
        findings.push(Finding::new(path, 1, message));
    }
    findings
}

/// Name of an epoch or attempt on either side of a comparison in this line.
fn compared(line: &str) -> Option<&str> {
    OPERATORS.iter().find_map(|operator| {
        line.match_indices(operator).find_map(|(at, _)| {
            let (left, right) = (&line[..at], &line[at + operator.len()..]);
            // `=>` and `->` are no comparisons, nor is the end of a generic list.
            let is_arrow = left.ends_with(['=', '-']) || (*operator == ">=" && left.ends_with('='));
            if is_arrow {
                return None;
            }
            name_before(left).filter(is_guarded).or_else(|| name_after(right).filter(is_guarded))
        })
    })
}

fn is_guarded(name: &&str) -> bool {
    matches!(*name, "epoch" | "attempt") || name.ends_with("_epoch") || name.ends_with("_attempt")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The identifier that an expression ends with: `self.epoch()`, `plan.epoch.0`, `*attempt`.
fn name_before(text: &str) -> Option<&str> {
    let mut text = text.trim_end();
    loop {
        let shorter = text.strip_suffix("()").or_else(|| text.strip_suffix(".0"));
        match shorter {
            Some(shorter) => text = shorter.trim_end(),
            None => break,
        }
    }
    let begin = text.rfind(|c| !is_word(c)).map_or(0, |at| at + 1);
    (begin < text.len()).then_some(&text[begin..])
}

/// The last identifier of the path that an expression begins with: `Some(epoch)`, `&self.spec.epoch`.
fn name_after(text: &str) -> Option<&str> {
    let text = text.trim_start().trim_start_matches(['&', '*', '(']).trim_start();
    let text = text.strip_prefix("Some(").unwrap_or(text);
    let end = text.find(|c| !is_word(c) && c != '.' && c != ':').unwrap_or(text.len());
    let path = text[..end].trim_end_matches(".0");
    path.rsplit(['.', ':']).next().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let files = [SourceFile::new(path, text)];
        check_with(&files, &[]).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn comparisons_of_epochs_and_attempts_are_seen() {
        let comparisons = [
            "if plan.epoch == self.epoch {",
            "if plan.epoch.0 < 3 {",
            "if self.epoch() != other {",
            "if other >= message.attempt {",
            "x.is_some_and(|old| old > current_epoch)",
            "if record.first_attempt <= 1 {",
            "let stale = wanted != Some(epoch);",
            "while *epoch < limit {",
            "if 1 == self.spec.epoch.0 {",
        ];
        for line in comparisons {
            let found = found("crates/tessera-engine/src/a.rs", &format!("\n{line}\n"));
            assert_eq!(found.len(), 1, "{line}");
            assert!(found[0].starts_with("crates/tessera-engine/src/a.rs:2: "), "{found:?}");
        }
    }

    #[test]
    fn other_uses_are_free() {
        let free = [
            "match epoch { Epoch(0) => None, epoch => Some(epoch) }",
            "let epoch = next(epoch);",
            "fn f(epoch: Option<Epoch>) -> Epoch {",
            "if num_epochs == 3 || attempts > 2 {",
            "epoch => leave(epoch),",
            "// plan.epoch == self.epoch",
            "log(\"epoch == 3\");",
            "#[cfg(test)] fn t() { assert!(a.epoch == b.epoch); }",
        ];
        for line in free {
            assert_eq!(found("crates/tessera-engine/src/a.rs", line), [""; 0], "{line}");
        }
        let line = "if a.epoch == b.epoch {}";
        assert_eq!(found("crates/tessera-cluster/src/a.rs", line), [""; 0]);
        assert_eq!(found("crates/tessera-engine/tests/a.rs", line), [""; 0]);
    }

    #[test]
    fn exceptions_hold_for_their_line_and_must_be_needed() {
        let path = "crates/tessera-engine/src/a.rs";
        let files = [SourceFile::new(path, "if a.epoch != epoch {}\nif b.epoch != epoch {}\n")];
        let findings = check_with(&files, &[(path, "a.epoch != epoch", "why")]);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].line, 2);
        let findings = check_with(&files[..0], &[(path, "a.epoch != epoch", "why")]);
        assert!(findings[0].message.contains("no longer needed"));
    }
}
