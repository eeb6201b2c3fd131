//! Two cargo features in all, and they gate modules, never expressions.

use super::Finding;
use super::metadata::Workspace;
use super::sources::SourceFile;

const FEATURES: [&str; 2] = ["cuda", "failpoints"];

/// What may follow `#[cfg(feature = …)]`.
const MODULES: [&str; 4] = ["mod ", "use ", "extern crate ", "#["];

pub fn check(workspace: &Workspace, files: &[SourceFile]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        for feature in package.features.iter().filter(|name| !FEATURES.contains(&name.as_str())) {
            let (allowed, line) = (FEATURES.join("` and `"), package.line_of(feature));
            let message = format!("feature `{feature}`: there are only `{allowed}`");
            findings.push(Finding::new(&package.manifest, line, message));
        }
    }
    files.iter().filter(|file| file.is_rust()).for_each(|file| check_gates(file, &mut findings));
    findings
}

fn check_gates(file: &SourceFile, findings: &mut Vec<Finding>) {
    let lines: Vec<&str> = file.code.lines().collect();
    for (i, line) in lines.iter().enumerate() {
        let Some(at) = line.find("cfg") else { continue };
        if !line[at..].contains("feature =") {
            continue;
        }
        let gated = match line.trim_start().starts_with("#[cfg(") {
            true => gated(line, &lines[i + 1..]),
            false => None,
        };
        let is_module =
            gated.is_some_and(|item| MODULES.iter().any(|begin| item.starts_with(begin)));
        if !is_module {
            let message = "a feature gates a module or its import, never an expression or an item";
            findings.push(Finding::new(&file.path, i + 1, message));
        }
    }
}

/// What a gate stands before, without its visibility: on the same line or the next that has code.
fn gated<'a>(line: &'a str, following: &[&'a str]) -> Option<&'a str> {
    let same_line = line.rfind(")]").map_or("", |at| &line[at + 2..]);
    let mut candidates = std::iter::once(same_line).chain(following.iter().copied());
    let item = candidates.find(|text| !text.trim().is_empty())?.trim_start();
    let Some(rest) = item.strip_prefix("pub") else { return Some(item) };
    match rest.strip_prefix('(') {
        Some(rest) => rest.split_once(')').map(|(_, item)| item.trim_start()),
        None => Some(rest.trim_start()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::metadata::Package;
    use super::*;

    fn gates(text: &str) -> Vec<String> {
        let files = [SourceFile::new("crates/a/src/lib.rs", text)];
        check(&Workspace::default(), &files).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn there_are_two_features() {
        let package = |feature: &str| Package {
            manifest: "crates/a/Cargo.toml".into(),
            manifest_text: format!("[features]\n{feature} = []\n"),
            features: [feature.to_owned()].into(),
            ..Package::default()
        };
        let found = |feature| {
            let workspace = Workspace { packages: vec![package(feature)], ..Workspace::default() };
            check(&workspace, &[])
        };
        assert!(found("cuda").is_empty() && found("failpoints").is_empty());
        let found = found("fast");
        assert_eq!(found[0].line, 2);
        assert!(found[0].message.contains("feature `fast`"));
    }

    #[test]
    fn a_feature_gates_modules() {
        for fine in [
            "#[cfg(feature = \"cuda\")]\npub mod cuda;",
            "#[cfg(not(feature = \"failpoints\"))]\n\npub(crate) use disarmed::hit;",
            "#[cfg(feature = \"cuda\")] mod cuda;",
            "#[cfg(test)]\nfn f() {}",
        ] {
            assert_eq!(gates(fine), [""; 0], "{fine}");
        }
        for broken in [
            "let x = cfg!(feature = \"cuda\");",
            "#[cfg(feature = \"cuda\")]\nfn f() {}",
            "    #[cfg(feature = \"cuda\")]\n    let x = 1;",
            "#[cfg_attr(feature = \"cuda\", inline)]\nmod x;",
        ] {
            assert_eq!(gates(broken).len(), 1, "{broken}");
        }
        assert!(
            gates("\n#[cfg(feature = \"cuda\")]\nfn f() {}")[0]
                .starts_with("crates/a/src/lib.rs:2:")
        );
    }
}
