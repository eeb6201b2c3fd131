//! What a grammar's text may hold. The library bounds most of its own work; these are the places where it
//! takes time and memory that grow with the square of the text, or recurses.

use serde_json::Value;

use super::GrammarError;

/// Longest regular expression, and the sum of all in one schema or grammar, in bytes. Twice as many optional
/// parts take four times as long: at this bound a second and 200 MB.
pub(super) const MAX_EXPRESSION_BYTES: usize = 16 << 10;
/// Deepest nesting of brackets in a text that is parsed by recursion.
const MAX_NESTING: usize = 128;
/// `multipleOf` becomes an automaton with as many states.
const MAX_MULTIPLE: f64 = 10_000.0;

/// Checks a regular expression.
///
/// # Errors
/// [`GrammarError::Invalid`], as for all checks here.
pub(super) fn expression(text: &str) -> Result<(), GrammarError> {
    nesting(text)?;
    length(text.len())
}

/// Checks a JSON schema.
pub(super) fn schema(schema: &Value) -> Result<(), GrammarError> {
    length(pattern_bytes(schema)?)
}

/// Checks rules in Lark: the schemas in them as such, and the rest like one expression.
pub(super) fn lark(text: &str) -> Result<(), GrammarError> {
    const MARK: &str = "%json";
    nesting(text)?;
    let (mut rest, mut num_bytes) = (text, 0);
    while let Some(at) = rest.find(MARK) {
        num_bytes += at;
        rest = &rest[at + MARK.len()..];
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        // What is no JSON the library refuses in its own words.
        if let Some(Ok(value)) = values.next() {
            num_bytes += pattern_bytes(&value)?;
            rest = &rest[values.byte_offset()..];
        }
    }
    length(num_bytes + rest.len())
}

/// Bytes of all regular expressions in a schema.
fn pattern_bytes(schema: &Value) -> Result<usize, GrammarError> {
    match schema {
        Value::Array(items) => items.iter().map(pattern_bytes).sum(),
        Value::Object(members) => {
            let mut num_bytes = 0;
            for (name, value) in members {
                num_bytes += pattern_bytes(value)?;
                num_bytes += match (name.as_str(), value) {
                    ("pattern", Value::String(pattern)) => pattern.len(),
                    ("patternProperties", Value::Object(of)) => of.keys().map(String::len).sum(),
                    ("multipleOf", Value::Number(number)) => {
                        multiple(number.as_f64())?;
                        0
                    }
                    _ => 0,
                };
            }
            Ok(num_bytes)
        }
        _ => Ok(0),
    }
}

fn multiple(of: Option<f64>) -> Result<(), GrammarError> {
    match of {
        Some(of) if (1.0 / MAX_MULTIPLE..=MAX_MULTIPLE).contains(&of) => Ok(()),
        _ => invalid(format!("multipleOf must lie between 1 / {MAX_MULTIPLE} and {MAX_MULTIPLE}")),
    }
}

fn length(num_bytes: usize) -> Result<(), GrammarError> {
    match num_bytes <= MAX_EXPRESSION_BYTES {
        true => Ok(()),
        false => invalid(format!(
            "its expressions have {num_bytes} bytes, more than {MAX_EXPRESSION_BYTES}"
        )),
    }
}

fn nesting(text: &str) -> Result<(), GrammarError> {
    let mut depth = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return invalid(format!("brackets are nested more than {MAX_NESTING} deep"));
        }
    }
    Ok(())
}

fn invalid<T>(reason: String) -> Result<T, GrammarError> {
    Err(GrammarError::Invalid { reason })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn expressions_are_bounded_wherever_they_stand() {
        let long = "a?".repeat(MAX_EXPRESSION_BYTES / 2);
        assert!(expression(&long).is_ok() && expression(&format!("{long}b")).is_err());
        let nested = |pattern: &str| json!({"items": [{"type": "string", "pattern": pattern}]});
        assert!(schema(&nested(&long)).is_ok() && schema(&nested(&format!("{long}b"))).is_err());
        let twice = json!({"a": nested(&long[1..]), "patternProperties": {"bb": true}});
        assert!(schema(&twice).is_err());
        let rules = |filler: &str, pattern: &str| {
            format!("start: \"{filler}\" %json {} \"x\"", nested(pattern))
        };
        assert!(lark(&rules("", &long[64..])).is_ok());
        assert!(lark(&rules(&long[..64], &long[64..])).is_err());
        let large = json!({"description": "x".repeat(100_000)});
        assert!(lark(&format!("start: %json {large}")).is_ok(), "schemas may be large");
        assert!(lark("start: %json {").is_ok(), "the library says what is wrong with it");
        assert!(lark(&"(".repeat(200)).is_err());
    }

    #[test]
    fn multiples_are_bounded() {
        assert!(schema(&json!({"multipleOf": 0.01})).is_ok());
        assert!(schema(&json!({"properties": {"n": {"multipleOf": 1_000_003}}})).is_err());
        assert!(schema(&json!({"multipleOf": 1e-9})).is_err());
    }
}
