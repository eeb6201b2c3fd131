//! Content of a message: text, images and videos (as lists of frames), in OpenAI's form and that of
//! qwen-vl-utils. Media comes as `data:` URLs; nothing is fetched.

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use tessera_processor::{Content, ContentPart};

use super::fields::{Field, Fields};
use super::unknown::UnknownFields;
use crate::config::LimitsConfig;
use crate::error::RequestError;
use crate::request::{DEFAULT_FPS, MediaContent, MediaPart, MediaSource};

/// Standard alphabet, with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Parts of one message at most.
const MAX_PARTS: usize = 4096;

/// Reads `content`: a string or a list of parts. Media are appended to `media`.
pub(super) fn parse_content(
    field: &Field<'_>,
    limits: &LimitsConfig,
    unknown: &UnknownFields,
    media: &mut Vec<MediaPart>,
) -> Result<Content, RequestError> {
    if field.is_string() {
        return Ok(Content::Text(field.string()?.into_owned()));
    }
    if !field.is_list() {
        return Err(field.invalid("must be a string or a list of parts"));
    }
    let mut parts = Vec::new();
    for part in field.list(MAX_PARTS)? {
        parts.push(parse_part(&part, limits, unknown, media)?);
    }
    Ok(Content::Parts(parts))
}

fn parse_part(
    field: &Field<'_>,
    limits: &LimitsConfig,
    unknown: &UnknownFields,
    media: &mut Vec<MediaPart>,
) -> Result<ContentPart, RequestError> {
    let mut part = field.object()?;
    let kind = part.required("type")?;
    let parsed = match kind.string()?.as_ref() {
        "text" => ContentPart::Text(part.required("text")?.string()?.into_owned()),
        name @ ("image_url" | "image") => {
            media.push(parse_image(&mut part, name, unknown)?);
            ContentPart::Image
        }
        "video" => {
            media.push(parse_video(&mut part, limits)?);
            ContentPart::Video
        }
        "video_url" => {
            return Err(url_refused(
                &part.required("video_url")?,
                "videos by URL are not fetched; send a list of frames as {\"type\": \"video\"}",
            ));
        }
        other => {
            let feature = format!("a content part of type {other:.40?}");
            return Err(kind.unsupported(feature));
        }
    };
    if media.len() > limits.max_media_items {
        let limit = limits.max_media_items;
        return Err(field.invalid(format!("a request holds at most {limit} media items")));
    }
    unknown.note(&part);
    Ok(parsed)
}

/// `{"image_url": {"url": …, "detail": …}}`, or the URL itself. `detail` has no meaning here: the size
/// follows from the pixels.
fn parse_image(
    part: &mut Fields<'_>,
    name: &str,
    unknown: &UnknownFields,
) -> Result<MediaPart, RequestError> {
    let field = part.required(name)?;
    let mut bounds = PixelBounds::take(part)?;
    let url = match field.is_object() {
        false => field.clone(),
        true => {
            let mut inner = field.object()?;
            let url = inner.required("url")?;
            inner.take("detail");
            bounds = bounds.or(PixelBounds::take(&mut inner)?);
            unknown.note(&inner);
            url
        }
    };
    Ok(MediaPart {
        content: MediaContent::Image(parse_data_url(&url)?),
        field: url.path,
        min_pixels: bounds.min,
        max_pixels: bounds.max,
    })
}

/// `{"video": [data URL, …], "fps": 2.0}`; newer qwen-vl-utils say `sample_fps`.
fn parse_video(part: &mut Fields<'_>, limits: &LimitsConfig) -> Result<MediaPart, RequestError> {
    let field = part.required("video")?;
    if field.is_string() {
        return Err(url_refused(
            &field,
            "videos are not fetched; send a list of frames as data URLs",
        ));
    }
    let frames = field.list(limits.max_video_frames as usize)?;
    if frames.is_empty() {
        return Err(field.invalid("must hold at least one frame"));
    }
    let frames = frames.iter().map(parse_data_url).collect::<Result<_, _>>()?;
    let fps = match part.take("fps").or_else(|| part.take("sample_fps")) {
        None => DEFAULT_FPS,
        Some(fps) => fps.parse()?,
    };
    let bounds = PixelBounds::take(part)?;
    Ok(MediaPart {
        content: MediaContent::Video { frames, fps },
        field: field.path,
        min_pixels: bounds.min,
        max_pixels: bounds.max,
    })
}

struct PixelBounds {
    min: Option<u64>,
    max: Option<u64>,
}

impl PixelBounds {
    fn take(fields: &mut Fields<'_>) -> Result<Self, RequestError> {
        Ok(Self { min: fields.get("min_pixels")?, max: fields.get("max_pixels")? })
    }

    fn or(self, other: Self) -> Self {
        Self { min: self.min.or(other.min), max: self.max.or(other.max) }
    }
}

/// Decodes `data:[type];base64,…`. The type is not trusted: the bytes say what they are.
fn parse_data_url(field: &Field<'_>) -> Result<MediaSource, RequestError> {
    let url = field.string()?;
    decode_data_url(&url, &field.path).map(MediaSource::Bytes)
}

/// Bytes of a base64 `data:` URL.
///
/// # Errors
/// [`RequestError::MediaUrl`] for any other scheme, [`RequestError::Invalid`] for broken base64.
pub(crate) fn decode_data_url(url: &str, field: &str) -> Result<Bytes, RequestError> {
    let refused =
        |detail: String| RequestError::MediaUrl { field: field.to_owned(), detail: detail.into() };
    let scheme = url.split(':').next().unwrap_or("").to_ascii_lowercase();
    let rest = match (scheme.as_str(), url.get(5..)) {
        ("data", Some(rest)) => rest,
        ("http" | "https", _) => {
            return Err(refused(
                "fetching media is not enabled on this server; send a data URL".to_owned(),
            ));
        }
        ("file", _) => return Err(refused("local files are not read; send a data URL".to_owned())),
        _ => return Err(refused("must be a data URL".to_owned())),
    };
    let (kind, data) = rest
        .split_once(',')
        .ok_or_else(|| RequestError::invalid(field, "the data URL has no comma"))?;
    let is_base64 =
        kind.rsplit(';').next().is_some_and(|last| last.trim().eq_ignore_ascii_case("base64"));
    if !is_base64 {
        return Err(RequestError::invalid(field, "the data URL must be base64"));
    }
    decode_base64(data).map_err(|_| RequestError::invalid(field, "the base64 data are broken"))
}

/// Some encoders break lines; only then is a copy made.
fn decode_base64(data: &str) -> Result<Bytes, base64::DecodeError> {
    let decoded = match data.bytes().any(|byte| byte.is_ascii_whitespace()) {
        false => BASE64.decode(data),
        true => BASE64.decode(data.split_ascii_whitespace().collect::<String>()),
    };
    decoded.map(Bytes::from)
}

fn url_refused(field: &Field<'_>, detail: &'static str) -> RequestError {
    RequestError::MediaUrl { field: field.path.clone(), detail: detail.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(json: &str) -> Result<Vec<MediaPart>, RequestError> {
        let body = format!("{{\"content\": {json}}}");
        let mut fields = Fields::from_body(body.as_bytes()).expect("test bodies are JSON");
        let field = fields.take("content").expect("content");
        let (limits, unknown) = (LimitsConfig::default(), UnknownFields::default());
        let mut media = Vec::new();
        parse_content(&field, &limits, &unknown, &mut media)?;
        Ok(media)
    }

    fn media(json: &str) -> MediaPart {
        content(json).expect("is accepted").pop().expect("holds media")
    }

    #[test]
    fn images_come_in_three_spellings() {
        let expected = MediaContent::Image(MediaSource::Bytes(Bytes::from_static(b"hi!")));
        for json in [
            r#"[{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGkh", "detail": "low"}}]"#,
            r#"[{"type": "image_url", "image_url": "data:;base64,aGkh"}]"#,
            r#"[{"type": "image", "image": "DATA:image/png;charset=x;BASE64,aG\nkh"}]"#,
        ] {
            assert_eq!(media(json).content, expected, "{json}");
        }
    }

    #[test]
    fn pixel_bounds_stand_in_the_part_or_beside_the_url() {
        let beside = media(
            r#"[{"type": "image_url", "image_url": {"url": "data:;base64,aGkh", "max_pixels": 9}, "min_pixels": 3}]"#,
        );
        assert_eq!((beside.min_pixels, beside.max_pixels), (Some(3), Some(9)));
    }

    #[test]
    fn a_video_is_a_list_of_frames() {
        let video = media(
            r#"[{"type": "video", "video": ["data:;base64,aGkh", "data:;base64,aGk"], "fps": 0.7}]"#,
        );
        match video.content {
            MediaContent::Video { frames, fps } => {
                assert_eq!((frames.len(), fps), (2, 0.7));
                assert_eq!(frames[1], MediaSource::Bytes(Bytes::from_static(b"hi")));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_number_of_media_items_is_bounded() {
        let image = r#"{"type": "image", "image": "data:;base64,aGkh"}"#;
        let limit = LimitsConfig::default().max_media_items;
        let list = |num| format!("[{}]", vec![image; num].join(","));
        assert_eq!(content(&list(limit)).expect("fits").len(), limit);
        assert!(content(&list(limit + 1)).is_err());
    }

    #[test]
    fn every_other_url_is_refused_by_type_and_path() {
        for url in [
            "http://example.com/a.png",
            "https://10.0.0.1/a.png",
            "HTTPS://169.254.169.254/latest",
            "file:///etc/passwd",
            "ftp://x/y",
            "/etc/passwd",
            "",
        ] {
            let json = format!(r#"[{{"type": "image_url", "image_url": {{"url": "{url}"}}}}]"#);
            let error = content(&json).expect_err(url);
            assert!(matches!(error, RequestError::MediaUrl { .. }), "{url}: {error}");
            assert_eq!(error.field(), Some("content[0].image_url.url"));
        }
        for json in [
            r#"[{"type": "video_url", "video_url": {"url": "http://x/y.mp4"}}]"#,
            r#"[{"type": "video", "video": "file:///a.mp4"}]"#,
        ] {
            let error = content(json).expect_err(json);
            assert!(matches!(error, RequestError::MediaUrl { .. }), "{json}: {error}");
        }
    }

    #[test]
    fn broken_parts_are_refused_by_path() {
        let cases = [
            ("7", "content"),
            (r#"[7]"#, "content[0]"),
            (r#"[{}]"#, "content[0].type"),
            (r#"[{"type": "text"}]"#, "content[0].text"),
            (r#"[{"type": "text", "text": 7}]"#, "content[0].text"),
            (r#"[{"type": "input_audio"}]"#, "content[0].type"),
            (r#"[{"type": "image_url", "image_url": {}}]"#, "content[0].image_url.url"),
            (r#"[{"type": "image_url", "image_url": "data:;base64"}]"#, "content[0].image_url"),
            (r#"[{"type": "image_url", "image_url": "data:,abc"}]"#, "content[0].image_url"),
            (r#"[{"type": "image_url", "image_url": "data:;base64,a!"}]"#, "content[0].image_url"),
            (r#"[{"type": "video", "video": []}]"#, "content[0].video"),
            (
                r#"[{"type": "video", "video": ["data:;base64,aGkh"], "fps": "2"}]"#,
                "content[0].fps",
            ),
            (
                r#"[{"type": "image", "image": "data:;base64,aGkh", "min_pixels": -1}]"#,
                "content[0].min_pixels",
            ),
        ];
        for (json, field) in cases {
            let error = content(json).expect_err(json);
            assert_eq!(error.field(), Some(field), "{json}: {error}");
        }
    }
}
