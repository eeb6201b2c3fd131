//! From rendered text to the expanded prompt: token ids, where visual rows go, and M-RoPE positions.

use tessera_types::{MediaKind, MediaSpan, PositionSpan, Prompt, TokenId};

use crate::config::ProcessorConfig;
use crate::describe::MediaDescription;
use crate::error::ProcessorError;
use crate::keys::{VisionIdentity, embedding_key};
use crate::template::Rendered;
use crate::tokenizer::Tokenizer;

/// Token ids with one placeholder per media item, and where those stand.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ShortPrompt {
    pub tokens: Vec<TokenId>,
    /// Index of each placeholder in `tokens`.
    pub placeholders: Vec<usize>,
}

/// Tokenizes rendered text: added tokens where the template wrote them, everything between two of them
/// as one run of plain text, so that merges across the edge of client and template text are those of
/// the whole.
pub(crate) fn tokenize(
    rendered: &Rendered,
    tokenizer: &Tokenizer,
    config: &ProcessorConfig,
) -> Result<ShortPrompt, ProcessorError> {
    let mut short = ShortPrompt { tokens: Vec::new(), placeholders: Vec::new() };
    let mut rest = rendered.text.as_str();
    while let Some((range, id)) = tokenizer.find_added(rest) {
        let plain = rendered.stand_ins.reveal(&rest[..range.start]);
        tokenizer.encode_plain(&plain, &mut short.tokens)?;
        if id == config.special.image_pad || id == config.special.video_pad {
            short.placeholders.push(short.tokens.len());
        }
        short.tokens.push(id);
        rest = &rest[range.end..];
    }
    tokenizer.encode_plain(&rendered.stand_ins.reveal(rest), &mut short.tokens)?;
    Ok(short)
}

/// Expands each placeholder to the tokens of its item.
///
/// # Errors
/// Placeholders and items that do not match in number or kind, and prompts that leave no room for a
/// reply.
pub(crate) fn expand(
    short: &ShortPrompt,
    media: &[MediaDescription],
    vision: &VisionIdentity,
    config: &ProcessorConfig,
) -> Result<Prompt, ProcessorError> {
    if short.placeholders.len() != media.len() {
        let (parts, found) = (media.len(), short.placeholders.len());
        return Err(ProcessorError::MediaNotPlaced { parts, found });
    }
    let visual: u64 = media.iter().map(|item| u64::from(item.num_tokens)).sum();
    let total = (short.tokens.len() - media.len()) as u64 + visual;
    let context = config.max_context_len;
    if total == 0 {
        return Err(ProcessorError::EmptyPrompt);
    }
    if total >= u64::from(context) {
        return Err(ProcessorError::PromptTooLong { tokens: total, context });
    }
    let mut prompt = Prompt { tokens: Vec::with_capacity(total as usize), ..Prompt::default() };
    let mut from = 0;
    for (item, (description, &at)) in media.iter().zip(&short.placeholders).enumerate() {
        let pad = short.tokens[at];
        if pad != pad_of(description.kind, config) {
            return Err(ProcessorError::MediaKind { part: item });
        }
        push_text(&mut prompt, &short.tokens[from..at]);
        from = at + 1;
        prompt.media.push(MediaSpan {
            item: item as u32,
            kind: description.kind,
            offset: prompt.tokens.len() as u32,
            num_tokens: description.num_tokens,
            grid: description.grid,
            seconds_per_grid: description.seconds_per_grid,
            embedding_key: embedding_key(vision, &config.recipe, description),
        });
        prompt.tokens.extend(std::iter::repeat_n(pad, description.num_tokens as usize));
        prompt.positions.push(grid_span(description, config));
    }
    push_text(&mut prompt, &short.tokens[from..]);
    prompt.validate()?;
    Ok(prompt)
}

fn pad_of(kind: MediaKind, config: &ProcessorConfig) -> TokenId {
    match kind {
        MediaKind::Image => config.special.image_pad,
        MediaKind::Video => config.special.video_pad,
    }
}

fn push_text(prompt: &mut Prompt, tokens: &[TokenId]) {
    if !tokens.is_empty() {
        prompt.tokens.extend_from_slice(tokens);
        prompt.positions.push(PositionSpan::Text { len: tokens.len() as u32 });
    }
}

/// The positions of one item. The time step is formed in f64 and rounded once (specification §8).
fn grid_span(description: &MediaDescription, config: &ProcessorConfig) -> PositionSpan {
    let merge = config.recipe.patch.merge_size;
    let grid = description.grid;
    let step = (description.seconds_per_grid * config.tokens_per_second) as f32;
    PositionSpan::Grid { t: grid.t, h: grid.h / merge, w: grid.w / merge, step }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use tessera_media::Size;
    use tessera_types::{GridThw, Hash256, MediaId, ModelFingerprint, NumericsId};

    fn fixture(path: &str) -> std::path::PathBuf {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");
        std::path::Path::new(root).join(path)
    }

    fn integer(value: &Value) -> u32 {
        value.as_u64().unwrap_or_else(|| panic!("{value} is no count")) as u32
    }

    fn item(span: &Value) -> Option<MediaDescription> {
        let kind = if span["image"].is_array() { MediaKind::Image } else { MediaKind::Video };
        let grid = span.get("image").or(span.get("video"))?;
        let grid = GridThw { t: integer(&grid[0]), h: integer(&grid[1]), w: integer(&grid[2]) };
        Some(MediaDescription {
            kind,
            media_id: MediaId::default(),
            frame_indices: Vec::new(),
            source: Size::new(1, 1),
            resized: Size::new(grid.w * 14, grid.h * 14),
            grid,
            num_tokens: grid.num_visual_tokens(2) as u32,
            seconds_per_grid: span["spg"].as_f64().unwrap_or(0.0),
        })
    }

    #[test]
    fn positions_equal_the_reference_for_every_sequence_of_spans() {
        let mut config = ProcessorConfig::load(&fixture("tiny")).expect("the tiny checkpoint");
        let vision = VisionIdentity {
            weights: ModelFingerprint(Hash256([1; 32])),
            numerics: NumericsId(Hash256([2; 32])),
        };
        let file = std::fs::read(fixture("positions.json")).expect("the fixture");
        let cases: Vec<Value> = serde_json::from_slice(&file).expect("a list");
        assert!(!cases.is_empty());
        for case in cases {
            config.tokens_per_second = f64::from(integer(&case["tokens_per_second"]));
            let mut short = ShortPrompt { tokens: Vec::new(), placeholders: Vec::new() };
            let mut media = Vec::new();
            for span in case["spans"].as_array().expect("spans") {
                let Some(item) = item(span) else {
                    short.tokens.extend(vec![7; integer(&span["text"]) as usize]);
                    continue;
                };
                short.placeholders.push(short.tokens.len());
                short.tokens.push(pad_of(item.kind, &config));
                media.push(item);
            }
            let prompt = expand(&short, &media, &vision, &config).expect("a valid prompt");
            assert_eq!(prompt.tokens.len(), integer(&case["tokens"]) as usize, "{}", case["name"]);
            assert_eq!(Some(prompt.rope_delta()), case["rope_delta"].as_i64(), "{}", case["name"]);
            let mut positions = Vec::new();
            prompt.extend_positions(0, prompt.tokens.len(), &mut positions);
            for axis in 0..3 {
                let got: Vec<i32> = positions.iter().map(|position| position[axis]).collect();
                assert_eq!(serde_json::json!(got), case["position_ids"][axis], "{}", case["name"]);
            }
        }
    }

    #[test]
    fn an_empty_prompt_and_a_placeholder_of_the_wrong_kind_are_refused() {
        let config = ProcessorConfig::load(&fixture("tiny")).expect("the tiny checkpoint");
        let vision = VisionIdentity {
            weights: ModelFingerprint::default(),
            numerics: NumericsId::default(),
        };
        let empty = ShortPrompt { tokens: Vec::new(), placeholders: Vec::new() };
        assert!(matches!(expand(&empty, &[], &vision, &config), Err(ProcessorError::EmptyPrompt)));
        let video = item(&serde_json::json!({"video": [1, 2, 2], "spg": 1.0})).expect("a video");
        let wrong = ShortPrompt { tokens: vec![config.special.image_pad], placeholders: vec![0] };
        assert!(matches!(
            expand(&wrong, &[video], &vision, &config),
            Err(ProcessorError::MediaKind { part: 0 })
        ));
    }
}
