//! The engine over real ranks: the fixture checkpoint on the reference backend, over threads and TCP.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use tessera_collective::{AbortHandle, CollectiveConfig, Communicator, tcp, threads};
use tessera_engine::{
    Engine, EngineConfig, EngineHandle, EngineThread, EpochEnd, EpochStart, Event, ExecutorError,
    Follower, FollowerAck, GrammarVocabulary, GroupExecutor, LocalRanks, PlanSink, PlanSinkError,
    RankError, RankProgress, RankSpec, SequenceError, Submission,
};
use tessera_kernels::{Backend, ReferenceBackend, StepLimits};
use tessera_model::{ModelConfig, WeightSource};
use tessera_processor::Tokenizer;
use tessera_scheduler::{SchedulerConfig, TableError};
use tessera_types::{
    BlockKey, Epoch, Hash256, LateInputs, Rank, SamplingParams, StepId, StepPlan, TokenId,
    TokenLogprobs,
};

use crate::golden::{self, Golden};
use crate::outputs;

const CASES: [&str; 3] = ["text", "image_odd", "images"];
const LEAVE_TIMEOUT: Duration = Duration::from_secs(20);
pub const NUM_BLOCKS: u32 = 40;

/// Ranks of the tests of same bits: where two add up, a + b = b + a hides an order.
const WORLD_SIZE: u32 = 4;

pub fn scheduler(pipeline_depth: u32) -> SchedulerConfig {
    SchedulerConfig {
        block_size: 16,
        max_running: 4,
        max_waiting: 8,
        max_waiting_per_tenant: 8,
        max_tokens_per_step: 33,
        max_model_len: 256,
        pipeline_depth,
        reserved_blocks: 1,
    }
}

pub fn load_ranks(ranks: impl Iterator<Item = u32>, world_size: u32) -> LocalRanks {
    load_ranks_on(|_| Ok(ReferenceBackend::new()), ranks, world_size)
}

pub fn load_ranks_on<B: Backend>(
    make_backend: impl Fn(Rank) -> tessera_kernels::Result<B> + Clone + Send + 'static,
    ranks: impl Iterator<Item = u32>,
    world_size: u32,
) -> LocalRanks {
    let model = Arc::new(ModelConfig::from_dir(&golden::checkpoint()).expect("a valid config"));
    let limits = scheduler(1);
    let spec = |rank| RankSpec {
        rank: Rank(rank),
        world_size,
        model: Arc::clone(&model),
        weights: WeightSource::Checkpoint(golden::checkpoint()),
        limits: StepLimits {
            max_tokens: limits.max_tokens_per_step,
            max_sequences: limits.num_slots(),
            max_blocks_per_sequence: limits.max_blocks_per_sequence(),
            max_visual_rows: limits.max_tokens_per_step,
            num_real_tokens: model.text.vocab_size as u32,
        },
        block_size: limits.block_size,
    };
    LocalRanks::load(ranks.map(spec).collect(), make_backend).expect("the fixture loads")
}

pub struct Group {
    pub handle: EngineHandle,
    _thread: EngineThread,
    ends: Receiver<EpochEnd>,
}

impl Group {
    pub fn start(ranks: LocalRanks, pipeline_depth: u32) -> Self {
        Self::start_with(ranks, scheduler(pipeline_depth))
    }

    pub fn start_with(ranks: LocalRanks, scheduler: SchedulerConfig) -> Self {
        let eos_token_ids = vec![2050];
        let tokenizer = Tokenizer::load(&golden::checkpoint().join("tokenizer.json"));
        let tokenizer = tokenizer.expect("the fixture's tokenizer");
        let config = EngineConfig {
            scheduler,
            hidden_size: 256,
            vocab_size: 2176,
            grammar_vocabulary: Some(GrammarVocabulary::of(tokenizer, eos_token_ids.clone())),
            eos_token_ids,
            poll_interval: Duration::from_millis(5),
            ..EngineConfig::default()
        };
        let executor = Box::new(GroupExecutor::new(ranks, LEAVE_TIMEOUT));
        let (sender, ends) = bounded(16);
        let observer = Box::new(move |end| sender.try_send(end).expect("few epochs end"));
        let (handle, thread) = Engine::spawn(config, executor, observer).expect("valid settings");
        Self { handle, _thread: thread, ends }
    }

    fn begin(&self, start: EpochStart) {
        let (sender, reply) = bounded(1);
        let answer = Box::new(move |result| sender.send(result).expect("one reply"));
        self.handle.begin_epoch(start, answer).expect("an empty inbox");
        reply.recv().expect("a reply").expect("the epoch begins");
    }

    pub fn begin_threads(&self, epoch: u64, world_size: u32, num_blocks: u32) -> AbortHandle {
        let abort = AbortHandle::new(Epoch(epoch));
        let communicators = threads::group_with(world_size, &abort, &CollectiveConfig::default());
        let start = EpochStart {
            epoch: Epoch(epoch),
            num_blocks,
            abort: abort.clone(),
            communicators,
            plans: None,
        };
        self.begin(start);
        abort
    }

    pub fn submit(&self, golden: &Golden, max_tokens: u32) -> Receiver<Event> {
        self.submit_with(golden, max_tokens, Vec::new())
    }

    fn submit_with(
        &self,
        golden: &Golden,
        max_tokens: u32,
        block_keys: Vec<BlockKey>,
    ) -> Receiver<Event> {
        let sampling = SamplingParams {
            max_tokens,
            ignore_eos: true,
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        self.submit_sampled(golden, sampling, block_keys)
    }

    pub fn submit_sampled(
        &self,
        golden: &Golden,
        sampling: SamplingParams,
        block_keys: Vec<BlockKey>,
    ) -> Receiver<Event> {
        let submission = Submission {
            prompt: Arc::clone(&golden.prompt),
            output: Vec::new(),
            sampling: Arc::new(sampling),
            seed: 1,
            priority: 0,
            tenant: tessera_types::TenantId::default(),
            age: Duration::ZERO,
            block_keys,
        };
        let (sender, events) = bounded(200);
        let id = self.handle.submit(submission, Box::new(sender)).expect("an empty inbox");
        // What an earlier sequence left on rank 0 is not asked for again.
        let asked = |event| match event {
            Event::MediaNeeded { .. } => Some(true),
            Event::Started { .. } => Some(false),
            _ => None,
        };
        if !golden.embeddings.is_empty() && events.iter().find_map(asked).expect("a live stream") {
            for (item, rows) in golden.embeddings.iter().enumerate() {
                let rows = Arc::clone(rows);
                self.handle.media_arrived(id, item as u32, rows).expect("an empty inbox");
            }
        }
        events
    }

    /// Runs all cases at once, in one batch.
    fn run(&self, cases: &[Golden]) -> Vec<Vec<Drawn>> {
        let streams: Vec<_> = cases.iter().map(|golden| self.submit(golden, 32)).collect();
        streams.iter().map(finished).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.handle.shutdown();
    }
}

/// A token and its log probabilities, to be compared bit by bit.
pub type Drawn = (TokenId, Option<TokenLogprobs>);

/// Everything a sequence draws; it must finish.
pub fn finished(events: &Receiver<Event>) -> Vec<Drawn> {
    let (drawn, last) = drain(events);
    assert!(matches!(last, Event::Finished { .. }), "{last:?}");
    drawn
}

fn drain(events: &Receiver<Event>) -> (Vec<Drawn>, Event) {
    let mut drawn = Vec::new();
    for event in events {
        match event {
            Event::Token { output_index, token, logprobs } => {
                assert_eq!(output_index as usize, drawn.len(), "lost or repeated");
                drawn.push((token, logprobs));
            }
            Event::Finished { .. } | Event::Failed { .. } => return (drawn, event),
            _ => {}
        }
    }
    panic!("the stream ended without a last event");
}

fn cases() -> Vec<Golden> {
    let salted = CASES.iter().zip(0..);
    salted.map(|(case, salt)| golden::load(case, salt)).collect()
}

pub fn tokens(drawn: &[Drawn]) -> Vec<TokenId> {
    drawn.iter().map(|(token, _)| *token).collect()
}

#[test]
fn a_batch_draws_the_reference_tokens_at_every_degree_and_depth() {
    let cases = cases();
    for (world_size, depth) in [(1, 2), (2, 1), (2, 2), (4, 2)] {
        let group = Group::start(load_ranks(0..world_size, world_size), depth);
        group.begin_threads(1, world_size, NUM_BLOCKS);
        for (golden, drawn) in cases.iter().zip(group.run(&cases)) {
            assert_eq!(tokens(&drawn), golden.greedy_tokens, "degree {world_size}, depth {depth}");
        }
    }
}

#[test]
fn same_bits_overlap_on_off() {
    let cases = cases();
    let at_depth = |depth| {
        let group = Group::start(load_ranks(0..WORLD_SIZE, WORLD_SIZE), depth);
        group.begin_threads(1, WORLD_SIZE, NUM_BLOCKS);
        group.run(&cases)
    };
    assert_eq!(at_depth(2), at_depth(1));
}

#[test]
fn same_bits_after_preemption() {
    let cases = cases();
    let group = Group::start(load_ranks(0..WORLD_SIZE, WORLD_SIZE), 2);
    group.begin_threads(1, WORLD_SIZE, NUM_BLOCKS);
    let alone: Vec<_> = cases.iter().map(|golden| finished(&group.submit(golden, 32))).collect();
    assert!(alone.iter().flatten().all(|(_, logprobs)| logprobs.is_some()));
    assert_eq!(group.run(&cases), alone);
    group.handle.end_epoch("a smaller cache");
    group.ends.recv().expect("the observer is told");
    // Each begins with 3 blocks and ends with 5; of these 12, one is the reserve.
    group.begin_threads(2, WORLD_SIZE, 12);
    let crowded = [0, 1, 1].map(|case| (case, group.submit(&cases[case], 32)));
    for (case, events) in &crowded {
        assert_eq!(finished(events), alone[*case]);
    }
    let load = group.handle.load().scheduler;
    assert!(load.num_preemptions > 0, "{load:?}");
}

#[test]
fn same_bits_prefix_hit() {
    let group = Group::start(load_ranks(0..WORLD_SIZE, WORLD_SIZE), 2);
    group.begin_threads(1, WORLD_SIZE, NUM_BLOCKS);
    let golden = golden::load("images", 0);
    let keys: Vec<_> = (0..5).map(|block| BlockKey(Hash256([block; 32]))).collect();
    let mut cached = Vec::new();
    let mut run = || {
        let events = group.submit_with(&golden, 32, keys.clone());
        let (drawn, last) = drain(&events);
        let Event::Finished { num_cached_tokens, .. } = last else { panic!("{last:?}") };
        cached.push(num_cached_tokens);
        drawn
    };
    assert_eq!(run(), run());
    // Five full blocks; the last one ends inside the second image.
    assert_eq!(cached, [0, 80]);
}

/// What a leader sends its follower.
enum Message {
    Plan(StepPlan),
    Late(StepId, LateInputs),
}

/// The plan stream of a test; its edit may change a plan or swallow it.
struct Stream<F> {
    messages: Sender<Message>,
    edit: F,
}

impl<F: FnMut(StepPlan) -> Option<StepPlan> + Send> PlanSink for Stream<F> {
    fn plan(&mut self, plan: &Arc<StepPlan>) -> Result<(), PlanSinkError> {
        let Some(plan) = (self.edit)(StepPlan::clone(plan)) else { return Ok(()) };
        self.messages.try_send(Message::Plan(plan)).map_err(|_| PlanSinkError::Full)
    }

    fn late(&mut self, step: StepId, late: &Arc<LateInputs>) -> Result<(), PlanSinkError> {
        let late = Message::Late(step, LateInputs::clone(late));
        self.messages.try_send(late).map_err(|_| PlanSinkError::Full)
    }
}

/// How a follower's epoch went.
type FollowerEnd = (Follower, Result<FollowerAck, ExecutorError>);

/// A follower of one epoch: takes messages until the stream ends or something fails.
fn follow(
    mut follower: Follower,
    epoch: u64,
    abort: AbortHandle,
    communicators: Vec<Communicator>,
    messages: Receiver<Message>,
) -> FollowerEnd {
    let serve = |follower: &mut Follower| {
        follower.begin_epoch(Epoch(epoch), NUM_BLOCKS, abort, communicators)?;
        loop {
            match messages.recv_timeout(Duration::from_millis(5)) {
                Ok(Message::Plan(plan)) => follower.plan(plan)?,
                Ok(Message::Late(step, late)) => follower.late(step, late)?,
                Err(error) if error.is_timeout() => {
                    follower.beat()?;
                    follower.ack()?;
                }
                Err(_) => {
                    follower.beat()?;
                    return wait_until_complete(follower);
                }
            }
        }
    };
    let outcome = serve(&mut follower);
    follower.end_epoch("the plan stream ended").expect("the ranks leave");
    (follower, outcome)
}

fn wait_until_complete(follower: &mut Follower) -> Result<FollowerAck, ExecutorError> {
    loop {
        let ack = follower.ack()?;
        if ack.completed == ack.received {
            return Ok(ack);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Two processes' worth of one epoch over TCP, each with half of the ranks: begins it on the group, and
/// follows in a thread.
fn begin_tcp(
    group: &Group,
    follower: Follower,
    epoch: u64,
    edit: impl FnMut(StepPlan) -> Option<StepPlan> + Send + 'static,
) -> (AbortHandle, JoinHandle<FollowerEnd>) {
    let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let config = CollectiveConfig::default();
    let deadline = Instant::now() + Duration::from_secs(60);
    let (leader_abort, follower_abort) =
        (AbortHandle::new(Epoch(epoch)), AbortHandle::new(Epoch(epoch)));
    let half = follower.ranks().ranks().len() as u32;
    let world_size = 2 * half;
    let bound = tcp::Root::bind(SocketAddr::new(localhost, 0), world_size, &leader_abort, &config);
    let (root, id) = bound.expect("a free port");
    let (sender, messages) = bounded(16);
    let join = |rank: u32, abort: &AbortHandle| {
        let (id, config, abort) = (id, config.clone(), abort.clone());
        std::thread::spawn(move || {
            tcp::connect(&id, localhost, Rank(rank), world_size, deadline, &abort, &config)
        })
    };
    let beside: Vec<_> = (1..half).map(|rank| join(rank, &leader_abort)).collect();
    let theirs: Vec<_> = (half..world_size).map(|rank| join(rank, &follower_abort)).collect();
    let joined = |joins: Vec<JoinHandle<_>>| {
        let joined = joins.into_iter().map(|join| join.join().expect("no panic"));
        joined.collect::<Result<Vec<Communicator>, _>>().expect("the ranks join")
    };
    let mut communicators = vec![root.accept(deadline).expect("the others join")];
    communicators.extend(joined(beside));
    let theirs = joined(theirs);
    let following =
        std::thread::spawn(move || follow(follower, epoch, follower_abort, theirs, messages));
    group.begin(EpochStart {
        epoch: Epoch(epoch),
        num_blocks: NUM_BLOCKS,
        abort: leader_abort.clone(),
        communicators,
        plans: Some(Box::new(Stream { messages: sender, edit })),
    });
    (leader_abort, following)
}

#[test]
fn same_bits_tcp_equals_threads() {
    let cases = cases();
    let group = Group::start(load_ranks(0..WORLD_SIZE, WORLD_SIZE), 2);
    group.begin_threads(1, WORLD_SIZE, NUM_BLOCKS);
    let over_threads = group.run(&cases);
    let constrained = outputs::constrained(&group, &cases[0]);
    drop(group);

    let half = WORLD_SIZE / 2;
    let group = Group::start(load_ranks(0..half, WORLD_SIZE), 2);
    let follower = Follower::new(load_ranks(half..WORLD_SIZE, WORLD_SIZE), LEAVE_TIMEOUT);
    let progress = follower.ranks().progress();
    let (_, following) = begin_tcp(&group, follower, 1, Some);
    assert_eq!(group.run(&cases), over_threads);
    assert_eq!(outputs::constrained(&group, &cases[0]), constrained);
    // A step that was begun before the last sequence was found finished may still run on the follower.
    let is_settled = || {
        let load = group.handle.load();
        let has_completed = |rank: &RankProgress| rank.completed() == load.completed_step;
        load.scheduler.running == 0 && progress.iter().all(has_completed)
    };
    while !is_settled() {
        std::thread::sleep(Duration::from_millis(1));
    }
    group.handle.end_epoch("test");
    let end = group.ends.recv().expect("the observer is told");
    assert!(end.left.is_ok(), "{end:?}");
    let (_, outcome) = following.join().expect("no panic");
    let ack = outcome.expect("a whole stream");
    // At least 32 steps that drew a token, each through the four layers of the checkpoint.
    assert!(ack.received >= StepId(32) && ack.completed == ack.received, "{ack:?}");
    assert!(ack.progress >= 4 * 32 * u64::from(half) && ack.layer_us > 0, "{ack:?}");
    assert_eq!(progress.iter().map(RankProgress::layers).sum::<u64>(), ack.progress);
}

#[test]
fn a_rank_aborted_inside_a_step_delivers_nothing_and_serves_the_next_epoch() {
    let cases = cases();
    let group = Group::start(load_ranks(0..1, 2), 2);
    let follower = Follower::new(load_ranks(1..2, 2), LEAVE_TIMEOUT);
    // From its fifth plan on the follower hears nothing: rank 0 waits in a collective.
    let swallowed = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&swallowed);
    let edit = move |plan: StepPlan| {
        let goes = plan.step < StepId(5);
        seen.fetch_or(!goes, Ordering::Relaxed);
        goes.then_some(plan)
    };
    let (abort, following) = begin_tcp(&group, follower, 1, edit);
    let events = group.submit(&cases[0], 32);
    while !swallowed.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(1));
    }
    abort.abort("a follower is gone");
    let (drawn, last) = drain(&events);
    // Two steps of prompt, then one token each in steps 2 to 4 at most.
    assert!(drawn.len() <= 3, "{drawn:?}");
    assert_eq!(tokens(&drawn), cases[0].greedy_tokens[..drawn.len()]);
    let Event::Failed { error: SequenceError::GroupLost { reason, .. } } = last else {
        panic!("{last:?}")
    };
    assert_eq!(reason, "a follower is gone");
    let end = group.ends.recv().expect("the observer is told");
    assert!(end.left.is_ok(), "the rank left the collective: {end:?}");
    let (follower, _) = following.join().expect("no panic");

    let (_, following) = begin_tcp(&group, follower, 2, Some);
    for (golden, drawn) in cases.iter().zip(group.run(&cases)) {
        assert_eq!(tokens(&drawn), golden.greedy_tokens);
    }
    group.handle.shutdown();
    following.join().expect("no panic").1.expect("a whole stream");
}

#[test]
fn a_follower_that_disagrees_ends_the_epoch() {
    let group = Group::start(load_ranks(0..1, 2), 2);
    let follower = Follower::new(load_ranks(1..2, 2), LEAVE_TIMEOUT);
    let edit = |mut plan: StepPlan| {
        plan.table_digest ^= u64::from(plan.step == StepId(3));
        Some(plan)
    };
    let (_, following) = begin_tcp(&group, follower, 1, edit);
    let events = group.submit(&golden::load("text", 0), 32);
    let (drawn, last) = drain(&events);
    assert!(drawn.len() <= 1, "step 2 drew the first token, step 3 never ran: {drawn:?}");
    assert!(matches!(last, Event::Failed { error: SequenceError::GroupLost { .. } }), "{last:?}");
    let (_, outcome) = following.join().expect("no panic");
    let Err(ExecutorError::Rank { rank: Rank(1), source: RankError::Table(error) }) = outcome
    else {
        panic!("{outcome:?}")
    };
    assert!(matches!(error, TableError::DigestMismatch { step: StepId(3), .. }));
}

#[test]
fn the_canary_runs_through_all_ranks() {
    let mut all = Vec::new();
    for world_size in [1, 2] {
        let ranks = load_ranks(0..world_size, world_size);
        let progress = ranks.progress();
        let group = Group::start(ranks, 2);
        group.begin_threads(1, world_size, NUM_BLOCKS);
        let (sender, reply) = bounded(1);
        let answer = Box::new(move |result| sender.send(result).expect("one reply"));
        group.handle.canary(answer).expect("an empty inbox");
        all.push(reply.recv().expect("a reply").expect("the canary's tokens"));
        assert!(progress.iter().all(|rank| rank.layers() >= 4));
    }
    assert_eq!((all[0].len(), &all[0]), (4, &all[1]), "margins of the fixture are wide");
}

#[test]
fn a_rank_that_cannot_load_says_why() {
    let model = Arc::new(ModelConfig::from_dir(&golden::checkpoint()).expect("a valid config"));
    let spec = RankSpec {
        rank: Rank(0),
        world_size: 3,
        model,
        weights: WeightSource::Checkpoint(golden::checkpoint()),
        limits: StepLimits::default(),
        block_size: 16,
    };
    let Err(error) = LocalRanks::load(vec![spec], |_| Ok(ReferenceBackend::new())) else {
        panic!("a degree of 3 does not divide 2 KV heads")
    };
    assert!(matches!(error, RankError::Model(_)), "{error:?}");
}
