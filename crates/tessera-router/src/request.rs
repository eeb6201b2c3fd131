//! A chat request as both faces hand it to the pipeline: parsed and bounded, not yet rendered. Absent
//! sampling fields take the checkpoint's defaults in [`tessera_processor::SamplingOverrides`].

use std::time::Duration;

use bytes::Bytes;
use tessera_processor::{ChatPrompt, Content, ContentPart, Message, SamplingOverrides, ToolUse};
use tessera_types::{MediaId, TenantId};
use tokio::time::Instant;

use crate::config::LimitsConfig;
use crate::error::RequestError;

/// Longest request id that a client may choose, in bytes.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// Header and metadata key that name the tenant.
pub const TENANT_HEADER: &str = "x-tenant-id";
/// Longest name of a tenant in bytes.
const MAX_TENANT_BYTES: usize = 128;
/// Largest priority, and the least one's amount.
const MAX_PRIORITY: i32 = 1000;

/// The tenant of this name, as decoders know it: the first 64 bits of the name's BLAKE3 hash. Absent or
/// empty: everyone without one.
///
/// # Errors
/// A name that is too long or holds anything but visible ASCII.
pub fn tenant_id(name: Option<&[u8]>) -> Result<TenantId, RequestError> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Ok(TenantId::default());
    };
    if name.len() > MAX_TENANT_BYTES || !name.iter().all(u8::is_ascii_graphic) {
        let detail = format!("must be 1 to {MAX_TENANT_BYTES} visible ASCII characters");
        return Err(RequestError::invalid(TENANT_HEADER, detail));
    }
    let hash = blake3::hash(name);
    let (first, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    // 0 means no tenant.
    Ok(TenantId(u64::from_le_bytes(*first).max(1)))
}

/// Bounds `priority`.
///
/// # Errors
/// [`RequestError::Invalid`] naming `priority`.
pub fn check_priority(priority: i64) -> Result<i32, RequestError> {
    let bounded =
        i32::try_from(priority).ok().filter(|p| (-MAX_PRIORITY..=MAX_PRIORITY).contains(p));
    bounded.ok_or_else(|| {
        let detail = format!("must be a whole number in [-{MAX_PRIORITY}, {MAX_PRIORITY}]");
        RequestError::invalid("priority", detail)
    })
}

/// `given` if it is fit for logs and headers, else a new random id.
pub fn request_id(given: &str) -> String {
    let is_fit = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    match !given.is_empty() && given.len() <= MAX_REQUEST_ID_BYTES && given.chars().all(is_fit) {
        true => given.to_owned(),
        false => uuid::Uuid::new_v4().simple().to_string(),
    }
}

/// What a client asked for.
#[derive(Debug, Clone)]
pub struct ChatRequest {
    /// Echoed in replies, logs and errors.
    pub request_id: String,
    /// When the first byte was seen; limits count from here.
    pub arrival: Instant,
    /// Name of the model; empty means the one that is served.
    pub model: String,
    /// The conversation; its media parts mark the places of `media`.
    pub chat: ChatPrompt,
    /// Images and videos in order of appearance.
    pub media: Vec<MediaPart>,
    pub sampling: SamplingOverrides,
    /// Where the client put `sampling.grammar`, for errors.
    pub grammar_field: String,
    pub tool_use: ToolUse,
    /// As in vLLM, lower goes first.
    pub priority: i32,
    pub tenant: TenantId,
    /// Absent: drawn at admission.
    pub seed: Option<u64>,
    /// Number of choices, at least 1.
    pub num_choices: u32,
    /// Stop strings.
    pub stop: Vec<String>,
    pub return_token_ids: bool,
    /// Absent: the server's.
    pub timeout: Option<Duration>,
}

/// An image, or a video as a list of frames.
#[derive(Debug, Clone, PartialEq)]
pub struct MediaPart {
    /// Where the part stands in the request, for errors.
    pub field: String,
    pub content: MediaContent,
    /// Bounds on height × width after resizing, in pixels (per frame for videos).
    pub min_pixels: Option<u64>,
    pub max_pixels: Option<u64>,
}

/// The bytes of a media part, or their names.
#[derive(Debug, Clone, PartialEq)]
pub enum MediaContent {
    Image(MediaSource),
    Video {
        frames: Vec<MediaSource>,
        /// Frames per second of the list.
        fps: f64,
    },
}

/// Frames per second of a list that does not say.
pub const DEFAULT_FPS: f64 = 2.0;

/// Where bytes come from.
#[derive(Debug, Clone, PartialEq)]
pub enum MediaSource {
    /// The file as sent.
    Bytes(Bytes),
    /// An earlier upload.
    Uploaded(MediaId),
}

impl MediaPart {
    /// The image, or all frames.
    pub fn sources(&self) -> &[MediaSource] {
        match &self.content {
            MediaContent::Image(image) => std::slice::from_ref(image),
            MediaContent::Video { frames, .. } => frames,
        }
    }
}

impl ChatRequest {
    /// Bytes of text and media, the measure of how much work hashing and tokenizing is.
    pub fn num_bytes(&self) -> usize {
        let part = |part: &ContentPart| match part {
            ContentPart::Text(text) => text.len(),
            ContentPart::Image | ContentPart::Video => 0,
        };
        let message = |message: &Message| match &message.content {
            Content::Text(text) => text.len(),
            Content::Parts(parts) => parts.iter().map(part).sum(),
        };
        let source = |source: &MediaSource| match source {
            MediaSource::Bytes(bytes) => bytes.len(),
            MediaSource::Uploaded(_) => 0,
        };
        let text: usize = self.chat.messages.iter().map(message).sum();
        text + self.media.iter().flat_map(MediaPart::sources).map(source).sum::<usize>()
    }
}

/// Bounds `n`.
///
/// # Errors
/// [`RequestError::Invalid`] naming `n`.
pub fn check_num_choices(n: u32, limits: &LimitsConfig) -> Result<u32, RequestError> {
    match (1..=limits.max_choices).contains(&n) {
        true => Ok(n),
        false => {
            let detail = format!("must be a whole number in [1, {}]", limits.max_choices);
            Err(RequestError::invalid("n", detail))
        }
    }
}

/// Checks that a tool is `{"type": "function", "function": {"name": …}}`.
///
/// # Errors
/// [`RequestError::Invalid`] naming `field`.
pub fn check_tool(tool: serde_json::Value, field: &str) -> Result<serde_json::Value, RequestError> {
    let is_function = tool.get("type").and_then(|kind| kind.as_str()) == Some("function");
    let name = tool.get("function").and_then(|function| function.get("name"));
    match (is_function, name.and_then(|name| name.as_str())) {
        (true, Some(name)) if !name.is_empty() => Ok(tool),
        _ => {
            let form = "must be {\"type\": \"function\", \"function\": {\"name\": …}}";
            Err(RequestError::invalid(field, form))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_are_told_apart_by_name_and_bounded() {
        let id = |name: &str| tenant_id(Some(name.as_bytes()));
        assert_eq!(tenant_id(None).ok(), Some(TenantId(0)));
        assert_eq!(id("").ok(), Some(TenantId(0)));
        let [a, b] = ["a", "b"].map(|name| id(name).expect("a name"));
        assert!(a != b && a != TenantId(0) && id("a").ok() == Some(a));
        for name in ["a b", "é", "a\n", &"x".repeat(MAX_TENANT_BYTES + 1)] {
            assert_eq!(id(name).expect_err(name).field(), Some(TENANT_HEADER));
        }
    }

    #[test]
    fn priorities_are_bounded() {
        assert_eq!(check_priority(-1000).ok(), Some(-1000));
        for priority in [-1001, 1001, i64::MIN, i64::MAX, i64::from(i32::MIN)] {
            assert_eq!(check_priority(priority).expect_err("too large").field(), Some("priority"));
        }
    }

    #[test]
    fn only_plain_request_ids_are_taken_over() {
        assert_eq!(request_id("abc-1_2.3:4"), "abc-1_2.3:4");
        for given in ["", "a b", "a\nb", "é", &"x".repeat(MAX_REQUEST_ID_BYTES + 1)] {
            let id = request_id(given);
            assert!(id != given && id.len() == 32, "{given:?} gave {id}");
        }
    }
}
