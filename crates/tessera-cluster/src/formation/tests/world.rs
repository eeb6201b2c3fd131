//! A group of `Formation` machines over a model of the store, of communicators and of plan streams.
//!
//! Time jumps from event to event; delays come from a seeded generator. After every event the
//! invariants are judged: at most one epoch is complete and serving, the active epoch only grows, and
//! no committed proposal leaves out every member that may still run the active epoch.

mod invariants;
mod store;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use tessera_types::{Hash256, InstanceId, ModelFingerprint, NumericsId, Rank};
use uuid::Uuid;

use super::super::*;
use crate::epoch_end::EpochEnd;
use crate::keys::{ClusterName, StoreKey};
use crate::records::{DecoderCapacity, EpochRecord, MemberRole};
use crate::seed::mix64;

/// Lease time of a process that died or was frozen.
const LEASE_MS: u64 = 10_000;

/// What a test does to the world.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The process dies; a new instance starts on the same host.
    Kill { slot: usize, restart_ms: u64 },
    /// The process does nothing for a while, then goes on.
    Freeze { slot: usize, for_ms: u64 },
    /// The member key vanishes although the process lives; it is registered anew later.
    LoseLease { slot: usize, for_ms: u64 },
    /// The process neither hears the store nor reaches it.
    CutStore { slot: usize, for_ms: u64 },
    /// The plan stream of this slot breaks.
    BreakStream { slot: usize },
    /// The next transaction is applied, but its answer is lost.
    LoseAnswer,
}

impl Fault {
    /// The same fault in a group of `num_slots`.
    pub fn within(mut self, num_slots: usize) -> Self {
        match &mut self {
            Self::Kill { slot, .. }
            | Self::Freeze { slot, .. }
            | Self::LoseLease { slot, .. }
            | Self::CutStore { slot, .. }
            | Self::BreakStream { slot } => *slot %= num_slots,
            Self::LoseAnswer => {}
        }
        self
    }
}

/// A record in the store.
#[derive(Debug, Clone)]
enum Value {
    Member(MemberInfo),
    Epoch(EpochRecord),
    Ready(ReadyRecord),
    Id(IdRecord),
    Active(ActiveRecord),
}

#[derive(Debug, Clone)]
struct Stored {
    value: Value,
    create_revision: i64,
    mod_revision: i64,
}

struct Process {
    slot: usize,
    instance: InstanceId,
    info: MemberInfo,
    machine: Formation,
    watch: VecDeque<Event>,
    alive: bool,
    frozen_until: u64,
    cut_until: u64,
    /// Epoch whose plans it would execute: from `InitCommunicator` until `Leave`.
    joined: Option<(Epoch, Vec<u8>)>,
    comm_ready: bool,
    highest_joined: Epoch,
}

/// Something due at a process.
#[derive(Debug, Clone)]
enum Due {
    Deliver(Event),
    /// The next event of the process's watch, which keeps the order of the store's revisions.
    Watch,
    Tick,
    /// A new instance for a slot starts.
    Start {
        slot: usize,
    },
    /// The key of an instance's lease ends.
    EndLease,
    /// The process writes its member key again.
    Register,
    StartCanary(Epoch),
}

pub struct World {
    keys: Keys,
    group: GroupName,
    num_slots: usize,
    now: u64,
    rng: u64,
    revision: i64,
    store: BTreeMap<String, Stored>,
    backup: Option<BTreeMap<String, Stored>>,
    processes: Vec<Process>,
    /// (time, order, process, what); `Due` is kept apart because it has no order.
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    due: BTreeMap<u64, Due>,
    order: u64,
    proposals: usize,
    probes: usize,
    lose_answer: bool,
    highest_active: Epoch,
    foreign_slot: Option<usize>,
}

impl World {
    pub fn new(num_slots: usize, seed: u64) -> Self {
        Self::build(num_slots, seed, None)
    }

    /// The last slot has other weights than the rest.
    pub fn with_foreign_weights(num_slots: usize, seed: u64) -> Self {
        Self::build(num_slots, seed, Some(num_slots - 1))
    }

    fn build(num_slots: usize, seed: u64, foreign_slot: Option<usize>) -> Self {
        let mut world = Self {
            keys: Keys::new(ClusterName::new("c").unwrap()),
            group: GroupName::new("g").unwrap(),
            num_slots,
            now: 1,
            rng: seed,
            revision: 1,
            store: BTreeMap::new(),
            backup: None,
            processes: Vec::new(),
            queue: BinaryHeap::new(),
            due: BTreeMap::new(),
            order: 0,
            proposals: 0,
            probes: 0,
            lose_answer: false,
            highest_active: Epoch(0),
            foreign_slot,
        };
        for slot in 0..num_slots {
            world.start(slot);
        }
        world
    }

    // What tests ask.

    pub fn assert_serving(&self) {
        let active = self.active().expect("an epoch is active");
        assert_eq!(active.slots.len(), self.num_slots);
        for slot in 0..self.num_slots {
            let process = self.current(slot);
            let state = process.machine.state();
            let obstacle = process.machine.obstacle();
            assert_eq!(state, State::Serving(active.epoch), "slot {slot}: {obstacle:?}");
        }
    }

    pub fn active_epoch(&self) -> u64 {
        self.active().map_or(0, |record| record.epoch.0)
    }

    pub fn proposals(&self) -> usize {
        self.proposals
    }

    /// Probes that found their target.
    pub fn probes(&self) -> usize {
        self.probes
    }

    pub fn instance(&self, slot: usize) -> InstanceId {
        self.current(slot).instance
    }

    pub fn obstacle(&self, slot: usize) -> Option<&Obstacle> {
        self.current(slot).machine.obstacle()
    }

    pub fn excluded(&self) -> Vec<InstanceId> {
        match self.store.get(&self.keys.epoch(&self.group)).map(|stored| &stored.value) {
            Some(Value::Epoch(record)) => record.excluded.clone(),
            _ => Vec::new(),
        }
    }

    fn active(&self) -> Option<&ActiveRecord> {
        match self.store.get(&self.keys.active(&self.group)).map(|stored| &stored.value) {
            Some(Value::Active(record)) => Some(record),
            _ => None,
        }
    }

    /// The latest instance of a slot.
    fn current(&self, slot: usize) -> &Process {
        self.processes.iter().rfind(|process| process.slot == slot).expect("every slot started")
    }

    fn current_index(&self, slot: usize) -> usize {
        self.processes.iter().rposition(|p| p.slot == slot).expect("every slot started")
    }

    // What tests do.

    pub fn run_for_ms(&mut self, ms: u64) {
        let until = self.now + ms;
        while let Some(&Reverse((at, order, process))) = self.queue.peek() {
            if at > until {
                break;
            }
            self.queue.pop();
            self.now = self.now.max(at);
            let due = self.due.remove(&order).expect("queued once");
            self.play(process, due);
            self.judge();
        }
        self.now = until;
    }

    pub fn inject(&mut self, fault: Fault) {
        match fault {
            Fault::Kill { slot, restart_ms } => self.kill(slot, restart_ms),
            Fault::Freeze { slot, for_ms } => self.freeze(slot, for_ms),
            Fault::LoseLease { slot, for_ms } => {
                let process = self.current_index(slot);
                self.delete_leased(process);
                self.push(process, self.now + for_ms, Due::Register);
            }
            Fault::CutStore { slot, for_ms } => {
                let process = self.current_index(slot);
                self.processes[process].cut_until = self.now + for_ms;
                if for_ms >= LEASE_MS {
                    self.push(process, self.now + LEASE_MS, Due::EndLease);
                }
            }
            Fault::BreakStream { slot } => {
                let process = self.current_index(slot);
                if let Some((epoch, _)) = self.processes[process].joined.clone() {
                    self.break_streams(process, epoch, false);
                    let member = self.processes[self.current_index(0)].instance;
                    let detail = "reset".to_owned();
                    let reason = EndReason::StreamBroken { member, detail };
                    let event = Event::Ended(EpochEnd { epoch, reason });
                    self.push(process, self.now + 5, Due::Deliver(event));
                }
            }
            Fault::LoseAnswer => self.lose_answer = true,
        }
        self.judge();
    }

    /// A process whose key is gone registers again.
    pub fn reregister(&mut self, slot: usize) {
        let process = self.current_index(slot);
        self.push(process, self.now + 1, Due::Register);
    }

    /// Somebody proposes an epoch of the members that are serving.
    pub fn forge_proposal(&mut self) {
        let key = self.keys.epoch(&self.group);
        let Some(Value::Epoch(mut record)) = self.store.get(&key).map(|s| s.value.clone()) else {
            panic!("there is an epoch record");
        };
        record.counter = record.counter.next();
        if let Some(spec) = &mut record.spec {
            spec.epoch = record.counter;
        }
        self.put(key, Value::Epoch(record));
    }

    /// The store forgets everything but the first epoch, and processes register again.
    pub fn restore_first_backup(&mut self) {
        let backup = self.backup.clone().expect("a first epoch was active");
        let (epoch, active) = (self.keys.epoch(&self.group), self.keys.active(&self.group));
        for key in [epoch, active] {
            let value = backup[&key].value.clone();
            self.put(key, value);
        }
        self.highest_active = Epoch(0);
        for slot in 0..self.num_slots {
            let process = self.current_index(slot);
            self.delete_leased(process);
            self.push(process, self.now + 50, Due::Register);
        }
    }

    // Processes.

    fn start(&mut self, slot: usize) {
        let instance = InstanceId(Uuid::from_u64_pair(self.random(), self.random()));
        let info = self.member(slot, instance);
        let machine =
            Formation::new(FormationConfig::default(), self.keys.clone(), info.clone()).unwrap();
        let process = self.processes.len();
        self.processes.push(Process {
            slot,
            instance,
            info,
            machine,
            watch: VecDeque::new(),
            alive: true,
            frozen_until: 0,
            cut_until: 0,
            joined: None,
            comm_ready: false,
            highest_joined: Epoch(0),
        });
        let listing: Vec<Stored> = self.store.values().cloned().collect();
        for stored in listing {
            let event = self.event_of(&stored);
            self.deliver_by_watch(process, event);
        }
        self.deliver_by_watch(process, Event::Synced);
        let at = self.now + 20 + self.random() % 50;
        self.push(process, at, Due::Register);
    }

    fn member(&self, slot: usize, instance: InstanceId) -> MemberInfo {
        let weights = if self.foreign_slot == Some(slot) { 9 } else { 1 };
        MemberInfo {
            instance,
            address: format!("{instance}:1"),
            build: String::new(),
            model: Some(ModelIdentity {
                name: "m".into(),
                language_fingerprint: ModelFingerprint(Hash256([weights; 32])),
                vision_fingerprint: ModelFingerprint(Hash256([2; 32])),
                language_numerics: NumericsId(Hash256([3; 32])),
                vision_numerics: NumericsId(Hash256([4; 32])),
            }),
            role: MemberRole::Decoder(DecoderMember {
                group: self.group.clone(),
                slot: slot as u32,
                num_slots: self.num_slots as u32,
                first_rank: Rank(slot as u32),
                num_ranks: 1,
                world_size: self.num_slots as u32,
                device: "cpu".into(),
                slot_lock_host: Some("host".into()),
                last_epoch: Epoch(0),
                capacity: DecoderCapacity {
                    num_kv_blocks: 100 + slot as u32,
                    block_size: 16,
                    max_sequences: 8,
                    max_model_len: 1024,
                },
            }),
        }
    }

    fn kill(&mut self, slot: usize, restart_ms: u64) {
        let process = self.current_index(slot);
        if !self.processes[process].alive {
            return;
        }
        self.processes[process].alive = false;
        if let Some((epoch, _)) = self.processes[process].joined.take() {
            self.break_streams(process, epoch, false);
        }
        self.push(process, self.now + LEASE_MS, Due::EndLease);
        self.push(process, self.now + restart_ms, Due::Start { slot });
    }

    fn freeze(&mut self, slot: usize, for_ms: u64) {
        let process = self.current_index(slot);
        let until = self.now + for_ms;
        self.processes[process].frozen_until = self.processes[process].frozen_until.max(until);
        if for_ms >= LEASE_MS {
            self.push(process, self.now + LEASE_MS, Due::EndLease);
        }
        if let Some((epoch, _)) = self.processes[process].joined.clone()
            && for_ms >= 3_000
        {
            self.break_streams(process, epoch, true);
        }
    }

    /// Every other member of the epoch learns that this one is lost; a follower hears only the leader,
    /// and the others through it.
    fn break_streams(&mut self, lost: usize, epoch: Epoch, frozen: bool) {
        let member = self.processes[lost].instance;
        for other in 0..self.processes.len() {
            let joined = self.processes[other].joined.as_ref().is_some_and(|(e, _)| *e == epoch);
            if other == lost || !joined {
                continue;
            }
            let direct = self.processes[lost].slot == 0 || self.processes[other].slot == 0;
            let by = self.processes[self.current_index(0)].instance;
            let reason = match (direct, frozen) {
                (true, true) => EndReason::Frozen { member },
                (true, false) => EndReason::StreamBroken { member, detail: "reset".into() },
                (false, _) => EndReason::Aborted { by, detail: "peer lost".into() },
            };
            let delay = if frozen { 3_000 } else { 5 } + self.random() % 30;
            let event = Event::Ended(EpochEnd { epoch, reason });
            self.push(other, self.now + delay, Due::Deliver(event));
        }
    }

    fn play(&mut self, process: usize, due: Due) {
        if let Due::Start { slot } = due {
            return self.start(slot);
        }
        if let Due::EndLease = due {
            return self.delete_leased(process);
        }
        if !self.processes[process].alive {
            return;
        }
        let blocked = self.processes[process].frozen_until.max(match due {
            Due::Register => self.processes[process].cut_until,
            _ => 0,
        });
        if blocked > self.now {
            return self.push(process, blocked, due);
        }
        match due {
            Due::Register => self.register(process),
            Due::StartCanary(epoch) => self.run_canary(process, epoch),
            Due::Deliver(event) => self.feed(process, event),
            Due::Watch => {
                let event = self.processes[process].watch.pop_front().expect("one per wake-up");
                self.feed(process, event);
            }
            Due::Tick => self.feed(process, Event::Tick),
            Due::Start { .. } | Due::EndLease => {}
        }
    }

    fn feed(&mut self, process: usize, event: Event) {
        let now = Duration::from_millis(self.now);
        let actions = self.processes[process].machine.on(event, now);
        if let Some(at) = self.processes[process].machine.deadline() {
            let at = (at.as_millis() as u64).max(self.now + 1);
            self.push(process, at, Due::Tick);
        }
        for action in actions {
            self.act(process, action);
        }
    }

    fn act(&mut self, process: usize, action: Action) {
        let delay = 1 + self.random() % 20;
        let reply = |event| Due::Deliver(event);
        match action {
            Action::Propose { record, compares } => {
                let epoch = record.counter;
                let shares = self.may_succeed(&record);
                let key = self.keys.epoch(&self.group);
                let outcome = self.txn(process, &compares, key, Value::Epoch(*record));
                if outcome.1 {
                    self.proposals += 1;
                    assert!(shares, "epoch {epoch} left out members that may still serve");
                }
                let event = Event::Proposed { epoch, outcome: outcome.0 };
                self.push(process, self.now + delay, reply(event));
            }
            Action::Activate { record, compares } => {
                let epoch = record.epoch;
                let key = self.keys.active(&self.group);
                let outcome = self.txn(process, &compares, key, Value::Active(*record));
                if outcome.1 && self.backup.is_none() {
                    self.backup = Some(self.store.clone());
                }
                let event = Event::Activated { epoch, outcome: outcome.0 };
                self.push(process, self.now + delay, reply(event));
            }
            Action::PublishLastEpoch { epoch } => {
                let MemberRole::Decoder(place) = &mut self.processes[process].info.role else {
                    unreachable!("all members are decoders")
                };
                place.last_epoch = epoch;
                let key = self.keys.member(self.processes[process].instance);
                if self.reaches_store(process) && self.store.contains_key(&key) {
                    let value = Value::Member(self.processes[process].info.clone());
                    self.put(key, value);
                }
            }
            Action::MakeId { epoch } => {
                let id = self.random().to_le_bytes().to_vec();
                self.push(process, self.now + delay, reply(Event::IdMade { epoch, id }));
            }
            Action::PutId { record } => {
                let key = self.keys.id(&self.group, record.epoch);
                if self.reaches_store(process) && !self.store.contains_key(&key) {
                    self.put(key, Value::Id(record));
                }
            }
            Action::PutReady { record } => {
                let key = self.keys.ready(&self.group, record.epoch, record.instance);
                if self.reaches_store(process) {
                    self.put(key, Value::Ready(record));
                }
            }
            Action::InitCommunicator { spec, id, .. } => self.init(process, &spec, id),
            Action::RunCanary { epoch } => {
                self.push(process, self.now + delay, Due::StartCanary(epoch));
            }
            Action::Serve { .. } => {}
            Action::Leave { epoch, .. } => {
                if self.processes[process].joined.take().is_some() {
                    self.break_streams(process, epoch, false);
                }
                self.processes[process].comm_ready = false;
                self.push(process, self.now + delay, reply(Event::Left { epoch }));
            }
            Action::Forget { keys } => {
                if self.reaches_store(process) {
                    keys.into_iter().for_each(|key| self.delete(&key));
                }
            }
            Action::Probe { instance, .. } => {
                let now = self.now;
                let target = self.processes.iter().find(|p| p.instance == instance);
                let reachable = target.is_some_and(|p| p.alive && p.frozen_until <= now);
                self.probes += usize::from(reachable);
                let at = now + if reachable { delay } else { 1_000 };
                self.push(process, at, reply(Event::ProbeResult { instance, reachable }));
            }
        }
    }

    /// Joins the communicator; it is complete when every member of the epoch has joined.
    fn init(&mut self, process: usize, spec: &EpochSpec, id: Vec<u8>) {
        let joining = &mut self.processes[process];
        assert!(joining.joined.is_none(), "joined an epoch before leaving the last");
        assert!(spec.epoch > joining.highest_joined, "joined an epoch twice");
        joining.highest_joined = spec.epoch;
        joining.joined = Some((spec.epoch, id.clone()));
        let members: Vec<usize> = (0..self.processes.len())
            .filter(|&i| {
                let same = self.processes[i].joined.as_ref().filter(|(e, _)| *e == spec.epoch);
                if let Some((_, other_id)) = same {
                    assert_eq!(*other_id, id, "one communicator, two ids");
                }
                same.is_some() && self.processes[i].alive
            })
            .collect();
        if members.len() == spec.slots.len() {
            for member in members {
                let at = self.now + 5 + self.random() % 100;
                let event = Event::CommunicatorReady { epoch: spec.epoch };
                self.processes[member].comm_ready = true;
                self.push(member, at, Due::Deliver(event));
            }
        }
    }

    /// The canary passes when every member is up; otherwise the plan streams tell.
    fn run_canary(&mut self, process: usize, epoch: Epoch) {
        let in_epoch = |p: &&Process| p.joined.as_ref().is_some_and(|(e, _)| *e == epoch);
        let joined = self.processes.iter().filter(in_epoch).filter(|p| p.alive).count();
        if joined == self.num_slots {
            self.feed(process, Event::CanaryPassed { epoch });
        }
    }

    fn push(&mut self, process: usize, at: u64, due: Due) {
        self.order += 1;
        self.due.insert(self.order, due);
        self.queue.push(Reverse((at, self.order, process)));
    }

    fn random(&mut self) -> u64 {
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix64(self.rng)
    }
}
