//! Turns of the engine over the fake executor: order, refusals, media, epochs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use tessera_collective::AbortHandle;
use tessera_engine::{
    Engine, EngineConfig, EngineError, EngineHandle, EpochEnd, EpochStart, Event, Executor,
    ExecutorError, FakeExecutor, PlantedFaults, SequenceError, Submission, SubmitError, Turn,
};
use tessera_scheduler::{AddError, DrawRule, FakeModel, SchedulerConfig, TableLimits};
use tessera_types::{
    EmbeddingKey, Epoch, FinishReason, GridThw, Hash256, LateInputs, MediaKind, MediaSpan,
    PositionSpan, Prompt, SamplingParams, SequenceId, StepId, StepOutput, StepPlan, TokenId,
};

const VOCAB_SIZE: u32 = 50;
const HIDDEN_SIZE: u32 = 2;
const EOS: TokenId = 0;
const NUM_BLOCKS: u32 = 16;

pub fn config(pipeline_depth: u32) -> EngineConfig {
    EngineConfig {
        scheduler: SchedulerConfig {
            block_size: 4,
            max_running: 4,
            max_waiting: 8,
            max_waiting_per_tenant: 8,
            max_tokens_per_step: 8,
            max_model_len: 64,
            pipeline_depth,
            reserved_blocks: 2,
        },
        hidden_size: HIDDEN_SIZE,
        vocab_size: VOCAB_SIZE,
        eos_token_ids: vec![EOS],
        max_embedding_bytes: 80,
        poll_interval: Duration::from_millis(1),
        ..EngineConfig::default()
    }
}

/// A prompt of ten tokens; each `(key, offset, num_tokens)` is an image.
pub fn prompt(family: u32, images: &[(u8, u32, u32)]) -> Arc<Prompt> {
    let image = |(item, &(key, offset, num_tokens)): (usize, &(u8, u32, u32))| MediaSpan {
        item: item as u32,
        kind: MediaKind::Image,
        offset,
        num_tokens,
        grid: GridThw { t: 1, h: 2, w: 2 * num_tokens },
        seconds_per_grid: 0.0,
        embedding_key: EmbeddingKey(Hash256([key; 32])),
    };
    Arc::new(Prompt {
        tokens: (0..10).map(|i| 1 + (family * 17 + i * 3) % 49).collect(),
        media: images.iter().enumerate().map(image).collect(),
        positions: vec![PositionSpan::Text { len: 10 }],
    })
}

pub fn submission(prompt: Arc<Prompt>, max_tokens: u32) -> Submission {
    Submission {
        prompt,
        output: Vec::new(),
        sampling: Arc::new(SamplingParams { max_tokens, ..SamplingParams::default() }),
        seed: 9,
        priority: 0,
        tenant: tessera_types::TenantId::default(),
        age: Duration::ZERO,
        block_keys: Vec::new(),
    }
}

/// What the sequence must produce undisturbed.
fn expected(submission: &Submission) -> Vec<TokenId> {
    let limits = TableLimits { num_slots: 1, num_blocks: 1, block_size: 1 };
    let model = FakeModel::new(limits, Epoch(1), 2, VOCAB_SIZE);
    let rule =
        DrawRule { sampling: &submission.sampling, eos_token_ids: &[EOS], seed: submission.seed };
    let mut output = submission.output.clone();
    loop {
        let token = model.expected_token(&submission.prompt, &output, rule);
        output.push(token);
        let done = output.len() == submission.sampling.max_tokens as usize;
        if done || (token == EOS && !submission.sampling.ignore_eos) {
            return output;
        }
    }
}

/// A fake executor in which a test can act at the moment a step completes.
struct Scripted {
    inner: FakeExecutor,
    on_collect: Box<dyn FnMut(StepId) -> bool + Send>,
}

impl Executor for Scripted {
    fn begin_epoch(&mut self, start: EpochStart) -> Result<(), ExecutorError> {
        self.inner.begin_epoch(start)
    }
    fn end_epoch(&mut self) -> Result<(), ExecutorError> {
        self.inner.end_epoch()
    }
    fn forward(&mut self, plan: &Arc<StepPlan>) -> Result<(), ExecutorError> {
        self.inner.forward(plan)
    }
    fn sample(&mut self, step: StepId, late: &Arc<LateInputs>) -> Result<(), ExecutorError> {
        self.inner.sample(step, late)
    }
    fn collect(&mut self, step: StepId, deadline: Instant) -> Result<StepOutput, ExecutorError> {
        match (self.on_collect)(step) {
            true => self.inner.collect(step, deadline),
            false => Err(ExecutorError::NotReady { step }),
        }
    }
    fn install_embedding(
        &mut self,
        key: EmbeddingKey,
        rows: Arc<[f32]>,
    ) -> Result<(), ExecutorError> {
        self.inner.install_embedding(key, rows)
    }
    fn drop_embedding(&mut self, key: EmbeddingKey) -> Result<(), ExecutorError> {
        self.inner.drop_embedding(key)
    }
}

pub struct Bench {
    pub engine: Engine,
    pub handle: EngineHandle,
    ends: Receiver<EpochEnd>,
    num_blocks: u32,
}

impl Bench {
    fn new(config: EngineConfig) -> Self {
        Self::of_vocabulary(config, VOCAB_SIZE, NUM_BLOCKS)
    }

    pub fn of_vocabulary(config: EngineConfig, vocab_size: u32, num_blocks: u32) -> Self {
        let executor = FakeExecutor::new(config.scheduler.clone(), 2, vocab_size);
        let mut bench = Self::with(config, Box::new(executor));
        bench.num_blocks = num_blocks;
        bench.begin(1);
        bench
    }

    fn with(config: EngineConfig, executor: Box<dyn Executor>) -> Self {
        let (sender, ends) = bounded(16);
        let observer = Box::new(move |end| sender.try_send(end).expect("few epochs end"));
        let (engine, handle) = Engine::new(config, executor, observer).expect("valid settings");
        Self { engine, handle, ends, num_blocks: NUM_BLOCKS }
    }

    fn begin(&mut self, epoch: u64) {
        assert!(matches!(self.try_begin(epoch, &AbortHandle::new(Epoch(epoch))), Ok(())));
    }

    fn try_begin(&mut self, epoch: u64, abort: &AbortHandle) -> Result<(), EngineError> {
        let start = EpochStart {
            epoch: Epoch(epoch),
            num_blocks: self.num_blocks,
            abort: abort.clone(),
            communicators: Vec::new(),
            plans: None,
        };
        let (sender, reply) = bounded(1);
        let answer = Box::new(move |result| sender.send(result).expect("one reply"));
        self.handle.begin_epoch(start, answer).expect("an empty inbox");
        self.engine.turn();
        reply.try_recv().expect("a reply")
    }

    pub fn submit(&self, submission: Submission) -> (SequenceId, Receiver<Event>) {
        self.submit_to(submission, 100)
    }

    /// With a stream that takes `capacity` events.
    pub fn submit_with_room(&self, submission: Submission, capacity: usize) -> Receiver<Event> {
        self.submit_to(submission, capacity).1
    }

    fn submit_to(&self, submission: Submission, capacity: usize) -> (SequenceId, Receiver<Event>) {
        let (sender, events) = bounded(capacity);
        let id = self.handle.submit(submission, Box::new(sender)).expect("an empty inbox");
        (id, events)
    }

    /// Turns until there is nothing to do.
    pub fn settle(&mut self) {
        for _ in 0..100_000 {
            if self.engine.turn() == Turn::Idle {
                return;
            }
        }
        panic!("the engine does not come to rest");
    }

    /// Turns until no sequence is left, waiting for grammars.
    pub fn settle_with_grammars(&mut self) {
        for _ in 0..100_000 {
            self.settle();
            let load = self.handle.load().scheduler;
            if load.running + load.waiting == 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("a sequence never ended");
    }

    fn arrive(&mut self, sequence: SequenceId, item: u32, num_rows: u32) {
        let rows: Arc<[f32]> = vec![0.5; (num_rows * HIDDEN_SIZE) as usize].into();
        self.handle.media_arrived(sequence, item, rows).expect("an empty inbox");
        self.settle();
    }

    pub fn assert_empty(&self) {
        let load = self.handle.load();
        assert_eq!((load.scheduler.running, load.scheduler.waiting), (0, 0));
        assert_eq!(load.scheduler.num_free_blocks, load.scheduler.num_blocks, "leaked blocks");
    }
}

/// Tokens by output index, checked to be without gaps, and the last event.
pub fn tokens(events: &Receiver<Event>, first_index: usize) -> (Vec<TokenId>, Option<Event>) {
    let mut tokens = Vec::new();
    let mut last = None;
    for event in events.try_iter() {
        if let Event::Token { output_index, token, .. } = event {
            assert_eq!(output_index as usize, first_index + tokens.len(), "lost or repeated");
            tokens.push(token);
        }
        last = Some(event);
    }
    (tokens, last)
}

fn needed(events: &Receiver<Event>) -> Vec<u32> {
    let items = events.try_iter().filter_map(|event| match event {
        Event::MediaNeeded { items } => Some(items),
        _ => None,
    });
    items.flatten().collect()
}

fn group_lost(event: Option<Event>) -> String {
    match event {
        Some(Event::Failed { error: SequenceError::GroupLost { reason, .. } }) => reason,
        other => panic!("expected a lost group, got {other:?}"),
    }
}

#[test]
fn both_depths_give_the_tokens_of_an_undisturbed_run() {
    for depth in [1, 2] {
        let mut bench = Bench::new(config(depth));
        let mut sequences = Vec::new();
        for family in 0..7 {
            let mut submission = submission(prompt(family, &[]), 5 + family * 3);
            if family == 3 {
                submission.output = expected(&submission)[..2].to_vec();
            }
            let (_, events) = bench.submit(submission.clone());
            sequences.push((submission, events));
            bench.engine.turn();
        }
        bench.settle();
        for (submission, events) in sequences {
            let first_index = submission.output.len();
            let (tokens, last) = tokens(&events, first_index);
            assert_eq!(tokens, expected(&submission)[first_index..]);
            let Some(Event::Finished { num_output_tokens, .. }) = last else { panic!("{last:?}") };
            assert_eq!(num_output_tokens as usize, first_index + tokens.len());
        }
        bench.assert_empty();
    }
}

#[test]
fn a_sequence_tells_its_stages_in_order() {
    let mut bench = Bench::new(config(2));
    let (_, events) = bench.submit(submission(prompt(1, &[]), 2));
    bench.settle();
    let events: Vec<Event> = events.try_iter().collect();
    assert_eq!(events[0], Event::Accepted { epoch: Epoch(1) });
    assert_eq!(events[1], Event::Started { num_cached_tokens: 0 });
    assert!(matches!(events[2], Event::Token { output_index: 0, .. }));
    assert!(matches!(events[3], Event::Token { output_index: 1, .. }));
    let Event::Finished { reason, timings, .. } = &events[4] else { panic!("{events:?}") };
    assert!(*reason == FinishReason::Length && timings.queue <= timings.prefill);
}

#[test]
fn what_cannot_be_served_is_refused_through_the_sink() {
    let mut bench = Bench::new(EngineConfig { max_embedding_bytes: 79, ..config(1) });
    let mut unknown = submission(prompt(1, &[]), 4);
    Arc::make_mut(&mut unknown.prompt).tokens[3] = VOCAB_SIZE;
    let (_, unknown) = bench.submit(unknown);
    let (_, too_long) = bench.submit(submission(prompt(1, &[]), 55));
    let (_, overlap) = bench.submit(submission(prompt(1, &[(1, 0, 6), (2, 5, 1)]), 4));
    let (_, too_large) = bench.submit(submission(prompt(1, &[(1, 0, 6), (2, 6, 4)]), 4));
    bench.settle();
    let failed = |events: &Receiver<Event>| match events.try_iter().last() {
        Some(Event::Failed { error }) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(
        failed(&unknown),
        SequenceError::UnknownToken { token: VOCAB_SIZE, index: 3, .. }
    ));
    assert!(matches!(failed(&too_long), SequenceError::Refused(AddError::ContextExceeded { .. })));
    assert!(matches!(failed(&overlap), SequenceError::Refused(AddError::Prompt(_))));
    let error = SequenceError::EmbeddingsTooLarge { bytes: 80, max_bytes: 79 };
    assert_eq!(failed(&too_large), error);
    bench.assert_empty();
    bench.handle.end_epoch("test");
    bench.settle();
    let (_, events) = bench.submit(submission(prompt(1, &[]), 4));
    bench.settle();
    assert_eq!(failed(&events), SequenceError::Refused(AddError::NoEpoch));
}

#[test]
fn an_aborted_sequence_ends_and_frees_its_blocks() {
    let mut bench = Bench::new(config(2));
    let (id, events) = bench.submit(submission(prompt(2, &[]), 40));
    for _ in 0..4 {
        bench.engine.turn();
    }
    bench.handle.abort(id, FinishReason::DeadlineExceeded).expect("an empty inbox");
    bench.settle();
    let (_, last) = tokens(&events, 0);
    assert!(matches!(last, Some(Event::Finished { reason: FinishReason::DeadlineExceeded, .. })));
    bench.assert_empty();
}

#[test]
fn a_client_that_does_not_take_its_tokens_loses_its_sequence_only() {
    let mut bench = Bench::new(config(2));
    let (slow, slow_events) = bounded(3);
    bench.handle.submit(submission(prompt(2, &[]), 30), Box::new(slow)).expect("an empty inbox");
    let (gone, reader) = bounded(9);
    drop(reader);
    bench.handle.submit(submission(prompt(3, &[]), 30), Box::new(gone)).expect("an empty inbox");
    let good = submission(prompt(4, &[]), 30);
    let (_, events) = bench.submit(good.clone());
    bench.settle();
    assert_eq!(tokens(&events, 0).0, expected(&good));
    assert_eq!(slow_events.try_iter().count(), 3);
    assert_eq!(bench.handle.load().num_slow_clients, 1);
    bench.assert_empty();
}

#[test]
fn a_full_inbox_is_busy() {
    let bench = Bench::new(EngineConfig { inbox_capacity: 1, ..config(1) });
    let (id, _events) = bench.submit(submission(prompt(1, &[]), 4));
    assert_eq!(bench.handle.abort(id, FinishReason::Cancelled), Err(SubmitError::Busy));
    drop(bench.engine);
    assert_eq!(bench.handle.abort(id, FinishReason::Cancelled), Err(SubmitError::Stopped));
}

#[test]
fn an_embedding_serves_every_sequence_that_needs_it() {
    let mut bench = Bench::new(config(2));
    let with_image = submission(prompt(1, &[(7, 2, 4)]), 6);
    let (first, first_events) = bench.submit(with_image.clone());
    let (_, second_events) = bench.submit(with_image.clone());
    bench.settle();
    assert_eq!(needed(&first_events), [0]);
    assert!(needed(&second_events).is_empty(), "it is on its way");
    bench.arrive(first, 0, 4);
    for events in [&first_events, &second_events] {
        assert_eq!(tokens(events, 0).0, expected(&with_image));
    }
    // It is kept for the next one, which asks for nothing.
    let (_, events) = bench.submit(with_image.clone());
    bench.settle();
    let all: Vec<Event> = events.try_iter().collect();
    assert!(!all.iter().any(|event| matches!(event, Event::MediaNeeded { .. })), "{all:?}");
    assert!(matches!(all.last(), Some(Event::Finished { .. })));
    bench.assert_empty();
}

#[test]
fn room_for_embeddings_is_reserved_before_they_are_asked_for() {
    let mut bench = Bench::new(config(2));
    let first = submission(prompt(1, &[(1, 1, 4), (2, 6, 2)]), 3);
    let second = submission(prompt(2, &[(3, 1, 5)]), 3);
    let (first_id, first_events) = bench.submit(first.clone());
    let (second_id, second_events) = bench.submit(second.clone());
    bench.settle();
    // 48 of 80 bytes are taken; the second needs 40.
    assert_eq!(needed(&first_events), [0, 1]);
    assert!(needed(&second_events).is_empty());
    bench.arrive(first_id, 0, 4);
    assert!(needed(&second_events).is_empty());
    bench.arrive(first_id, 1, 2);
    assert_eq!(tokens(&first_events, 0).0, expected(&first));
    assert_eq!(needed(&second_events), [0]);
    assert!(bench.handle.load().embedding_bytes <= 80);
    bench.arrive(second_id, 0, 5);
    assert_eq!(tokens(&second_events, 0).0, expected(&second));
    bench.assert_empty();
}

#[test]
fn bad_media_fails_its_own_sequence() {
    let mut bench = Bench::new(config(2));
    let good = submission(prompt(5, &[]), 8);
    let (_, good_events) = bench.submit(good.clone());
    let (broken, broken_events) = bench.submit(submission(prompt(1, &[(1, 1, 4)]), 3));
    let (short, short_events) = bench.submit(submission(prompt(2, &[(2, 1, 4)]), 3));
    bench.engine.turn();
    bench.handle.media_failed(broken, 0, "not an image").expect("an empty inbox");
    bench.arrive(short, 0, 3);
    let (_, last) = tokens(&broken_events, 0);
    let reason = "not an image".to_owned();
    assert_eq!(last, Some(Event::Failed { error: SequenceError::Media { item: 0, reason } }));
    let (_, last) = tokens(&short_events, 0);
    let error = SequenceError::EmbeddingShape { item: 0, expected: 8, got: 6 };
    assert_eq!(last, Some(Event::Failed { error }));
    assert_eq!(tokens(&good_events, 0).0, expected(&good));
    bench.assert_empty();
}

/// Runs a sequence whose epoch is aborted while its third step completes, and returns its tokens.
fn run_into_an_abort(depth: u32, planted: PlantedFaults) -> (Vec<TokenId>, Option<Event>, Bench) {
    let config = EngineConfig { planted, ..config(depth) };
    let abort = AbortHandle::new(Epoch(1));
    let fence = abort.clone();
    let executor = Scripted {
        inner: FakeExecutor::new(config.scheduler.clone(), 2, VOCAB_SIZE),
        on_collect: Box::new(move |step| {
            if step == StepId(4) {
                fence.abort("a follower died");
            }
            true
        }),
    };
    let mut bench = Bench::with(config, Box::new(executor));
    bench.try_begin(1, &abort).expect("no epoch runs");
    let sampling = SamplingParams { max_tokens: 12, ignore_eos: true, ..SamplingParams::default() };
    let with_image =
        Submission { sampling: Arc::new(sampling), ..submission(prompt(1, &[(1, 1, 4)]), 1) };
    let (id, events) = bench.submit(with_image);
    bench.engine.turn();
    bench.arrive(id, 0, 4);
    let (tokens, last) = tokens(&events, 0);
    (tokens, last, bench)
}

#[test]
fn a_step_of_an_aborted_epoch_is_discarded_whole() {
    for depth in [1, 2] {
        let (tokens, last, mut bench) = run_into_an_abort(depth, PlantedFaults::default());
        // Steps 1 to 3 are the prompt in three chunks (the image splits it); step 3 drew one token.
        assert_eq!(tokens.len(), 1, "depth {depth}");
        assert_eq!(group_lost(last), "a follower died");
        let end = bench.ends.try_recv().expect("the observer was told");
        assert_eq!((end.epoch, end.num_sequences), (Epoch(1), 1));
        assert!(end.left.is_ok());
        assert_eq!(bench.handle.load().epoch, None);

        bench.begin(2);
        let again = submission(prompt(1, &[(1, 1, 4)]), 12);
        let (_, events) = bench.submit(again.clone());
        bench.settle();
        let all: Vec<Event> = events.try_iter().collect();
        assert_eq!(all[0], Event::Accepted { epoch: Epoch(2) });
        let asked = all.iter().any(|event| matches!(event, Event::MediaNeeded { .. }));
        assert!(!asked, "embeddings survive the epoch");
        bench.assert_empty();
    }
}

#[test]
fn without_the_abort_flag_a_stale_token_is_delivered() {
    let planted = PlantedFaults { skip_abort_flag: true };
    let (tokens, last, _) = run_into_an_abort(2, planted);
    assert!(tokens.len() > 1, "the test above would notice");
    assert!(matches!(last, Some(Event::Finished { .. })));
}

#[test]
fn an_abort_ends_the_wait_for_a_step_that_never_completes() {
    let abort = AbortHandle::new(Epoch(1));
    let fence = abort.clone();
    let waited = Arc::new(AtomicBool::new(false));
    let (seen, mut polls) = (Arc::clone(&waited), 0);
    let executor = Scripted {
        inner: FakeExecutor::new(config(2).scheduler, 2, VOCAB_SIZE),
        on_collect: Box::new(move |_| {
            polls += 1;
            if polls == 5 {
                seen.store(true, Ordering::Relaxed);
                fence.abort("stuck");
            }
            false
        }),
    };
    let mut bench = Bench::with(config(2), Box::new(executor));
    bench.try_begin(1, &abort).expect("no epoch runs");
    let (_, events) = bench.submit(submission(prompt(1, &[]), 4));
    bench.settle();
    assert!(waited.load(Ordering::Relaxed));
    let (tokens, last) = tokens(&events, 0);
    assert_eq!((tokens, group_lost(last)), (vec![], "stuck".to_owned()));
}

#[test]
fn an_idle_epoch_ends_by_its_flag_too() {
    let mut bench = Bench::new(config(2));
    bench.handle.end_epoch("drained");
    bench.settle();
    assert_eq!(bench.ends.try_recv().expect("the observer was told").reason, "drained");
    bench.begin(2);
    assert_eq!(bench.handle.load().epoch, Some(Epoch(2)));
    let again = bench.try_begin(3, &AbortHandle::new(Epoch(3)));
    assert!(matches!(again, Err(EngineError::EpochRuns { running: Epoch(2) })));
}

fn run_canary(bench: &mut Bench) -> Result<Vec<TokenId>, EngineError> {
    let (sender, reply) = bounded(1);
    let answer = Box::new(move |result| sender.send(result).expect("one reply"));
    bench.handle.canary(answer).expect("an empty inbox");
    bench.settle();
    reply.try_recv().expect("a reply")
}

#[test]
fn the_canary_is_the_same_in_every_epoch_and_beside_any_load() {
    let mut bench = Bench::new(config(2));
    let first = run_canary(&mut bench).expect("an idle group");
    assert_eq!(first.len(), 4);
    for family in 0..4 {
        bench.submit(submission(prompt(family, &[]), 14));
    }
    bench.engine.turn();
    assert_eq!(run_canary(&mut bench).expect("a busy group"), first);
    bench.handle.end_epoch("test");
    bench.settle();
    assert!(matches!(run_canary(&mut bench), Err(EngineError::Canary(_))));
    bench.begin(2);
    assert_eq!(run_canary(&mut bench).expect("a new epoch"), first);
}

#[test]
fn on_its_own_thread_it_serves_until_it_is_stopped() {
    let config = config(2);
    let executor = FakeExecutor::new(config.scheduler.clone(), 2, VOCAB_SIZE);
    let ends = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&ends);
    let observer =
        Box::new(move |end: EpochEnd| told.lock().expect("not poisoned").push(end.reason));
    let (handle, thread) =
        Engine::spawn(config, Box::new(executor), observer).expect("valid settings");
    let start = EpochStart {
        epoch: Epoch(1),
        num_blocks: 16,
        abort: AbortHandle::new(Epoch(1)),
        communicators: Vec::new(),
        plans: None,
    };
    handle
        .begin_epoch(start, Box::new(|result| result.expect("an epoch")))
        .expect("an empty inbox");
    let work = submission(prompt(1, &[]), 20);
    let (sender, events) = bounded(100);
    handle.submit(work.clone(), Box::new(sender)).expect("an empty inbox");
    let all: Vec<Event> = events.iter().collect();
    let tokens = all.iter().filter(|event| matches!(event, Event::Token { .. })).count();
    assert_eq!(tokens, expected(&work).len());
    // One that waits for its image when the engine stops.
    let (sender, events) = bounded(100);
    handle.submit(submission(prompt(1, &[(1, 0, 2)]), 4), Box::new(sender)).expect("room");
    assert_eq!(events.recv(), Ok(Event::Accepted { epoch: Epoch(1) }));
    handle.shutdown();
    assert!(thread.join());
    assert!(matches!(events.iter().last(), Some(Event::Failed { .. })));
    assert_eq!(*ends.lock().expect("not poisoned"), ["the engine is shutting down"]);
    let late = handle.abort(SequenceId(1), FinishReason::Cancelled);
    assert_eq!(late, Err(SubmitError::Stopped));
}
