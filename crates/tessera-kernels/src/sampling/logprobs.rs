//! Log probabilities under the model's own distribution, natural log.

use tessera_types::{TokenId, TokenLogprobs};

use super::math::{ln, max, sum_exp};

/// Normaliser of one row: `ln softmax(row)[i] = (row[i] − max) − ln Σ e^(row − max)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogNormalizer {
    max: f32,
    ln_sum: f64,
}

impl LogNormalizer {
    /// Of `row` `[vocabulary]`; barred tokens are −∞. A NaN anywhere makes every log probability one.
    pub fn of(row: &[f32]) -> Self {
        let max = max(row);
        let sum = sum_exp(row, max);
        Self { max, ln_sum: if sum.is_nan() { sum } else { ln(sum) } }
    }

    /// Log probability of a token with this logit.
    pub fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit - self.max) - self.ln_sum) as f32
    }
}

/// Log probability of `token` under `row` `[vocabulary]`.
pub fn logprob(row: &[f32], token: TokenId) -> f32 {
    LogNormalizer::of(row).logprob(row[token as usize])
}

/// Log probabilities of `token` and of the `num_top` most likely tokens under `row` `[vocabulary]`.
pub fn token_logprobs(row: &[f32], token: TokenId, num_top: usize) -> TokenLogprobs {
    let normalizer = LogNormalizer::of(row);
    let mut top = likeliest(row, num_top);
    top.iter_mut().for_each(|(_, value)| *value = normalizer.logprob(*value));
    TokenLogprobs { logprob: normalizer.logprob(row[token as usize]), top }
}

/// What must be kept of a row before it is edited.
pub(super) struct RawLogprobs {
    row: Vec<f32>,
    normalizer: LogNormalizer,
    top: Vec<(TokenId, f32)>,
}

impl RawLogprobs {
    pub(super) fn of(row: &[f32], num_top: usize) -> Self {
        let normalizer = LogNormalizer::of(row);
        let mut top = likeliest(row, num_top);
        top.iter_mut().for_each(|(_, value)| *value = normalizer.logprob(*value));
        Self { row: row.to_vec(), normalizer, top }
    }

    pub(super) fn of_token(self, token: TokenId) -> TokenLogprobs {
        let logprob = self.normalizer.logprob(self.row[token as usize]);
        TokenLogprobs { logprob, top: self.top }
    }
}

/// The `num_top` highest logits, best first, equals by ascending id. Barred tokens never count.
fn likeliest(row: &[f32], num_top: usize) -> Vec<(TokenId, f32)> {
    let mut top: Vec<(TokenId, f32)> = Vec::with_capacity(num_top + 1);
    for (token, &logit) in row.iter().enumerate() {
        let floor = match top.last() {
            Some(&(_, worst)) if top.len() == num_top => worst,
            _ => f32::NEG_INFINITY,
        };
        if num_top == 0 || logit <= floor {
            continue;
        }
        let at = top.partition_point(|&(_, better)| better >= logit);
        top.insert(at, (token as TokenId, logit));
        top.truncate(num_top);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let row: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 * 0.3 - 12.0).collect();
        let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        for token in [0, 1, 500, 999] {
            let exact = f64::from(row[token]) - total.ln();
            let ours = f64::from(logprob(&row, token as TokenId));
            assert!((ours - exact).abs() < 2e-6, "{ours}, exactly {exact}");
        }
    }

    #[test]
    fn the_likeliest_are_sorted_with_equals_by_id() {
        let row = [1.0, f32::NEG_INFINITY, 3.0, 2.0, 3.0, 0.0, 2.0];
        let tokens = |n| likeliest(&row, n).iter().map(|&(token, _)| token).collect::<Vec<_>>();
        assert!(tokens(0).is_empty());
        assert_eq!(tokens(1), [2]);
        assert_eq!(tokens(3), [2, 4, 3]);
        assert_eq!(tokens(9), [2, 4, 3, 6, 0, 5], "a barred token is not listed");
    }

    #[test]
    fn an_invalid_logit_makes_the_whole_row_invalid() {
        let mut row = [1.0; 40];
        row[7] = f32::NAN;
        assert!(logprob(&row, 3).is_nan());
        assert!(token_logprobs(&row, 3, 1).logprob.is_nan());
    }

    #[test]
    fn a_lone_token_is_certain() {
        let mut row = [f32::NEG_INFINITY; 40];
        row[33] = -7.0;
        assert_eq!(logprob(&row, 33), 0.0);
        assert_eq!(logprob(&row, 3), f32::NEG_INFINITY);
    }
}
