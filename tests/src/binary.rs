//! The program under test: the one beside the running test, so that profile and target directory agree.

use std::path::PathBuf;

/// Path of `tessera`.
///
/// # Panics
/// When it was not built.
pub fn tessera() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own file");
    // target/<profile>/deps/e2e-<hash>
    let profile = test.ancestors().nth(2).expect("tests lie in target/<profile>/deps");
    let program = profile.join("tessera");
    assert!(
        program.is_file(),
        "{} is missing: run `cargo build -p tessera` first",
        program.display()
    );
    program
}
