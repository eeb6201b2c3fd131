//! The rules of DESIGN §3, CLUSTER and STYLE that a text check can see. Each rule is a function from
//! sources or metadata to findings; a finding names file and line.
//!
//! Modules: [`metadata`] (what cargo knows), [`sources`] (the files), [`strip`] (code without comments,
//! strings and tests); rules in [`layers`], [`purity`], [`epochs`], [`features`], [`shape`].

mod epochs;
mod features;
mod layers;
mod metadata;
mod purity;
mod shape;
mod sources;
mod strip;

use std::fmt;
use std::path::Path;

use metadata::Workspace;
use sources::SourceFile;

/// One breach of one rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// From the workspace's root.
    path: String,
    /// From 1.
    line: usize,
    message: String,
}

impl Finding {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.message)
    }
}

/// Prints every finding; whether there was none.
pub fn run(root: &Path) -> bool {
    let inputs = metadata::load(root).and_then(|workspace| {
        let files = sources::load(root).map_err(|error| format!("reading the sources: {error}"))?;
        Ok((workspace, files))
    });
    let (workspace, files) = match inputs {
        Ok(inputs) => inputs,
        Err(error) => {
            eprintln!("tidy: {error}");
            return false;
        }
    };
    let findings = check(&workspace, &files);
    for finding in &findings {
        eprintln!("{finding}");
    }
    println!("tidy: {} files, {} findings", files.len(), findings.len());
    findings.is_empty()
}

fn check(workspace: &Workspace, files: &[SourceFile]) -> Vec<Finding> {
    let mut findings = layers::check(workspace);
    findings.extend(features::check(workspace, files));
    findings.extend(purity::check(files));
    findings.extend(epochs::check(files));
    findings.extend(shape::check(files));
    findings.sort();
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rule that is fed nothing finds nothing, so the inputs must be those of this workspace.
    #[test]
    fn the_inputs_are_those_of_the_workspace() {
        let root = crate::root();
        let workspace = metadata::load(&root).unwrap();
        let router = workspace.packages.iter().find(|package| package.name == "tessera-router");
        let router = router.unwrap();
        assert_eq!(router.manifest, "crates/tessera-router/Cargo.toml");
        assert!(router.line_of("tokio") > 1);
        assert!(workspace.links[&router.id].len() > 5);

        let files = sources::load(&root).unwrap();
        let this = files.iter().find(|file| file.path == "crates/xtask/src/tidy/mod.rs").unwrap();
        assert!(this.product.contains("fn check(") && !this.product.contains("assert"));
        assert!(files.iter().all(|file| !file.path.starts_with("target/")));
    }

    #[test]
    fn findings_of_all_rules_come_in_order_of_place() {
        let files = [
            SourceFile::new("crates/tessera-scheduler/src/lib.rs", "use std::time::Instant;"),
            SourceFile::new("crates/tessera-engine/src/a.rs", "fn f() { a.epoch == b }"),
            SourceFile::new(
                "crates/tessera-engine/src/b.rs",
                "#[cfg(feature = \"cuda\")]\nfn f() {}",
            ),
        ];
        let findings = check(&Workspace::default(), &files);
        let places: Vec<String> = findings
            .iter()
            .filter(|finding| !finding.message.contains("no longer needed"))
            .map(|finding| format!("{}:{}", finding.path, finding.line))
            .collect();
        assert_eq!(
            places,
            [
                "crates/tessera-engine/src/a.rs:1",
                "crates/tessera-engine/src/b.rs:1",
                "crates/tessera-scheduler/src/lib.rs:1",
                "crates/tessera-scheduler/src/lib.rs:1",
            ]
        );
    }
}
