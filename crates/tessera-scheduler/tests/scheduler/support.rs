//! A scheduler, a fake model and the few lines of an engine between them.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use tessera_scheduler::{
    AddError, DrawRule, FakeModel, Scheduler, SchedulerConfig, SequenceEvent, SequenceRequest,
};
use tessera_types::{
    BlockKey, EmbeddingKey, Epoch, FinishReason, GridThw, Hash256, LateInputs, MediaKind,
    MediaSpan, PositionSpan, Prompt, SamplingParams, SequenceId, StepOutput, StepPlan, TokenId,
    TokenLogprobs,
};

pub const VOCAB_SIZE: u32 = 50;
pub const EOS: TokenId = 0;

pub fn config() -> SchedulerConfig {
    SchedulerConfig {
        block_size: 4,
        max_running: 4,
        max_waiting: 16,
        max_waiting_per_tenant: 16,
        max_tokens_per_step: 8,
        max_model_len: 64,
        pipeline_depth: 1,
        reserved_blocks: 0,
    }
}

/// A prompt of `num_tokens` tokens that begins like every other one of its family. `media` are
/// `(offset, num_tokens)`; spans that would pass the end are left out.
pub fn prompt(family: u32, num_tokens: u32, media: &[(u32, u32)]) -> Arc<Prompt> {
    let tokens = (0..num_tokens).map(|i| 1 + (family * 31 + i * 7) % (VOCAB_SIZE - 1)).collect();
    let mut spans = Vec::new();
    let mut positions = Vec::new();
    let mut end = 0;
    let inside = media.iter().filter(|(offset, length)| offset + length <= num_tokens);
    for (item, &(offset, length)) in inside.enumerate() {
        spans.push(MediaSpan {
            item: item as u32,
            kind: MediaKind::Image,
            offset,
            num_tokens: length,
            grid: GridThw { t: 1, h: 2, w: 2 * length },
            seconds_per_grid: 0.0,
            embedding_key: EmbeddingKey(Hash256([family as u8 * 16 + item as u8; 32])),
        });
        positions.push(PositionSpan::Text { len: offset - end });
        positions.push(PositionSpan::Grid { t: 1, h: 1, w: length, step: 0.0 });
        end = offset + length;
    }
    positions.push(PositionSpan::Text { len: num_tokens - end });
    Arc::new(Prompt { tokens, media: spans, positions })
}

/// Keys of the prompt's full blocks: each of everything up to its end.
pub fn block_keys(prompt: &Prompt, block_size: u32) -> Vec<BlockKey> {
    let num_full = prompt.tokens.len() / block_size as usize;
    let key = |blocks: usize| {
        let end = blocks * block_size as usize;
        let mut hasher = DefaultHasher::new();
        prompt.tokens[..end].hash(&mut hasher);
        for span in prompt.media.iter().filter(|span| (span.offset as usize) < end) {
            (span.offset, span.embedding_key).hash(&mut hasher);
        }
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&hasher.finish().to_le_bytes());
        BlockKey(Hash256(bytes))
    };
    (1..=num_full).map(key).collect()
}

pub fn request(id: u64, prompt: Arc<Prompt>, max_tokens: u32) -> SequenceRequest {
    SequenceRequest {
        sequence: SequenceId(id),
        prompt,
        output: Vec::new(),
        sampling: Arc::new(SamplingParams { max_tokens, ..SamplingParams::default() }),
        eos_token_ids: Arc::from([EOS]),
        seed: id * 1000,
        priority: 0,
        tenant: tessera_types::TenantId::default(),
        arrival: id,
        block_keys: Vec::new(),
        use_reserve: false,
    }
}

/// What a driver knows about a sequence that was accepted.
pub struct Seen {
    pub request: SequenceRequest,
    /// Tokens reported, forced output not included.
    pub tokens: Vec<TokenId>,
    /// Of them those of earlier epochs.
    pub num_moved: usize,
    /// Of this epoch.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    pub finished: Option<FinishReason>,
    pub aborted: bool,
    /// Items asked for whose embedding has not come.
    pub missing: BTreeSet<u32>,
}

fn seen_key(seen: &Seen, item: u32) -> EmbeddingKey {
    seen.request.prompt.media[item as usize].embedding_key
}

pub struct Driver {
    pub scheduler: Scheduler,
    pub model: FakeModel,
    pub seen: BTreeMap<SequenceId, Seen>,
    in_flight: VecDeque<StepOutput>,
    /// Embeddings in place; they outlive epochs.
    installed: BTreeSet<EmbeddingKey>,
    /// The one that is being given to every sequence, and those that asked for it meanwhile.
    present: Option<EmbeddingKey>,
    answers: Vec<(SequenceId, u32)>,
    pub num_steps: usize,
    /// Tokens computed, over all steps.
    pub num_tokens: usize,
    /// Admissions that found their beginning in the prefix cache.
    pub num_hits: usize,
}

impl Driver {
    pub fn new(config: SchedulerConfig, num_blocks: u32) -> Self {
        let epoch = Epoch(3);
        let model = FakeModel::new(config.table_limits(num_blocks), epoch, 2, VOCAB_SIZE);
        let mut scheduler = Scheduler::new(config).expect("valid limits");
        scheduler.begin_epoch(epoch, num_blocks);
        Self {
            scheduler,
            model,
            seen: BTreeMap::new(),
            in_flight: VecDeque::new(),
            installed: BTreeSet::new(),
            present: None,
            answers: Vec::new(),
            num_steps: 0,
            num_tokens: 0,
            num_hits: 0,
        }
    }

    pub fn add(&mut self, request: SequenceRequest) -> Result<(), AddError> {
        let seen = Seen {
            tokens: Vec::new(),
            num_moved: 0,
            prompt_logprobs: Vec::new(),
            finished: None,
            aborted: false,
            missing: BTreeSet::new(),
            request: request.clone(),
        };
        self.scheduler.add(request)?;
        self.seen.insert(seen.request.sequence, seen);
        self.take_events();
        Ok(())
    }

    pub fn abort(&mut self, sequence: SequenceId) {
        let known = self.scheduler.abort(sequence, FinishReason::Cancelled);
        let seen = self.seen.get_mut(&sequence).expect("an accepted sequence");
        assert_eq!(known, seen.finished.is_none());
        seen.aborted |= known;
        seen.missing.clear();
        self.take_events();
    }

    /// One embedding that was asked for arrives; `false`: the sequence misses none.
    pub fn media_arrives(&mut self, sequence: SequenceId) -> bool {
        let seen = self.seen.get_mut(&sequence).expect("an accepted sequence");
        let Some(item) = seen.missing.pop_first() else { return false };
        self.install(seen_key(&self.seen[&sequence], item));
        self.scheduler.media_arrived(sequence, item);
        self.take_events();
        true
    }

    /// The same, and as in the engine every sequence that names the embedding has it.
    pub fn media_arrives_for_all(&mut self, sequence: SequenceId) -> bool {
        let seen = self.seen.get_mut(&sequence).expect("an accepted sequence");
        let Some(item) = seen.missing.pop_first() else { return false };
        let key = seen_key(&self.seen[&sequence], item);
        self.install(key);
        self.present = Some(key);
        let named_by = |(&id, seen): (&SequenceId, &Seen)| {
            let spans = seen.request.prompt.media.iter().filter(|span| span.embedding_key == key);
            spans.map(|span| (id, span.item)).collect::<Vec<_>>()
        };
        let mut waiting: VecDeque<_> = self.seen.iter().flat_map(named_by).collect();
        while let Some((id, item)) = waiting.pop_front() {
            self.seen.get_mut(&id).expect("known").missing.remove(&item);
            self.scheduler.media_arrived(id, item);
            self.take_events();
            waiting.extend(self.answers.drain(..));
        }
        self.present = None;
        true
    }

    fn install(&mut self, key: EmbeddingKey) {
        self.installed.insert(key);
        self.model.install_embedding(key);
    }

    /// The epoch ends in the middle of whatever is in flight, and what was not finished comes back with its
    /// output in the next one.
    pub fn new_epoch(&mut self, num_blocks: u32) {
        let epoch = self.model.epoch().next();
        let dropped = self.scheduler.end_epoch();
        self.in_flight.clear();
        let limits = self.scheduler.config().table_limits(num_blocks);
        self.model = FakeModel::new(limits, epoch, 2, VOCAB_SIZE);
        self.installed.iter().for_each(|&key| self.model.install_embedding(key));
        self.scheduler.begin_epoch(epoch, num_blocks);
        for id in dropped {
            let seen = self.seen.get_mut(&id).expect("an accepted sequence");
            assert_eq!(seen.finished, None, "dropped after its end");
            seen.missing.clear();
            seen.prompt_logprobs.clear();
            seen.num_moved = seen.tokens.len();
            let mut request = seen.request.clone();
            request.output.extend_from_slice(&seen.tokens);
            if let Err(error) = self.scheduler.add(request) {
                let full = matches!(
                    error,
                    AddError::QueueFull { .. }
                        | AddError::TenantQueueFull { .. }
                        | AddError::NeverFits { .. }
                );
                assert!(full, "{error}");
                let seen = self.seen.get_mut(&id).expect("known");
                (seen.aborted, seen.finished) = (true, Some(FinishReason::Cancelled));
            }
        }
        self.take_events();
    }

    /// The engine's turn. Returns the plan made.
    pub fn turn(&mut self) -> Option<StepPlan> {
        let depth = self.scheduler.config().pipeline_depth as usize;
        let plan = self.scheduler.schedule();
        self.take_events();
        if let Some(plan) = &plan {
            self.check_plan(plan);
            self.model.forward(plan).expect("a plan that the model can run");
        }
        if depth == 2 || plan.is_none() {
            self.collect();
        }
        if let Some(plan) = &plan {
            let output = self.model.sample(plan.step, &LateInputs::default());
            self.in_flight.push_back(output.expect("a forwarded step"));
            self.num_steps += 1;
            self.num_tokens += plan.num_tokens();
            self.num_hits += plan.admitted.iter().filter(|a| a.num_computed_tokens > 0).count();
        }
        if depth == 1 {
            self.collect();
        }
        plan
    }

    /// Turns until nothing is left, or panics after many.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            let was_idle = self.in_flight.is_empty();
            if self.turn().is_none() && was_idle {
                return;
            }
        }
        panic!("the scheduler does not come to an end");
    }

    /// Tokens that the sequence must produce, undisturbed, with the reason for its end.
    pub fn expected(&self, request: &SequenceRequest) -> (Vec<TokenId>, FinishReason) {
        let rule = DrawRule {
            sampling: &request.sampling,
            eos_token_ids: &request.eos_token_ids,
            seed: request.seed,
        };
        let mut output = request.output.clone();
        loop {
            output.push(self.model.expected_token(&request.prompt, &output, rule));
            let token = output[output.len() - 1];
            let tokens = || output[request.output.len()..].to_vec();
            let ends = output.len() > request.sampling.min_tokens as usize;
            if ends && !request.sampling.ignore_eos && token == EOS {
                return (tokens(), FinishReason::EndOfSequence);
            }
            if ends && request.sampling.stop_token_ids.contains(&token) {
                return (tokens(), FinishReason::StopToken);
            }
            if output.len() == request.sampling.max_tokens as usize {
                return (tokens(), FinishReason::Length);
            }
        }
    }

    /// Every sequence has exactly the tokens of an undisturbed run, and nothing is held any more.
    pub fn check_end(&self) {
        let load = self.scheduler.load();
        assert!(self.scheduler.is_idle(), "not idle: {load:?}");
        assert_eq!((load.running, load.waiting), (0, 0));
        assert_eq!(load.num_free_blocks, load.num_blocks, "leaked blocks");
        for (id, seen) in &self.seen {
            let (tokens, reason) = self.expected(&seen.request);
            self.check_prompt_logprobs(seen);
            match seen.aborted {
                true => assert_eq!(seen.tokens[..], tokens[..seen.tokens.len()], "sequence {id}"),
                false => {
                    assert_eq!(seen.tokens, tokens, "sequence {id}");
                    assert_eq!(seen.finished, Some(reason), "sequence {id}");
                }
            }
        }
    }

    /// All of them if a token was reported, else the first ones.
    fn check_prompt_logprobs(&self, seen: &Seen) {
        let request = &seen.request;
        let Some(top) = request.sampling.prompt_logprobs else {
            return assert!(seen.prompt_logprobs.is_empty(), "nobody asked");
        };
        let mut expected = self.model.expected_prompt_logprobs(&request.prompt, top);
        if seen.tokens.len() == seen.num_moved {
            expected.truncate(seen.prompt_logprobs.len());
        }
        assert_eq!(seen.prompt_logprobs, expected, "sequence {}", request.sequence);
    }

    fn collect(&mut self) {
        let Some(output) = self.in_flight.pop_front() else { return };
        self.model.collected(output.step);
        self.scheduler.apply(output).expect("the output of the step in flight");
        self.take_events();
    }

    fn check_plan(&self, plan: &StepPlan) {
        let config = self.scheduler.config();
        let budget = self.scheduler.token_budget();
        assert!(budget <= config.max_tokens_per_step, "the hard bound is broken");
        assert!(plan.num_tokens() <= budget as usize, "the budget is broken");
        assert!(plan.scheduled.len() <= config.num_slots() as usize);
    }

    /// Whether some sequence was asked for the embedding, which has not come.
    fn is_awaited(&self, key: EmbeddingKey) -> bool {
        self.seen.values().any(|seen| seen.missing.iter().any(|&item| seen_key(seen, item) == key))
    }

    fn take_events(&mut self) {
        for event in self.scheduler.take_events() {
            match event {
                SequenceEvent::MediaNeeded { sequence, items } => {
                    for item in items {
                        let key = seen_key(&self.seen[&sequence], item);
                        if self.present == Some(key) {
                            self.answers.push((sequence, item));
                            continue;
                        }
                        assert!(!self.is_awaited(key), "asked for again while on its way");
                        self.seen.get_mut(&sequence).expect("known").missing.insert(item);
                    }
                }
                SequenceEvent::Admitted { .. } => {}
                SequenceEvent::PromptLogprobs { sequence, first_token, tokens } => {
                    let seen = self.seen.get_mut(&sequence).expect("known");
                    assert_eq!(seen.finished, None, "prompt logprobs after the end");
                    assert_eq!(seen.tokens.len(), seen.num_moved, "prompt logprobs after a token");
                    let next = 1 + seen.prompt_logprobs.len();
                    assert_eq!(first_token as usize, next, "lost or repeated");
                    seen.prompt_logprobs.extend(tokens);
                }
                SequenceEvent::Token { sequence, output_index, token, .. } => {
                    let seen = self.seen.get_mut(&sequence).expect("known");
                    assert_eq!(seen.finished, None, "a token after the end");
                    let next = seen.request.output.len() + seen.tokens.len();
                    assert_eq!(output_index as usize, next, "lost or repeated");
                    seen.tokens.push(token);
                }
                SequenceEvent::Finished { sequence, reason, num_output_tokens, .. } => {
                    let seen = self.seen.get_mut(&sequence).expect("known");
                    assert_eq!(seen.finished.replace(reason), None, "finished twice");
                    seen.missing.clear();
                    let total = seen.request.output.len() + seen.tokens.len();
                    assert_eq!(num_output_tokens as usize, total);
                }
            }
        }
    }
}
