//! What `cargo metadata` says of the workspace: packages, their dependencies and features.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The packages of the workspace, and the graph of all that they link.
#[derive(Debug, Default)]
pub struct Workspace {
    pub packages: Vec<Package>,
    /// Package id to name, for the whole graph.
    pub names: BTreeMap<String, String>,
    /// Package id to the ids that it links: normal dependencies only.
    pub links: BTreeMap<String, BTreeSet<String>>,
}

/// A member of the workspace.
#[derive(Debug, Default)]
pub struct Package {
    pub id: String,
    pub name: String,
    /// Manifest and its text, from the workspace's root; the text locates findings.
    pub manifest: String,
    pub manifest_text: String,
    /// Names of direct dependencies of all kinds.
    pub dependencies: BTreeSet<String>,
    pub features: BTreeSet<String>,
}

impl Package {
    /// Line of the manifest that names a dependency or feature, from 1.
    pub fn line_of(&self, name: &str) -> usize {
        let names = |line: &str| {
            let rest = line.trim_start().strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with([' ', '.', '=']))
        };
        1 + self.manifest_text.lines().position(names).unwrap_or(0)
    }
}

/// Asks cargo. All features are on, so that nothing hides behind one.
pub fn load(root: &Path) -> Result<Workspace, String> {
    let output = Command::new(crate::cargo())
        .args(["metadata", "--format-version", "1", "--all-features", "--locked"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cargo metadata failed: {}", complaint.trim()));
    }
    let json = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("cargo metadata is not JSON: {error}"))?;
    let mut workspace = parse(&json).ok_or("cargo metadata lacks a field that tidy reads")?;
    for package in &mut workspace.packages {
        let path = Path::new(&package.manifest);
        package.manifest_text = std::fs::read_to_string(path)
            .map_err(|error| format!("{}: {error}", package.manifest))?;
        let relative = path.strip_prefix(root).unwrap_or(path);
        package.manifest = relative.to_string_lossy().replace('\\', "/");
    }
    Ok(workspace)
}

fn parse(json: &Value) -> Option<Workspace> {
    let members: BTreeSet<&str> =
        json["workspace_members"].as_array()?.iter().filter_map(Value::as_str).collect();
    let mut workspace = Workspace::default();
    for package in json["packages"].as_array()? {
        let (id, name) = (package["id"].as_str()?, package["name"].as_str()?);
        workspace.names.insert(id.to_owned(), name.to_owned());
        if !members.contains(id) {
            continue;
        }
        let dependencies = package["dependencies"].as_array()?.iter();
        workspace.packages.push(Package {
            id: id.to_owned(),
            name: name.to_owned(),
            manifest: package["manifest_path"].as_str()?.to_owned(),
            manifest_text: String::new(),
            dependencies: dependencies
                .filter_map(|dependency| Some(dependency["name"].as_str()?.to_owned()))
                .collect(),
            features: package["features"].as_object()?.keys().cloned().collect(),
        });
    }
    for node in json["resolve"]["nodes"].as_array()? {
        let linked = node["deps"].as_array()?.iter().filter(|dep| is_linked(dep));
        let ids = linked.filter_map(|dep| Some(dep["pkg"].as_str()?.to_owned())).collect();
        workspace.links.insert(node["id"].as_str()?.to_owned(), ids);
    }
    Some(workspace)
}

/// Whether a dependency ends up in the binary; build and test dependencies don't.
fn is_linked(dep: &Value) -> bool {
    dep["dep_kinds"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metadata_becomes_packages_and_links() {
        let json = json!({
            "workspace_members": ["a 1"],
            "packages": [
                {"id": "a 1", "name": "a", "manifest_path": "crates/a/Cargo.toml",
                 "features": {"cuda": []}, "dependencies": [{"name": "b"}, {"name": "c"}]},
                {"id": "b 1", "name": "b", "manifest_path": "x", "features": {}, "dependencies": []},
            ],
            "resolve": {"nodes": [{"id": "a 1", "deps": [
                {"pkg": "b 1", "dep_kinds": [{"kind": "dev"}, {"kind": null}]},
                {"pkg": "c 1", "dep_kinds": [{"kind": "dev"}]},
            ]}]},
        });
        let workspace = parse(&json).unwrap();
        assert_eq!(workspace.packages.len(), 1);
        let package = &workspace.packages[0];
        assert_eq!(package.dependencies, ["b", "c"].map(String::from).into());
        assert_eq!(package.features, ["cuda".to_owned()].into());
        assert_eq!(workspace.links["a 1"], ["b 1".to_owned()].into());
        assert_eq!(workspace.names["b 1"], "b");
        assert!(parse(&json!({"packages": []})).is_none());
    }

    #[test]
    fn a_dependency_is_found_in_its_manifest() {
        let manifest_text = "[dependencies]\ntokio-stream = \"1\"\ntokio.workspace = true\n".into();
        let package = Package { manifest_text, ..Package::default() };
        assert_eq!((package.line_of("tokio"), package.line_of("absent")), (3, 1));
    }
}
