//! Which crate may depend on which (DESIGN §3): arrows only point down.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use super::Finding;
use super::metadata::{Package, Workspace};

/// Heights of the crates. A crate may depend on crates strictly below it; crates of one height don't
/// know each other.
const LAYERS: &[(u32, &[&str])] = &[
    // L0, words.
    (0, &["tessera-types"]),
    // L1, logic: processor → media, whose resizing decides the sizes that processor announces.
    (10, &["tessera-scheduler", "tessera-cluster", "tessera-media"]),
    (11, &["tessera-processor"]),
    // L2, device: model → kernels → collective.
    (20, &["tessera-collective"]),
    (21, &["tessera-kernels"]),
    (22, &["tessera-model"]),
    // L3, adapters and execution.
    (30, &["tessera-proto", "tessera-membership", "tessera-telemetry", "tessera-engine"]),
    // L4, services.
    (40, &["tessera-router", "tessera-encoder", "tessera-decoder"]),
    // L5, the binary.
    (50, &["tessera"]),
    // Development: they may know everything, nothing knows them.
    (60, &["tessera-sim", "tessera-tests", "xtask"]),
];

/// Dependencies that no crate of L1 has, since it is pure logic.
const IMPURE: &[&str] = &[
    "axum",
    "candle-core",
    "crossbeam-channel",
    "cudarc",
    "etcd-client",
    "futures",
    "memmap2",
    "rustix",
    "socket2",
    "tokio",
    "tokio-stream",
    "tokio-util",
    "tonic",
];

/// External crates that only some of ours may name, and why.
const RESERVED: &[(&str, &[&str], &str)] = &[
    ("etcd-client", &["tessera-membership"], "one etcd client path"),
    (
        "cudarc",
        &["tessera-collective", "tessera-kernels", "tessera-model"],
        "only device crates touch CUDA",
    ),
];

/// Crates whose binary must not contain these.
const CLOSED: &[(&str, &[&str])] = &[("tessera-router", &["candle-core", "cudarc"])];

/// Heights of the layer that is pure logic.
const LOGIC: Range<u32> = 10..20;

pub fn check(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        check_height(package, &mut findings);
        check_reserved(package, &mut findings);
    }
    for (name, barred) in CLOSED {
        check_closure(workspace, name, barred, &mut findings);
    }
    findings
}

/// Whether a crate belongs to the layer of pure logic.
pub fn is_logic(name: &str) -> bool {
    height(name).is_some_and(|height| LOGIC.contains(&height))
}

fn height(name: &str) -> Option<u32> {
    let of = |(height, names): &(u32, &[&str])| names.contains(&name).then_some(*height);
    LAYERS.iter().find_map(of)
}

fn check_height(package: &Package, findings: &mut Vec<Finding>) {
    let Package { name, manifest, .. } = package;
    let Some(own) = height(name) else {
        let message =
            format!("{name} has no layer: give it one in crates/xtask/src/tidy/layers.rs");
        findings.push(Finding::new(manifest, 1, message));
        return;
    };
    for dependency in &package.dependencies {
        let is_above = height(dependency).is_some_and(|below| below >= own);
        if is_above && dependency != name {
            let message = format!("{name} must not depend on {dependency}: arrows only point down");
            findings.push(Finding::new(manifest, package.line_of(dependency), message));
        }
        if LOGIC.contains(&own) && IMPURE.contains(&dependency.as_str()) {
            let message = format!("{name} is pure logic and must not depend on {dependency}");
            findings.push(Finding::new(manifest, package.line_of(dependency), message));
        }
    }
}

fn check_reserved(package: &Package, findings: &mut Vec<Finding>) {
    for (reserved, owners, reason) in RESERVED {
        let names_it = package.dependencies.contains(*reserved);
        if names_it && !owners.contains(&package.name.as_str()) {
            let (name, owners) = (&package.name, owners.join(", "));
            let message = format!("{name} names {reserved}, which belongs to {owners}: {reason}");
            findings.push(Finding::new(&package.manifest, package.line_of(reserved), message));
        }
    }
}

/// Looks for `barred` crates among all that `name` links, and shows the way to them.
fn check_closure(workspace: &Workspace, name: &str, barred: &[&str], findings: &mut Vec<Finding>) {
    let Some(package) = workspace.packages.iter().find(|package| package.name == name) else {
        return;
    };
    let mut came_from: BTreeMap<&str, Option<&str>> = BTreeMap::from([(&*package.id, None)]);
    let mut queue = VecDeque::from([&*package.id]);
    while let Some(id) = queue.pop_front() {
        if barred.contains(&name_of(workspace, id)) {
            let mut way = vec![name_of(workspace, id)];
            let mut step = came_from[id];
            while let Some(before) = step {
                way.push(name_of(workspace, before));
                step = came_from[before];
            }
            way.reverse();
            let line = way.get(1).map_or(1, |first| package.line_of(first));
            let message =
                format!("{name} must not link {}: {}", way[way.len() - 1], way.join(" → "));
            findings.push(Finding::new(&package.manifest, line, message));
            continue;
        }
        for next in workspace.links.get(id).into_iter().flatten() {
            if !came_from.contains_key(&**next) {
                came_from.insert(next, Some(id));
                queue.push_back(next);
            }
        }
    }
}

fn name_of<'a>(workspace: &'a Workspace, id: &'a str) -> &'a str {
    workspace.names.get(id).map_or(id, String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependencies: &[&str]) -> Package {
        Package {
            id: name.to_owned(),
            name: name.to_owned(),
            manifest: format!("crates/{name}/Cargo.toml"),
            manifest_text: dependencies.iter().map(|name| format!("{name} = \"1\"\n")).collect(),
            dependencies: dependencies.iter().map(|&name| name.to_owned()).collect(),
            ..Package::default()
        }
    }

    fn messages(packages: Vec<Package>, links: &[(&str, &[&str])]) -> Vec<String> {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let links = links.iter().map(|(from, to)| ((*from).to_owned(), owned(to))).collect();
        let workspace = Workspace { packages, links, ..Workspace::default() };
        check(&workspace).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn arrows_point_down() {
        let fine = vec![
            package("tessera-model", &["tessera-kernels", "tessera-collective", "half"]),
            package("tessera-kernels", &["tessera-collective", "tessera-types", "candle-core"]),
            package("tessera-sim", &["tessera-engine", "tessera-cluster"]),
        ];
        assert_eq!(messages(fine, &[]), [""; 0]);

        let up = package("tessera-kernels", &["half", "tessera-model"]);
        assert_eq!(
            messages(vec![up], &[]),
            [
                "crates/tessera-kernels/Cargo.toml:2: tessera-kernels must not depend on tessera-model: \
              arrows only point down"
            ]
        );
        let sideways = package("tessera-router", &["tessera-decoder"]);
        assert!(messages(vec![sideways], &[])[0].contains("must not depend on tessera-decoder"));
        let development = package("tessera", &["xtask"]);
        assert!(messages(vec![development], &[])[0].contains("must not depend on xtask"));
    }

    #[test]
    fn a_new_crate_needs_a_layer() {
        assert!(messages(vec![package("tessera-new", &[])], &[])[0].contains("has no layer"));
    }

    #[test]
    fn logic_is_pure() {
        for impure in ["tokio", "candle-core", "rustix"] {
            let found = messages(vec![package("tessera-scheduler", &[impure])], &[]);
            assert!(found[0].contains("pure logic"), "{found:?}");
        }
        assert!(is_logic("tessera-media") && !is_logic("tessera-types") && !is_logic("tokio"));
    }

    #[test]
    fn reserved_crates_have_owners() {
        assert!(messages(vec![package("tessera-membership", &["etcd-client"])], &[]).is_empty());
        let found = messages(vec![package("tessera-router", &["etcd-client"])], &[]);
        assert!(found[0].contains("belongs to tessera-membership"), "{found:?}");
        let found = messages(vec![package("tessera-engine", &["cudarc"])], &[]);
        assert!(found[0].contains("only device crates"), "{found:?}");
    }

    #[test]
    fn the_router_links_no_tensors_however_far_away() {
        let router = || vec![package("tessera-router", &["helper"])];
        let found = messages(
            router(),
            &[
                ("tessera-router", &["helper"]),
                ("helper", &["deeper"]),
                ("deeper", &["candle-core"]),
            ],
        );
        assert_eq!(
            found,
            ["crates/tessera-router/Cargo.toml:1: tessera-router must not link candle-core: \
              tessera-router → helper → deeper → candle-core"]
        );
        assert!(messages(router(), &[("tessera-router", &["helper"]), ("helper", &[])]).is_empty());
    }
}
