//! Fields that clients send and this server does not know: ignored, and logged once per name.

use std::collections::HashSet;
use std::sync::Mutex;

use super::fields::Fields;

/// Names remembered; beyond that the client sends noise.
const MAX_NAMES: usize = 256;
/// Longest name that is logged, in characters.
const MAX_NAME_CHARS: usize = 80;

/// What was logged already.
#[derive(Debug, Default)]
pub(crate) struct UnknownFields {
    names: Mutex<HashSet<String>>,
}

impl UnknownFields {
    /// Logs what is left over in `fields`, each name once in the life of the process.
    pub(crate) fn note(&self, fields: &Fields<'_>) {
        for path in fields.left_over() {
            let name = without_indices(&path);
            if self.is_new(&name) {
                tracing::info!(field = name, "unknown request field ignored");
            }
        }
    }

    fn is_new(&self, name: &str) -> bool {
        let mut names = self.names.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        names.len() < MAX_NAMES && names.insert(name.to_owned())
    }
}

/// `messages[3].content[0].x` and `messages[0].content[1].x` are one field.
fn without_indices(path: &str) -> String {
    let mut name = String::new();
    let mut inside = false;
    for c in path.chars().take(MAX_NAME_CHARS) {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            _ if inside => continue,
            _ => {
                name.push(c);
                continue;
            }
        }
        name.push(c);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_new_once_and_the_memory_is_bounded() {
        let unknown = UnknownFields::default();
        let name = without_indices("messages[12].content[0].cache_control");
        assert_eq!(name, "messages[].content[].cache_control");
        assert!(unknown.is_new(&name));
        assert!(!unknown.is_new(&name));
        for i in 0..2 * MAX_NAMES {
            unknown.is_new(&i.to_string());
        }
        assert!(!unknown.is_new("one more"));
    }
}
