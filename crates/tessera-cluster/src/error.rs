//! What can be wrong with data that comes from outside: names, keys, records, settings.

/// Refusal of malformed input. Protocol outcomes are not errors; they are actions of the machines.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("{kind} name {name:?} must be 1 to 63 characters of a-z, 0-9 and '-'")]
    InvalidName { kind: &'static str, name: String },
    #[error("{record} record is not valid JSON of its schema")]
    MalformedRecord {
        record: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("{record} record has schema {found}, newer than {supported} which this build reads")]
    SchemaTooNew { record: &'static str, found: u64, supported: u32 },
    #[error("{record} record contradicts itself: {detail}")]
    InconsistentRecord { record: &'static str, detail: String },
    #[error("setting {field} is out of range: {detail}")]
    InvalidConfig { field: &'static str, detail: String },
}
