//! Reads JSON objects field by field, so that every complaint names the path of the field at fault and
//! unknown fields are seen. Large strings (data URLs) are borrowed from the body, not copied.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::RequestError;

/// Fields of one object; ours have about forty.
const MAX_FIELDS: usize = 1024;

/// The fields of one JSON object that have not been taken yet.
pub(crate) struct Fields<'a> {
    /// Path of the object, empty for the body itself.
    path: String,
    entries: Vec<(Cow<'a, str>, &'a RawValue)>,
}

/// A value and its path.
#[derive(Clone)]
pub(crate) struct Field<'a> {
    pub(crate) path: String,
    raw: &'a RawValue,
}

impl<'a> Fields<'a> {
    /// Splits a whole body.
    pub(crate) fn from_body(body: &'a [u8]) -> Result<Self, RequestError> {
        let entries: Entries<'a> = serde_json::from_slice(body).map_err(RequestError::Json)?;
        Ok(Self { path: String::new(), entries: entries.0 })
    }

    /// Takes a field out; `null` counts as absent. A doubled field takes its last value.
    pub(crate) fn take(&mut self, name: &str) -> Option<Field<'a>> {
        let mut found = None;
        self.entries.retain(|(key, raw)| {
            let hit = key == name;
            if hit {
                found = Some(*raw);
            }
            !hit
        });
        let raw = found.filter(|raw| raw.get() != "null")?;
        Some(Field { path: self.path_of(name), raw })
    }

    /// Takes a field of a plain type.
    pub(crate) fn get<T: DeserializeOwned>(
        &mut self,
        name: &str,
    ) -> Result<Option<T>, RequestError> {
        self.take(name).map(|field| field.parse()).transpose()
    }

    /// Takes a field that must be there.
    pub(crate) fn required(&mut self, name: &str) -> Result<Field<'a>, RequestError> {
        self.take(name).ok_or_else(|| RequestError::invalid(self.path_of(name), "is required"))
    }

    /// Paths of what was not taken.
    pub(crate) fn left_over(&self) -> impl Iterator<Item = String> {
        self.entries.iter().map(|(key, _)| self.path_of(key))
    }

    fn path_of(&self, name: &str) -> String {
        match self.path.is_empty() {
            true => name.to_owned(),
            false => format!("{}.{name}", self.path),
        }
    }
}

impl<'a> Field<'a> {
    /// Reads the value as `T`.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, RequestError> {
        serde_json::from_str(self.raw.get()).map_err(|error| self.invalid(plain(&error)))
    }

    /// Reads a string, borrowed from the body unless it holds escapes.
    pub(crate) fn string(&self) -> Result<Cow<'a, str>, RequestError> {
        let text = self.raw.get();
        let inner = text
            .strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'))
            .ok_or_else(|| self.invalid("must be a string"))?;
        match inner.contains('\\') {
            false => Ok(Cow::Borrowed(inner)),
            true => self.parse().map(Cow::Owned),
        }
    }

    /// Reads an object.
    pub(crate) fn object(&self) -> Result<Fields<'a>, RequestError> {
        if !self.is_object() {
            return Err(self.invalid("must be an object"));
        }
        let entries: Entries<'a> =
            serde_json::from_str(self.raw.get()).map_err(|error| self.invalid(plain(&error)))?;
        Ok(Fields { path: self.path.clone(), entries: entries.0 })
    }

    /// Reads a list of at most `limit` entries.
    pub(crate) fn list(&self, limit: usize) -> Result<Vec<Field<'a>>, RequestError> {
        if !self.is_list() {
            return Err(self.invalid("must be a list"));
        }
        let values: Vec<&'a RawValue> =
            serde_json::from_str(self.raw.get()).map_err(|error| self.invalid(plain(&error)))?;
        if values.len() > limit {
            let got = values.len();
            return Err(self.invalid(format!("takes at most {limit} entries, got {got}")));
        }
        let entry =
            |(i, raw): (usize, &'a RawValue)| Field { path: format!("{}[{i}]", self.path), raw };
        Ok(values.into_iter().enumerate().map(entry).collect())
    }

    pub(crate) fn is_string(&self) -> bool {
        self.raw.get().starts_with('"')
    }

    pub(crate) fn is_list(&self) -> bool {
        self.raw.get().starts_with('[')
    }

    pub(crate) fn is_object(&self) -> bool {
        self.raw.get().starts_with('{')
    }

    /// A complaint about this field.
    pub(crate) fn invalid(&self, detail: impl Into<String>) -> RequestError {
        RequestError::invalid(self.path.clone(), detail)
    }

    /// A refusal of this field as a known feature.
    pub(crate) fn unsupported(&self, feature: impl Into<String>) -> RequestError {
        RequestError::Unsupported { field: self.path.clone(), feature: feature.into() }
    }
}

/// serde's message without its position, which counts from the start of the field and would mislead.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

struct Entries<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some((Key(key), value)) = map.next_entry()? {
            if entries.len() == MAX_FIELDS {
                return Err(serde::de::Error::custom("too many fields"));
            }
            entries.push((key, value));
        }
        Ok(Entries(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_the_field_at_fault() {
        let body = br#"{"a": {"b": [1, {"c": "x"}]}, "d": null, "e": "p\n"}"#;
        let mut fields = Fields::from_body(body).expect("an object");
        assert!(fields.take("d").is_none());
        assert_eq!(fields.take("e").expect("e").string().expect("text"), "p\n");
        let mut a = fields.take("a").expect("a").object().expect("object");
        let list = a.take("b").expect("b").list(2).expect("list");
        let mut inner = list[1].object().expect("object");
        let c = inner.take("c").expect("c");
        assert_eq!(c.path, "a.b[1].c");
        let error = c.parse::<u32>().expect_err("is text");
        assert_eq!(error.field(), Some("a.b[1].c"));
        assert!(!error.message().contains("line"), "{error}");
        assert_eq!(fields.left_over().count(), 0);
    }

    #[test]
    fn strings_without_escapes_are_borrowed() {
        let body = br#"{"a": "plain", "b": "esc\"aped"}"#;
        let mut fields = Fields::from_body(body).expect("an object");
        let a = fields.take("a").expect("a").string().expect("text");
        assert!(matches!(a, Cow::Borrowed("plain")));
        let b = fields.take("b").expect("b").string().expect("text");
        assert_eq!(b, "esc\"aped");
    }

    #[test]
    fn nesting_without_end_is_refused_where_it_is_read() {
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let mut fields = Fields::from_body(deep.as_bytes()).expect("an object");
        let field = fields.take("a").expect("a");
        assert!(field.parse::<serde_json::Value>().is_err());
    }

    #[test]
    fn broken_bodies_are_typed_errors() {
        let many = format!("{{{}\"z\": 1}}", "\"k\": 1,".repeat(MAX_FIELDS));
        for body in ["", "[]", "1", "{", "{\"a\": NaN}", "{\"a\": 1} x", "\u{feff}{}", &many] {
            let error = Fields::from_body(body.as_bytes()).err();
            assert!(matches!(error, Some(RequestError::Json(_))), "{body:.20}");
        }
        assert!(Fields::from_body(b"{\"a\": \"\xff\"}").is_err());
    }
}
