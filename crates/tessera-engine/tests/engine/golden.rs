//! Golden cases of the fixture checkpoint as the engine takes them: prompts, embeddings, tokens.

use std::path::PathBuf;
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::Value;
use tessera_types::{
    EmbeddingKey, GridThw, Hash256, MediaKind, MediaSpan, PositionSpan, Prompt, TokenId,
};

const IMAGE_PAD: TokenId = 2060;

/// One case: what the reference implementation computes for it.
pub struct Golden {
    pub prompt: Arc<Prompt>,
    /// Rows of the vision tower per item, `[rows, hidden]`.
    pub embeddings: Vec<Arc<[f32]>>,
    pub greedy_tokens: Vec<TokenId>,
    /// `[prompt tokens, vocabulary]`; empty where the fixture has none.
    pub logits: Arc<[f32]>,
}

/// The fixture checkpoint's directory.
pub fn checkpoint() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"))
}

/// Reads a case of still images or text.
pub fn load(case: &str, salt: u8) -> Golden {
    let directory = checkpoint().join("golden");
    let json = std::fs::read(directory.join(format!("{case}.json"))).expect("a committed fixture");
    let json: Value = serde_json::from_slice(&json).expect("JSON");
    let tensors = std::fs::read(directory.join(format!("{case}.safetensors"))).expect("a fixture");
    let tensors = SafeTensors::deserialize(&tensors).expect("safetensors");
    let tokens = numbers(&json["expanded_ids"]);
    let media = json["media"].as_array().expect("a list");
    let embeddings = (0..media.len()).map(|item| floats(&tensors, &format!("vit_rows.{item}")));
    Golden {
        embeddings: embeddings.collect(),
        prompt: Arc::new(prompt(tokens, media, salt)),
        greedy_tokens: numbers(&json["greedy_tokens"]),
        logits: match tensors.names().contains(&"logits_all") {
            true => floats(&tensors, "logits_all"),
            false => Arc::default(),
        },
    }
}

fn prompt(tokens: Vec<TokenId>, media: &[Value], salt: u8) -> Prompt {
    let (mut spans, mut positions) = (Vec::new(), Vec::new());
    let mut end = 0;
    for (item, value) in media.iter().enumerate() {
        let [t, h, w]: [u32; 3] = numbers(&value["grid_thw"]).try_into().expect("three axes");
        let num_tokens = t * h * w / 4;
        let pad = tokens[end as usize..].iter().position(|&token| token == IMAGE_PAD);
        let offset = end + pad.expect("a placeholder") as u32;
        positions.push(PositionSpan::Text { len: offset - end });
        positions.push(PositionSpan::Grid { t, h: h / 2, w: w / 2, step: 0.0 });
        spans.push(MediaSpan {
            item: item as u32,
            kind: MediaKind::Image,
            offset,
            num_tokens,
            grid: GridThw { t, h, w },
            seconds_per_grid: 0.0,
            embedding_key: EmbeddingKey(Hash256([salt * 8 + item as u8; 32])),
        });
        end = offset + num_tokens;
    }
    positions.push(PositionSpan::Text { len: tokens.len() as u32 - end });
    Prompt { tokens, media: spans, positions }
}

fn numbers(value: &Value) -> Vec<u32> {
    let values = value.as_array().expect("a list").iter();
    values.map(|value| value.as_u64().expect("a number") as u32).collect()
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Arc<[f32]> {
    let bytes = tensors.tensor(name).expect("a tensor").data().chunks_exact(4);
    bytes.map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes"))).collect()
}
