//! Sampling parameters of a request: what the client set, else what the checkpoint's
//! `generation_config.json` says, else plain defaults.

use tessera_types::{Grammar, SamplingParams, TokenId};

use crate::checkpoint_file::CheckpointFile;
use crate::error::{CheckpointError, ProcessorError};

/// Defaults and end tokens of a checkpoint. `None` where the file says nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationDefaults {
    /// Tokens that end a reply; never empty.
    pub eos_token_ids: Vec<TokenId>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// Reads the generation file; end tokens fall back to those of `config.json`. A file that asks for
    /// no sampling (`do_sample` false, or neither `do_sample` nor a temperature) means temperature 0.
    pub(crate) fn read(
        file: &CheckpointFile,
        config: &CheckpointFile,
    ) -> Result<Self, CheckpointError> {
        let number = |field: &str| -> Result<Option<f32>, CheckpointError> {
            Ok(file.number(&[field])?.map(|value| value as f32))
        };
        let do_sample = file.get("do_sample").and_then(|value| value.as_bool());
        let temperature = match (do_sample, number("temperature")?) {
            (Some(false), _) | (None, None) => Some(0.0),
            (Some(true), None) => Some(1.0),
            (_, temperature) => temperature,
        };
        let defaults = Self {
            eos_token_ids: eos_token_ids(file, config)?,
            temperature,
            top_p: number("top_p")?,
            top_k: file.u32(&["top_k"])?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
        };
        // A value out of range would fail every request that leaves the field out.
        let probe = SamplingOverrides { max_tokens: Some(1), ..SamplingOverrides::default() };
        match probe.merge(&defaults).validate() {
            Ok(()) => Ok(defaults),
            Err(error) => Err(file.invalid(error.field(), format!("is out of range: {error}"))),
        }
    }
}

fn eos_token_ids(
    file: &CheckpointFile,
    config: &CheckpointFile,
) -> Result<Vec<TokenId>, CheckpointError> {
    let fields = ["eos_token_id", "text_config.eos_token_id"];
    let (source, field, value) = match (file.get("eos_token_id"), config.get_any(&fields)) {
        (Some(value), _) => (file, "eos_token_id", value),
        (None, Some((field, value))) => (config, field, value),
        (None, None) => return Err(config.missing("eos_token_id")),
    };
    let single = std::slice::from_ref(value);
    let ids: Option<Vec<TokenId>> = value
        .as_array()
        .map_or(single, Vec::as_slice)
        .iter()
        .map(|id| id.as_u64().and_then(|id| TokenId::try_from(id).ok()))
        .collect();
    match ids {
        Some(ids) if !ids.is_empty() => Ok(ids),
        _ => {
            Err(source.invalid(field, format!("must be a token id or a list of them, got {value}")))
        }
    }
}

/// What a request may set; zero is a value, `None` means "as the checkpoint says".
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SamplingOverrides {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    /// In any order; a token given twice counts with its last bias.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// `None`: the rest of the context.
    pub max_tokens: Option<u32>,
    pub min_tokens: Option<u32>,
    pub stop_token_ids: Vec<TokenId>,
    pub ignore_eos: Option<bool>,
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    pub grammar: Option<Grammar>,
}

impl SamplingOverrides {
    /// The parameters for a prompt of `prompt_tokens` in a context of `context` tokens.
    ///
    /// # Errors
    /// Values out of range, token ids outside the vocabulary, a prompt that leaves no room, `max_tokens`
    /// beyond the room, and a grammar beside what would move the end of the output.
    pub fn resolve(
        &self,
        defaults: &GenerationDefaults,
        prompt_tokens: u32,
        context: u32,
        vocab_size: u32,
    ) -> Result<SamplingParams, ProcessorError> {
        let room = context.saturating_sub(prompt_tokens);
        if room == 0 {
            return Err(ProcessorError::PromptTooLong { tokens: prompt_tokens.into(), context });
        }
        let mut params = self.merge(defaults);
        params.max_tokens = self.max_tokens.unwrap_or(room);
        params.validate()?;
        if params.max_tokens > room {
            let max_tokens = params.max_tokens;
            return Err(ProcessorError::OutputTooLong { prompt_tokens, max_tokens, context });
        }
        if params.grammar.is_some() {
            // The end of the output is the grammar's to decide.
            if params.ignore_eos {
                return Err(ProcessorError::GrammarConflict { field: "ignore_eos" });
            }
            if params.min_tokens > 0 {
                return Err(ProcessorError::GrammarConflict { field: "min_tokens" });
            }
        }
        let outside = |&token: &TokenId| token >= vocab_size;
        let biased = params.logit_bias.iter().map(|(token, _)| token);
        if let Some(&token) = biased.copied().find(outside).as_ref() {
            return Err(ProcessorError::UnknownToken { field: "logit_bias", token, vocab_size });
        }
        if let Some(token) = params.stop_token_ids.iter().copied().find(outside) {
            return Err(ProcessorError::UnknownToken {
                field: "stop_token_ids",
                token,
                vocab_size,
            });
        }
        Ok(params)
    }

    fn merge(&self, defaults: &GenerationDefaults) -> SamplingParams {
        let plain = SamplingParams::default();
        let mut logit_bias: Vec<(TokenId, f32)> = Vec::with_capacity(self.logit_bias.len());
        for &(token, bias) in &self.logit_bias {
            match logit_bias.binary_search_by_key(&token, |&(known, _)| known) {
                Ok(at) => logit_bias[at].1 = bias,
                Err(at) => logit_bias.insert(at, (token, bias)),
            }
        }
        SamplingParams {
            temperature: self.temperature.or(defaults.temperature).unwrap_or(plain.temperature),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(plain.top_p),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(plain.top_k),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(plain.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(plain.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(plain.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(plain.frequency_penalty),
            logit_bias,
            max_tokens: self.max_tokens.unwrap_or(plain.max_tokens),
            min_tokens: self.min_tokens.unwrap_or(plain.min_tokens),
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos.unwrap_or(plain.ignore_eos),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            grammar: self.grammar.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn defaults(generation: &Value, config: &Value) -> Result<GenerationDefaults, CheckpointError> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let [generation, config] =
            [("generation_config.json", generation), ("config.json", config)].map(
                |(name, value)| {
                    let path = directory.path().join(name);
                    std::fs::write(path, value.to_string()).expect("a written file");
                    CheckpointFile::read(directory.path(), name).expect("a read file")
                },
            );
        GenerationDefaults::read(&generation, &config)
    }

    fn published() -> GenerationDefaults {
        let generation = json!({"do_sample": true, "eos_token_id": [5, 3], "temperature": 1e-6,
            "repetition_penalty": 1.05});
        defaults(&generation, &json!({})).expect("the published file")
    }

    #[test]
    fn the_request_wins_over_the_checkpoint_and_zero_is_a_value() {
        let room = |overrides: &SamplingOverrides| overrides.resolve(&published(), 10, 100, 50);
        let params = room(&SamplingOverrides::default()).expect("plain defaults");
        assert_eq!((params.repetition_penalty, params.temperature), (1.05, 1e-6));
        assert_eq!(params.max_tokens, 90, "the rest of the context");
        let zero = SamplingOverrides {
            temperature: Some(0.0),
            repetition_penalty: Some(1.0),
            top_k: Some(0),
            max_tokens: Some(7),
            ..SamplingOverrides::default()
        };
        let params = room(&zero).expect("zero is allowed");
        assert_eq!(
            (params.repetition_penalty, params.temperature, params.max_tokens),
            (1.0, 0.0, 7)
        );
    }

    #[test]
    fn do_sample_decides_the_temperature_where_none_is_given() {
        let temperature = |generation: Value| {
            defaults(&generation, &json!({"eos_token_id": 1})).expect("a valid file").temperature
        };
        assert_eq!(temperature(json!({})), Some(0.0));
        assert_eq!(temperature(json!({"do_sample": false, "temperature": 0.7})), Some(0.0));
        assert_eq!(temperature(json!({"do_sample": true})), Some(1.0));
        assert_eq!(temperature(json!({"temperature": 0.7})), Some(0.7));
    }

    #[test]
    fn end_tokens_come_from_either_file_in_either_form() {
        let cases = [
            (json!({"eos_token_id": [5, 3]}), json!({"eos_token_id": 9}), vec![5, 3]),
            (json!({"eos_token_id": 5}), json!({}), vec![5]),
            (json!({}), json!({"eos_token_id": 9}), vec![9]),
            (json!({}), json!({"text_config": {"eos_token_id": [9, 8]}}), vec![9, 8]),
        ];
        for (generation, config, expected) in cases {
            let read = defaults(&generation, &config).expect("end tokens");
            assert_eq!(read.eos_token_ids, expected);
        }
        assert!(defaults(&json!({}), &json!({})).is_err());
        assert!(defaults(&json!({"eos_token_id": []}), &json!({})).is_err());
        assert!(defaults(&json!({"eos_token_id": "x"}), &json!({})).is_err());
        let wild = json!({"eos_token_id": 1, "repetition_penalty": -1.0});
        let error = defaults(&wild, &json!({})).expect_err("a negative penalty").to_string();
        assert!(error.contains("repetition_penalty"), "{error}");
    }

    #[test]
    fn limits_are_refused_by_field() {
        let base = SamplingOverrides::default;
        let grammar = |regex: &str| Some(Grammar::Regex(regex.to_owned()));
        let cases = [
            ("max_tokens", SamplingOverrides { max_tokens: Some(0), ..base() }),
            ("max_tokens", SamplingOverrides { max_tokens: Some(91), ..base() }),
            ("temperature", SamplingOverrides { temperature: Some(f32::NAN), ..base() }),
            ("logit_bias", SamplingOverrides { logit_bias: vec![(50, 1.0)], ..base() }),
            ("stop_token_ids", SamplingOverrides { stop_token_ids: vec![50], ..base() }),
            ("min_tokens", SamplingOverrides { min_tokens: Some(91), ..base() }),
            ("grammar", SamplingOverrides { grammar: grammar(""), ..base() }),
            (
                "ignore_eos",
                SamplingOverrides { ignore_eos: Some(true), grammar: grammar("a"), ..base() },
            ),
            (
                "min_tokens",
                SamplingOverrides { min_tokens: Some(1), grammar: grammar("a"), ..base() },
            ),
        ];
        for (field, overrides) in cases {
            let error = overrides.resolve(&published(), 10, 100, 50).expect_err(field);
            assert_eq!(error.param(), field, "{error}");
        }
        let full = base().resolve(&published(), 100, 100, 50).expect_err("no room");
        assert!(matches!(full, ProcessorError::PromptTooLong { tokens: 100, context: 100 }));
    }

    #[test]
    fn biases_are_sorted_and_the_last_of_a_token_counts() {
        let overrides = SamplingOverrides {
            logit_bias: vec![(7, 1.0), (2, 2.0), (7, 3.0)],
            ..SamplingOverrides::default()
        };
        let params = overrides.resolve(&published(), 1, 10, 50).expect("valid biases");
        assert_eq!(params.logit_bias, [(2, 2.0), (7, 3.0)]);
    }
}
