//! A prompt as the decoder sees it: expanded token ids, where visual rows go, and M-RoPE positions as
//! spans. Positions are never sent as arrays; [`PositionSpan`]s and `rope_delta` say the same in a few
//! bytes (reference: Qwen2.5-VL `get_rope_index`).

use serde::{Deserialize, Serialize};

use crate::hash::EmbeddingKey;
use crate::ids::TokenId;

/// Patch grid of one media item: frame groups × patch rows × patch columns (14 px patches).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GridThw {
    pub t: u32,
    pub h: u32,
    pub w: u32,
}

impl GridThw {
    /// Number of patches, the rows of `pixel_values`.
    pub fn num_patches(self) -> u64 {
        u64::from(self.t) * u64::from(self.h) * u64::from(self.w)
    }

    /// Number of visual tokens after the merger (`merge_size` 2: a quarter of the patches).
    pub fn num_visual_tokens(self, merge_size: u32) -> u64 {
        self.num_patches() / u64::from(merge_size * merge_size)
    }
}

/// Still image or video.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MediaKind {
    Image,
    Video,
}

/// Where the visual rows of one media item stand in the prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MediaSpan {
    /// Index of the item in the request, in order of appearance.
    pub item: u32,
    pub kind: MediaKind,
    /// Index of the first placeholder token in [`Prompt::tokens`].
    pub offset: u32,
    /// Number of placeholder tokens, equal to the rows of the embedding.
    pub num_tokens: u32,
    /// Patch grid before merging.
    pub grid: GridThw,
    /// Seconds per temporal patch; 0 for images.
    pub seconds_per_grid: f64,
    pub embedding_key: EmbeddingKey,
}

impl MediaSpan {
    /// One past the last placeholder token.
    pub fn end(&self) -> u32 {
        self.offset + self.num_tokens
    }
}

/// A run of tokens whose M-RoPE positions follow one rule.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionSpan {
    /// `len` tokens that advance all three axes by one each.
    Text { len: u32 },
    /// `t × h × w` merged visual tokens in raster order. T = floor(i · step) for frame group i, product
    /// in f32; H = row, W = column. The next span starts at the largest position used plus one.
    Grid { t: u32, h: u32, w: u32, step: f32 },
}

impl PositionSpan {
    /// Tokens the span covers.
    pub fn num_tokens(self) -> u32 {
        match self {
            Self::Text { len } => len,
            Self::Grid { t, h, w, .. } => t * h * w,
        }
    }

    /// Distance from the span's first position to the first position after it.
    pub fn extent(self) -> i64 {
        match self {
            Self::Text { len } => i64::from(len),
            Self::Grid { t, h, w, step } => {
                if t == 0 || h == 0 || w == 0 {
                    return 0;
                }
                let last = temporal_index(t - 1, step);
                (last + 1).max(i64::from(h)).max(i64::from(w))
            }
        }
    }
}

/// floor(i · step), the product in f32 as the reference computes it.
fn temporal_index(i: u32, step: f32) -> i64 {
    (i as f32 * step).floor() as i64
}

/// An expanded prompt. Shared by reference; it never changes after admission.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Prompt {
    /// Token ids with every placeholder expanded.
    pub tokens: Vec<TokenId>,
    /// Media in order of appearance; spans do not overlap.
    pub media: Vec<MediaSpan>,
    /// Cover `tokens` exactly, in order.
    pub positions: Vec<PositionSpan>,
}

/// A prompt whose parts contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    #[error("the prompt is empty")]
    Empty,
    #[error("position spans cover {covered} tokens but the prompt has {tokens}")]
    PositionsDisagree { covered: u64, tokens: usize },
    #[error(
        "media item {item} spans tokens {offset}..{end} of {tokens}, or overlaps the item before it"
    )]
    MediaOutOfOrder { item: u32, offset: u32, end: u64, tokens: usize },
    #[error("a position span has an invalid time step")]
    InvalidStep,
}

impl Prompt {
    /// Checks what every reader relies on: non-empty, spans cover the tokens, media in order and inside.
    pub fn validate(&self) -> Result<(), PromptError> {
        if self.tokens.is_empty() {
            return Err(PromptError::Empty);
        }
        let mut covered = 0u64;
        for span in &self.positions {
            covered += match *span {
                PositionSpan::Text { len } => u64::from(len),
                PositionSpan::Grid { t, h, w, step } => {
                    if !step.is_finite() || step < 0.0 {
                        return Err(PromptError::InvalidStep);
                    }
                    u64::from(t).saturating_mul(u64::from(h)).saturating_mul(u64::from(w))
                }
            };
        }
        if covered != self.tokens.len() as u64 {
            return Err(PromptError::PositionsDisagree { covered, tokens: self.tokens.len() });
        }
        let mut free_from = 0u64;
        for span in &self.media {
            let end = u64::from(span.offset) + u64::from(span.num_tokens);
            if u64::from(span.offset) < free_from || end > self.tokens.len() as u64 {
                return Err(PromptError::MediaOutOfOrder {
                    item: span.item,
                    offset: span.offset,
                    end,
                    tokens: self.tokens.len(),
                });
            }
            free_from = end;
        }
        Ok(())
    }

    /// Difference between the position of the first generated token and its index: position =
    /// index + `rope_delta` on all three axes for every token past the prompt.
    pub fn rope_delta(&self) -> i64 {
        let extent: i64 = self.positions.iter().map(|span| span.extent()).sum();
        extent - self.tokens.len() as i64
    }

    /// Appends the positions `[t, h, w]` of tokens `start..end` to `out`. Indices past the prompt
    /// continue as text after it. Cost: the spans before `start` are skipped, not walked.
    pub fn extend_positions(&self, start: usize, end: usize, out: &mut Vec<[i32; 3]>) {
        let mut index = 0usize;
        let mut base = 0i64;
        for span in &self.positions {
            let len = span.num_tokens() as usize;
            let from = start.max(index);
            let to = end.min(index + len);
            for token in from..to {
                out.push(position_in_span(*span, base, (token - index) as u32));
            }
            index += len;
            base += span.extent();
            if index >= end {
                return;
            }
        }
        for token in start.max(index)..end {
            let position = (base + (token - index) as i64) as i32;
            out.push([position; 3]);
        }
    }
}

fn position_in_span(span: PositionSpan, base: i64, offset: u32) -> [i32; 3] {
    match span {
        PositionSpan::Text { .. } => [(base + i64::from(offset)) as i32; 3],
        PositionSpan::Grid { h, w, step, .. } => {
            let (group, in_group) = (offset / (h * w), offset % (h * w));
            [
                (base + temporal_index(group, step)) as i32,
                (base + i64::from(in_group / w)) as i32,
                (base + i64::from(in_group % w)) as i32,
            ]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(positions: Vec<PositionSpan>) -> Prompt {
        let len: u32 = positions.iter().map(|span| span.num_tokens()).sum();
        Prompt { tokens: vec![7; len as usize], media: Vec::new(), positions }
    }

    fn positions(prompt: &Prompt, start: usize, end: usize) -> Vec<[i32; 3]> {
        let mut out = Vec::new();
        prompt.extend_positions(start, end, &mut out);
        out
    }

    #[test]
    fn text_after_an_image_continues_at_the_largest_axis_plus_one() {
        let prompt = prompt(vec![
            PositionSpan::Text { len: 2 },
            PositionSpan::Grid { t: 1, h: 2, w: 3, step: 0.0 },
            PositionSpan::Text { len: 1 },
        ]);
        let all = positions(&prompt, 0, 11);
        assert_eq!(all[2..8], [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]);
        assert_eq!(all[8..], [[5; 3], [6; 3], [7; 3]]);
        assert_eq!(prompt.rope_delta(), 6 - 9);
    }

    #[test]
    fn a_slow_video_pushes_text_past_its_last_frame() {
        // 3 groups, 2 / 0.7 s each at 2 tokens per second: T = 0, 5, 11.
        let step = (2.0f64 / 0.7 * 2.0) as f32;
        let prompt = prompt(vec![
            PositionSpan::Grid { t: 3, h: 1, w: 2, step },
            PositionSpan::Text { len: 1 },
        ]);
        let all = positions(&prompt, 0, 7);
        assert_eq!(all.iter().map(|p| p[0]).collect::<Vec<_>>(), [0, 0, 5, 5, 11, 11, 12]);
        assert_eq!(prompt.rope_delta(), 13 - 7);
    }

    #[test]
    fn any_cut_gives_the_same_positions() {
        let prompt = prompt(vec![
            PositionSpan::Text { len: 3 },
            PositionSpan::Grid { t: 2, h: 2, w: 2, step: 3.3 },
            PositionSpan::Text { len: 2 },
            PositionSpan::Grid { t: 1, h: 4, w: 1, step: 0.0 },
        ]);
        let whole = positions(&prompt, 0, 24);
        for cut in 0..24 {
            let mut parts = positions(&prompt, 0, cut);
            parts.extend(positions(&prompt, cut, 24));
            assert_eq!(parts, whole, "cut at {cut}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let mut bad = prompt(vec![PositionSpan::Text { len: 3 }]);
        bad.tokens.push(1);
        assert!(matches!(bad.validate(), Err(PromptError::PositionsDisagree { covered: 3, .. })));
        assert_eq!(Prompt::default().validate(), Err(PromptError::Empty));
        let huge = Prompt {
            tokens: vec![1],
            media: vec![],
            positions: vec![PositionSpan::Grid {
                t: u32::MAX,
                h: u32::MAX,
                w: u32::MAX,
                step: 0.0,
            }],
        };
        assert!(huge.validate().is_err());
    }
}
