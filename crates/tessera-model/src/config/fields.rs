//! Typed access to one JSON object, with errors that name file and field.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// Largest size a field may give: far above any model, far below what would overflow a product.
const MAX_SIZE: u64 = 1 << 24;

/// One object of a config file.
pub(super) struct Fields<'a> {
    file: &'a Path,
    /// Path of the object, with a trailing dot, or empty.
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a Path, prefix: &str, value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { file, prefix: prefix.to_owned(), map }),
            _ => Err(ModelError::Config {
                file: file.to_owned(),
                field: prefix.trim_end_matches('.').to_owned(),
                reason: "must be an object".to_owned(),
            }),
        }
    }

    pub(super) fn wrong(&self, field: &str, reason: String) -> ModelError {
        let field = format!("{}{field}", self.prefix);
        ModelError::Config { file: self.file.to_owned(), field, reason }
    }

    pub(super) fn missing(&self, field: &str) -> ModelError {
        self.wrong(field, "is missing".to_owned())
    }

    pub(super) fn unsupported(&self, field: &str, what: &str) -> ModelError {
        let (file, field) = (self.file.to_owned(), format!("{}{field}", self.prefix));
        ModelError::Unsupported { file, field, what: what.to_owned() }
    }

    pub(super) fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.missing(field))
    }

    /// A field that is there and not null.
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn section(&self, field: &str) -> Result<Option<Fields<'a>>> {
        let prefix = format!("{}{field}.", self.prefix);
        self.get(field).map(|value| Fields::new(self.file, &prefix, value)).transpose()
    }

    pub(super) fn string(&self, field: &str) -> Result<Option<&'a str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(field, "must be a string".to_owned())),
        }
    }

    pub(super) fn strings(&self, field: &str) -> Result<Vec<&'a str>> {
        let text = |value: &'a Value| {
            value.as_str().ok_or_else(|| self.wrong(field, "must be a list of strings".to_owned()))
        };
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(value) => {
                let list = value.as_array();
                let list =
                    list.ok_or_else(|| self.wrong(field, "must be a list of strings".to_owned()))?;
                list.iter().map(text).collect()
            }
        }
    }

    pub(super) fn boolean(&self, field: &str) -> Result<Option<bool>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.wrong(field, "must be true or false".to_owned())),
        }
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite() && *number > 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(field, format!("must be a number above 0, is {value}"))),
        }
    }

    /// A whole number from 1 on.
    pub(super) fn size(&self, field: &str) -> Result<Option<usize>> {
        self.get(field).map(|value| self.whole(field, value, 1)).transpose()
    }

    /// A list of whole numbers from 1 on.
    pub(super) fn sizes(&self, field: &str) -> Result<Option<Vec<usize>>> {
        self.list(field, 1)
    }

    /// A list of whole numbers from 0 on.
    pub(super) fn indices(&self, field: &str) -> Result<Option<Vec<usize>>> {
        self.list(field, 0)
    }

    fn list(&self, field: &str, least: u64) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array();
        let list =
            list.ok_or_else(|| self.wrong(field, "must be a list of whole numbers".to_owned()))?;
        list.iter().map(|value| self.whole(field, value, least)).collect::<Result<_>>().map(Some)
    }

    fn whole(&self, field: &str, value: &Value, least: u64) -> Result<usize> {
        match value.as_u64().filter(|number| (least..=MAX_SIZE).contains(number)) {
            Some(number) => Ok(number as usize),
            None => {
                let reason = format!("must be a whole number in [{least}, {MAX_SIZE}], is {value}");
                Err(self.wrong(field, reason))
            }
        }
    }

    /// a / b, which must leave nothing over.
    pub(super) fn divide(&self, field: &str, a: usize, by: &str, b: usize) -> Result<usize> {
        match a.is_multiple_of(b) {
            true => Ok(a / b),
            false => Err(self.wrong(field, format!("is {a}, which {by} {b} does not divide"))),
        }
    }
}
