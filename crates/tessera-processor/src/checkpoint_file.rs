//! One JSON file of a checkpoint, with errors that name the file and the field.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::CheckpointError;

/// A parsed file. Fields are named by their path, for example `text_config.hidden_size`.
pub(crate) struct CheckpointFile {
    path: PathBuf,
    value: Value,
}

impl CheckpointFile {
    /// Reads `name` in `directory`.
    pub fn read(directory: &Path, name: &str) -> Result<Self, CheckpointError> {
        let path = directory.join(name);
        let bytes = read_bytes(&path)?;
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Self { path, value }),
            Err(source) => Err(CheckpointError::Json { file: path, source }),
        }
    }

    /// Like [`Self::read`], with an absent file read as an empty object.
    pub fn read_if_present(directory: &Path, name: &str) -> Result<Self, CheckpointError> {
        match directory.join(name).exists() {
            true => Self::read(directory, name),
            false => {
                Ok(Self { path: directory.join(name), value: Value::Object(Default::default()) })
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The field at a dotted path; null counts as absent.
    pub fn get(&self, field: &str) -> Option<&Value> {
        let found = field.split('.').try_fold(&self.value, |value, key| value.get(key));
        found.filter(|value| !value.is_null())
    }

    /// The first of several places where a field may stand.
    pub fn get_any<'f>(&self, fields: &[&'f str]) -> Option<(&'f str, &Value)> {
        fields.iter().find_map(|&field| Some((field, self.get(field)?)))
    }

    /// A non-negative integer, if the field is there.
    pub fn integer(&self, fields: &[&str]) -> Result<Option<u64>, CheckpointError> {
        let Some((field, value)) = self.get_any(fields) else { return Ok(None) };
        match value.as_u64() {
            Some(integer) => Ok(Some(integer)),
            None => {
                Err(self.invalid(field, format!("must be a non-negative integer, got {value}")))
            }
        }
    }

    /// An integer that fits 32 bits, if the field is there.
    pub fn u32(&self, fields: &[&str]) -> Result<Option<u32>, CheckpointError> {
        let Some(integer) = self.integer(fields)? else { return Ok(None) };
        let (field, _) = self.get_any(fields).expect("the integer came from one of the fields");
        match u32::try_from(integer) {
            Ok(integer) => Ok(Some(integer)),
            Err(_) => Err(self.invalid(field, format!("must fit 32 bits, got {integer}"))),
        }
    }

    /// An integer that fits 32 bits and must be there.
    pub fn required_u32(&self, fields: &[&str]) -> Result<u32, CheckpointError> {
        self.u32(fields)?.ok_or_else(|| self.missing(fields[0]))
    }

    /// A number, if the field is there.
    pub fn number(&self, fields: &[&str]) -> Result<Option<f64>, CheckpointError> {
        let Some((field, value)) = self.get_any(fields) else { return Ok(None) };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(self.invalid(field, format!("must be a number, got {value}"))),
        }
    }

    /// A list of three numbers, if the field is there.
    pub fn triple(&self, field: &str) -> Result<Option<[f64; 3]>, CheckpointError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let numbers: Option<Vec<f64>> =
            value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        match numbers.and_then(|list| <[f64; 3]>::try_from(list).ok()) {
            Some(triple) => Ok(Some(triple)),
            None => Err(self.invalid(field, format!("must be a list of 3 numbers, got {value}"))),
        }
    }

    pub fn missing(&self, field: &str) -> CheckpointError {
        CheckpointError::MissingField { file: self.path.clone(), field: field.to_owned() }
    }

    pub fn invalid(&self, field: &str, problem: impl Into<String>) -> CheckpointError {
        let (file, field) = (self.path.clone(), field.to_owned());
        CheckpointError::InvalidField { file, field, problem: problem.into() }
    }
}

pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    std::fs::read(path).map_err(|source| CheckpointError::Read { file: path.to_owned(), source })
}
