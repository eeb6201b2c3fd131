//! What one router believes about the cluster (CLUSTER §4).
//!
//! Invariants
//! - A group's epoch never goes back: records and reports of an earlier epoch are ignored.
//! - A deleted key is a suspicion, a mass delete doubly so; an endpoint is dropped when its own evidence
//!   agrees, never by the store alone while its health stream is good.
//! - While the store is away, the last view stands.
//!
//! Opinions about endpoints live in [`EndpointEvidence`]; this machine feeds it and asks it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tessera_types::{Epoch, InstanceId};

use crate::config::ViewConfig;
use crate::evidence::{EndpointEvidence, SelfReport, Verdict};
use crate::keys::GroupName;
use crate::records::{ActiveRecord, ActiveState, EncoderMember, MemberInfo, MemberRole};

/// What happened. Health events name the endpoint by its instance.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A full listing: at the start, and after a watch that could not be resumed. What it lacks counts
    /// as deleted.
    Listing {
        members: Vec<MemberInfo>,
        actives: Vec<(GroupName, ActiveRecord)>,
    },
    MemberPut {
        member: Box<MemberInfo>,
    },
    MemberDeleted {
        instance: InstanceId,
    },
    ActivePut {
        group: GroupName,
        record: Box<ActiveRecord>,
    },
    ActiveDeleted {
        group: GroupName,
    },
    /// The store no longer answers.
    Disconnected,
    /// A leader spoke on its health stream.
    GroupHealth {
        instance: InstanceId,
        epoch: Epoch,
        state: GroupState,
        load: GroupLoad,
    },
    /// An encoder answered.
    EncoderHealth {
        instance: InstanceId,
        report: SelfReport,
        load: EncoderLoad,
    },
    HealthBroken {
        instance: InstanceId,
    },
    CallOk {
        instance: InstanceId,
    },
    CallFailed {
        instance: InstanceId,
    },
    Tick,
}

/// State of a group by its leader's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    Forming,
    Serving,
    Draining,
    Left,
}

/// Load of a group by its leader's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupLoad {
    pub running: u32,
    pub waiting: u32,
    pub kv_blocks: u32,
    pub kv_blocks_free: u32,
}

/// Load of an encoder by its own word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncoderLoad {
    pub queued_pixels: u64,
    pub queued_items: u64,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Open the endpoint's health stream (or begin to ask it), replacing an older one.
    OpenHealth { instance: InstanceId, address: String, kind: EndpointKind },
    /// The endpoint is dropped: close its streams and channel.
    Drop { instance: InstanceId },
    /// So many endpoints vanished at once that the store is doubted; a human should look.
    MassDelete { vanished: usize, known: usize },
}

/// Whose health it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointKind {
    Leader { group: GroupName },
    Encoder,
}

/// A group as placement sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupStatus<'a> {
    pub name: &'a GroupName,
    /// The record that was active last.
    pub record: &'a ActiveRecord,
    /// Its epoch, or a later one that the same leader reports.
    pub epoch: Epoch,
    pub verdict: Verdict,
    pub load: GroupLoad,
}

/// An encoder as placement sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderStatus<'a> {
    pub member: &'a MemberInfo,
    pub encoder: &'a EncoderMember,
    pub verdict: Verdict,
    pub load: EncoderLoad,
}

/// The last view in a form that outlives the router's process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    pub encoders: Vec<MemberInfo>,
    pub groups: Vec<(GroupName, ActiveRecord)>,
}

/// The machine.
#[derive(Debug)]
pub struct View {
    config: ViewConfig,
    groups: BTreeMap<GroupName, Group>,
    encoders: BTreeMap<InstanceId, Encoder>,
    /// Times at which keys vanished, within the mass window.
    vanished: VecDeque<Duration>,
    synced: bool,
    stale_since: Option<Duration>,
}

#[derive(Debug)]
struct Group {
    record: ActiveRecord,
    /// Highest epoch heard of, from the store or from the leader.
    epoch: Epoch,
    endpoint: Endpoint,
    load: GroupLoad,
}

#[derive(Debug)]
struct Encoder {
    member: MemberInfo,
    endpoint: Endpoint,
    load: EncoderLoad,
}

#[derive(Debug)]
struct Endpoint {
    evidence: EndpointEvidence,
    /// When to open the health stream again after it broke.
    reopen_at: Option<Duration>,
}

impl View {
    /// An empty view.
    pub fn new(config: ViewConfig) -> Self {
        Self {
            config,
            groups: BTreeMap::new(),
            encoders: BTreeMap::new(),
            vanished: VecDeque::new(),
            synced: false,
            stale_since: None,
        }
    }

    /// A view from a snapshot, to serve with until the store answers. Every endpoint has to speak for
    /// itself before it is used.
    pub fn restore(config: ViewConfig, snapshot: Snapshot, now: Duration) -> (Self, Vec<Action>) {
        let mut view = Self::new(config);
        let mut actions = Vec::new();
        for member in snapshot.encoders {
            view.put_member(member, &mut actions);
        }
        for (group, record) in snapshot.groups {
            view.put_active(group, record, &mut actions);
        }
        view.stale_since = Some(now);
        (view, actions)
    }

    /// What `restore` needs.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            encoders: self.encoders.values().map(|encoder| encoder.member.clone()).collect(),
            groups: self.groups.iter().map(|(n, g)| (n.clone(), g.record.clone())).collect(),
        }
    }

    /// Whether the store has been read since the start.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Since when the store has been away.
    pub fn stale_since(&self) -> Option<Duration> {
        self.stale_since
    }

    /// All known groups.
    pub fn groups(&self, now: Duration) -> impl Iterator<Item = GroupStatus<'_>> {
        self.groups.iter().map(move |(name, group)| GroupStatus {
            name,
            record: &group.record,
            epoch: group.epoch,
            verdict: group.verdict(now),
            load: group.load,
        })
    }

    /// All known encoders.
    pub fn encoders(&self, now: Duration) -> impl Iterator<Item = EncoderStatus<'_>> {
        self.encoders.values().filter_map(move |encoder| {
            Some(EncoderStatus {
                member: &encoder.member,
                encoder: encoder.member.encoder()?,
                verdict: encoder.endpoint.evidence.verdict(now),
                load: encoder.load,
            })
        })
    }

    /// When `Tick` is wanted at the latest.
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        let endpoints = self.endpoints();
        let times = endpoints.flat_map(|e| [e.reopen_at, e.evidence.deadline(now)]);
        times.flatten().min()
    }

    /// Advances the machine.
    pub fn on(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Listing { members, actives } => self.resync(members, actives, now, &mut actions),
            Event::MemberPut { member } => self.put_member(*member, &mut actions),
            Event::ActivePut { group, record } => self.put_active(group, *record, &mut actions),
            Event::MemberDeleted { instance } => {
                let known = self.encoders.contains_key(&instance);
                self.unlist(known.then_some(instance), None, now, &mut actions);
            }
            Event::ActiveDeleted { group } => {
                let known = self.groups.contains_key(&group);
                self.unlist(None, known.then_some(group), now, &mut actions);
            }
            Event::Disconnected => {
                self.stale_since.get_or_insert(now);
            }
            Event::GroupHealth { instance, epoch, state, load } => {
                self.on_group_health(instance, epoch, state, load, now);
            }
            Event::EncoderHealth { instance, report, load } => {
                if let Some(encoder) = self.encoders.get_mut(&instance) {
                    encoder.endpoint.on_report(report, now);
                    encoder.load = load;
                }
            }
            Event::HealthBroken { instance } => {
                let reopen_at = now + self.config.probe_interval;
                if let Some(endpoint) = self.endpoint_mut(instance) {
                    endpoint.evidence.on_stream_broken(now);
                    endpoint.reopen_at = Some(reopen_at);
                }
            }
            Event::CallOk { instance } => {
                if let Some(endpoint) = self.endpoint_mut(instance) {
                    endpoint.evidence.on_call_ok();
                }
            }
            Event::CallFailed { instance } => {
                if let Some(endpoint) = self.endpoint_mut(instance) {
                    endpoint.evidence.on_call_failed(now);
                }
            }
            Event::Tick => {}
        }
        self.reopen(now, &mut actions);
        self.drop_dead(now, &mut actions);
        actions
    }

    fn put_member(&mut self, member: MemberInfo, actions: &mut Vec<Action>) {
        if !matches!(member.role, MemberRole::Encoder(_)) {
            return;
        }
        let (instance, address) = (member.instance, member.address.clone());
        if let Some(encoder) = self.encoders.get_mut(&instance) {
            encoder.endpoint.evidence.on_listed();
            encoder.member = member;
            return;
        }
        let endpoint = Endpoint::new(&self.config);
        let encoder = Encoder { member, endpoint, load: EncoderLoad::default() };
        self.encoders.insert(instance, encoder);
        actions.push(Action::OpenHealth { instance, address, kind: EndpointKind::Encoder });
    }

    fn put_active(&mut self, name: GroupName, record: ActiveRecord, actions: &mut Vec<Action>) {
        let (instance, address) = (record.instance, record.address.clone());
        if let Some(group) = self.groups.get_mut(&name) {
            if record.epoch < group.record.epoch || record.epoch < group.epoch {
                return;
            }
            group.endpoint.evidence.on_listed();
            group.epoch = record.epoch;
            let same_leader = group.record.instance == instance;
            let former = std::mem::replace(&mut group.record, record).instance;
            if same_leader {
                return;
            }
            group.endpoint = Endpoint::new(&self.config);
            group.load = GroupLoad::default();
            actions.push(Action::Drop { instance: former });
        } else {
            let endpoint = Endpoint::new(&self.config);
            let (epoch, load) = (record.epoch, GroupLoad::default());
            self.groups.insert(name.clone(), Group { record, epoch, endpoint, load });
        }
        let kind = EndpointKind::Leader { group: name };
        actions.push(Action::OpenHealth { instance, address, kind });
    }

    fn resync(
        &mut self,
        members: Vec<MemberInfo>,
        actives: Vec<(GroupName, ActiveRecord)>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        (self.synced, self.stale_since) = (true, None);
        let listed_member = |i: &InstanceId| members.iter().any(|m| m.instance == *i);
        let listed_group = |name: &GroupName| actives.iter().any(|(listed, _)| listed == name);
        let gone_encoders: Vec<InstanceId> =
            self.encoders.keys().copied().filter(|i| !listed_member(i)).collect();
        let gone_groups: Vec<GroupName> =
            self.groups.keys().filter(|name| !listed_group(name)).cloned().collect();
        for instance in gone_encoders {
            self.unlist(Some(instance), None, now, actions);
        }
        for group in gone_groups {
            self.unlist(None, Some(group), now, actions);
        }
        for member in members {
            self.put_member(member, actions);
        }
        for (group, record) in actives {
            self.put_active(group, record, actions);
        }
    }

    /// A key vanished. When too many do within the window, the store is doubted for all of them.
    fn unlist(
        &mut self,
        encoder: Option<InstanceId>,
        group: Option<GroupName>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let known = self.endpoints().count();
        let endpoint = match (&encoder, &group) {
            (Some(instance), _) => self.encoders.get_mut(instance).map(|e| &mut e.endpoint),
            (_, Some(name)) => self.groups.get_mut(name).map(|g| &mut g.endpoint),
            _ => None,
        };
        let Some(endpoint) = endpoint else { return };
        if !endpoint.evidence.is_listed() {
            return;
        }
        endpoint.evidence.on_unlisted(false, now);
        self.vanished.push_back(now);
        let window = self.config.mass_window;
        self.vanished.retain(|at| now.saturating_sub(*at) < window);
        let vanished = self.vanished.len();
        if vanished < 2 || (vanished as f64) <= known as f64 * self.config.mass_delete_share {
            return;
        }
        for endpoint in self.endpoints_mut().filter(|e| !e.evidence.is_listed()) {
            endpoint.evidence.on_unlisted(true, now);
        }
        actions.push(Action::MassDelete { vanished, known });
    }

    fn on_group_health(
        &mut self,
        instance: InstanceId,
        epoch: Epoch,
        state: GroupState,
        load: GroupLoad,
        now: Duration,
    ) {
        let Some(group) = self.groups.values_mut().find(|g| g.record.instance == instance) else {
            return;
        };
        // While the store is away, the leader's own word carries the next epoch and the drain.
        if epoch > group.epoch && matches!(state, GroupState::Serving | GroupState::Draining) {
            group.epoch = epoch;
        }
        let current = epoch == group.epoch;
        let report = match state {
            GroupState::Serving if current => SelfReport::Ready,
            GroupState::Draining if current => SelfReport::Draining,
            _ => SelfReport::NotReady,
        };
        group.endpoint.on_report(report, now);
        group.load = load;
    }

    fn reopen(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let due = |endpoint: &mut Endpoint| {
            let due = endpoint.reopen_at.is_some_and(|at| now >= at);
            endpoint.reopen_at.take_if(|_| due).is_some()
        };
        for (name, group) in &mut self.groups {
            if due(&mut group.endpoint) {
                let (instance, address) = (group.record.instance, group.record.address.clone());
                let kind = EndpointKind::Leader { group: name.clone() };
                actions.push(Action::OpenHealth { instance, address, kind });
            }
        }
        for (&instance, encoder) in &mut self.encoders {
            if due(&mut encoder.endpoint) {
                let (address, kind) = (encoder.member.address.clone(), EndpointKind::Encoder);
                actions.push(Action::OpenHealth { instance, address, kind });
            }
        }
    }

    /// Drops what the store no longer lists and its own evidence says is out.
    fn drop_dead(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let dead =
            |e: &Endpoint| !e.evidence.is_listed() && e.evidence.verdict(now) == Verdict::Out;
        self.encoders.retain(|&instance, encoder| {
            let keep = !dead(&encoder.endpoint);
            if !keep {
                actions.push(Action::Drop { instance });
            }
            keep
        });
        self.groups.retain(|_, group| {
            let keep = !dead(&group.endpoint);
            if !keep {
                actions.push(Action::Drop { instance: group.record.instance });
            }
            keep
        });
    }

    fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        let groups = self.groups.values().map(|group| &group.endpoint);
        groups.chain(self.encoders.values().map(|encoder| &encoder.endpoint))
    }

    fn endpoints_mut(&mut self) -> impl Iterator<Item = &mut Endpoint> {
        let groups = self.groups.values_mut().map(|group| &mut group.endpoint);
        groups.chain(self.encoders.values_mut().map(|encoder| &mut encoder.endpoint))
    }

    fn endpoint_mut(&mut self, instance: InstanceId) -> Option<&mut Endpoint> {
        if let Some(encoder) = self.encoders.get_mut(&instance) {
            return Some(&mut encoder.endpoint);
        }
        let group = self.groups.values_mut().find(|group| group.record.instance == instance);
        group.map(|group| &mut group.endpoint)
    }
}

impl Group {
    /// The record's own state counts only for its own epoch.
    fn verdict(&self, now: Duration) -> Verdict {
        let by_endpoint = self.endpoint.evidence.verdict(now);
        let drains = self.record.state == ActiveState::Draining && self.record.epoch == self.epoch;
        if drains { by_endpoint.max(Verdict::Draining) } else { by_endpoint }
    }
}

impl Endpoint {
    fn new(config: &ViewConfig) -> Self {
        Self { evidence: EndpointEvidence::new(config.evidence.clone()), reopen_at: None }
    }

    fn on_report(&mut self, report: SelfReport, now: Duration) {
        self.evidence.on_report(report, now);
        self.reopen_at = None;
    }
}

#[cfg(test)]
mod tests;
