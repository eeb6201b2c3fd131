//! Whose turn it is: fair shares of the token budget between tenants of one priority.
//!
//! Each tenant has an account per priority that counts the tokens computed for it, and the turn goes to
//! the tenant with the fewest (the Virtual Token Counter of Sheng et al. 2024, "Fairness in Serving Large
//! Language Models"). A tenant that comes back to the queue is lifted to the least served of those that
//! wait, and never below the start of the last admission: time it asked for nothing is not saved up. So of
//! two tenants that both wait, neither gets ahead of the other by more than what its running sequences and
//! one admission cost, whatever the sizes of their requests.
//!
//! Every computed token counts one, in prefill, decode and recompute alike: the unit that the budget of a
//! step is counted in. Priorities have accounts of their own, since a higher one goes first whatever its
//! tenants were served.
//!
//! Bounded: an account lives as long as a sequence of it, and then until the others have caught up with it
//! (coming back, it would be lifted to where they are), at most [`MAX_IDLE`] of them.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use tessera_types::{SequenceId, TenantId};

/// Accounts kept without a sequence. Beyond them the least served is forgotten.
const MAX_IDLE: usize = 1024;

/// Index of an account.
pub(crate) type AccountId = u32;

/// Order of turns: priority, tokens served, since when the tenant waits.
pub(crate) type Turn = (Reverse<i32>, u64, u64, AccountId);

#[derive(Debug)]
struct Account {
    priority: i32,
    tenant: TenantId,
    /// Tokens computed for the tenant, lifted when it comes back.
    served: u64,
    /// Sequences of the account, waiting or running.
    num_sequences: u32,
    /// Waiting sequences that could be admitted, by arrival.
    ready: BTreeSet<(u64, SequenceId)>,
    /// Number of times any tenant had begun to wait when this one did: equally served, the first waits
    /// longest.
    since: u64,
    /// Its entry among the turns while it has ready sequences. `served` may have grown since.
    turn: Option<Turn>,
}

/// What the accounts of one priority share.
#[derive(Debug, Default)]
struct Class {
    num_accounts: u32,
    /// Tokens that the tenant of the last admission had been served before it.
    floor: u64,
}

/// The accounts of all tenants with sequences.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    accounts: Vec<Account>,
    vacant: Vec<AccountId>,
    by_name: HashMap<(i32, TenantId), AccountId>,
    classes: HashMap<i32, Class>,
    /// One per account with ready sequences.
    turns: BTreeSet<Turn>,
    /// Accounts without sequences: priority, served.
    idle: BTreeSet<(i32, u64, AccountId)>,
    num_returns: u64,
}

impl Tenants {
    /// The account of a new sequence, to be closed when it is gone.
    pub fn open(&mut self, priority: i32, tenant: TenantId) -> AccountId {
        let id = match self.by_name.get(&(priority, tenant)) {
            Some(&id) => id,
            None => self.create(priority, tenant),
        };
        let account = &mut self.accounts[id as usize];
        account.num_sequences += 1;
        let entry = (priority, account.served, id);
        self.idle.remove(&entry);
        id
    }

    /// A sequence of the account, no longer ready, is gone.
    pub fn close(&mut self, id: AccountId) {
        let account = &mut self.accounts[id as usize];
        account.num_sequences -= 1;
        if account.num_sequences > 0 {
            return;
        }
        let priority = account.priority;
        self.idle.insert((priority, account.served, id));
        self.forget_idle(priority);
    }

    /// Counts tokens computed for the account.
    pub fn charge(&mut self, id: AccountId, num_tokens: usize) {
        self.accounts[id as usize].served += num_tokens as u64;
    }

    /// The account's place in the order of turns, were it waiting.
    pub fn turn(&self, id: AccountId) -> Turn {
        let account = &self.accounts[id as usize];
        (Reverse(account.priority), account.served, account.since, id)
    }

    /// The sequence may be admitted from now on.
    pub fn set_ready(&mut self, id: AccountId, arrival: u64, sequence: SequenceId) {
        let account = &self.accounts[id as usize];
        if account.ready.is_empty() {
            let floor = self.floor(account.priority);
            self.num_returns += 1;
            let account = &mut self.accounts[id as usize];
            (account.served, account.since) = (account.served.max(floor), self.num_returns);
            let turn = self.turn(id);
            self.accounts[id as usize].turn = Some(turn);
            self.turns.insert(turn);
        }
        self.accounts[id as usize].ready.insert((arrival, sequence));
    }

    /// The sequence may not be admitted for now, or is admitted.
    pub fn clear_ready(&mut self, id: AccountId, arrival: u64, sequence: SequenceId) {
        let account = &mut self.accounts[id as usize];
        account.ready.remove(&(arrival, sequence));
        if account.ready.is_empty()
            && let Some(turn) = account.turn.take()
        {
            self.turns.remove(&turn);
        }
    }

    /// Whose turn it is among tenants with ready sequences, and which of them arrived first.
    pub fn next(&mut self) -> Option<(Turn, SequenceId)> {
        let first = *self.turns.first()?;
        let turn = self.least_served(first.0.0)?;
        let (_, sequence) = *self.accounts[turn.3 as usize].ready.first()?;
        Some((turn, sequence))
    }

    /// A sequence of the account is admitted: nobody who comes back is placed before this point.
    pub fn note_admission(&mut self, id: AccountId) {
        let Account { priority, served, .. } = self.accounts[id as usize];
        if let Some(class) = self.classes.get_mut(&priority) {
            class.floor = class.floor.max(served);
        }
        self.forget_idle(priority);
    }

    fn create(&mut self, priority: i32, tenant: TenantId) -> AccountId {
        let account = Account {
            priority,
            tenant,
            served: 0,
            num_sequences: 0,
            ready: BTreeSet::new(),
            since: 0,
            turn: None,
        };
        let id = match self.vacant.pop() {
            Some(id) => {
                self.accounts[id as usize] = account;
                id
            }
            None => {
                self.accounts.push(account);
                self.accounts.len() as AccountId - 1
            }
        };
        self.by_name.insert((priority, tenant), id);
        self.classes.entry(priority).or_default().num_accounts += 1;
        id
    }

    /// Where a tenant that comes back is lifted to.
    fn floor(&mut self, priority: i32) -> u64 {
        let floor = self.classes.get(&priority).map_or(0, |class| class.floor);
        self.least_served(priority).map_or(floor, |turn| floor.max(turn.1))
    }

    /// First turn of a priority. Turns are entered with what was served then; those that have grown since
    /// are corrected when they come first, each at most once per charge.
    fn least_served(&mut self, priority: i32) -> Option<Turn> {
        loop {
            let first = *self.turns.range((Reverse(priority), 0, 0, 0)..).next()?;
            if first.0 != Reverse(priority) {
                return None;
            }
            let turn = self.turn(first.3);
            if turn == first {
                return Some(turn);
            }
            self.turns.remove(&first);
            self.turns.insert(turn);
            self.accounts[first.3 as usize].turn = Some(turn);
        }
    }

    /// Drops idle accounts that would be lifted anyway, and the least served beyond the bound.
    fn forget_idle(&mut self, priority: i32) {
        let floor = self.classes.get(&priority).map_or(0, |class| class.floor);
        while let Some(&entry) =
            self.idle.range((priority, 0, 0)..=(priority, floor, u32::MAX)).next()
        {
            self.forget(entry);
        }
        while self.idle.len() > MAX_IDLE
            && let Some(&entry) = self.idle.first()
        {
            self.forget(entry);
        }
    }

    fn forget(&mut self, entry: (i32, u64, AccountId)) {
        self.idle.remove(&entry);
        let (priority, _, id) = entry;
        let tenant = self.accounts[id as usize].tenant;
        self.by_name.remove(&(priority, tenant));
        self.vacant.push(id);
        if let Some(class) = self.classes.get_mut(&priority) {
            class.num_accounts -= 1;
            if class.num_accounts == 0 {
                self.classes.remove(&priority);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Accounts of priority 0, each with one sequence, and the tokens they were served.
    fn tenants(served: &[usize]) -> Tenants {
        let mut tenants = Tenants::default();
        for (tenant, &tokens) in served.iter().enumerate() {
            let id = tenants.open(0, TenantId(tenant as u64));
            tenants.charge(id, tokens);
        }
        tenants
    }

    fn next(tenants: &mut Tenants) -> Option<u64> {
        tenants.next().map(|(_, sequence)| sequence.0)
    }

    #[test]
    fn the_least_served_tenant_has_the_turn() {
        let mut tenants = tenants(&[0, 0, 0]);
        for id in 0..3 {
            tenants.set_ready(id, 0, SequenceId(id.into()));
        }
        tenants.charge(0, 10);
        assert_eq!(next(&mut tenants), Some(1), "equally served: the one that waits longest");
        tenants.charge(1, 5);
        assert_eq!(next(&mut tenants), Some(2));
        tenants.charge(2, 20);
        assert_eq!(next(&mut tenants), Some(1));
        tenants.clear_ready(1, 0, SequenceId(1));
        assert_eq!(next(&mut tenants), Some(0));
    }

    #[test]
    fn a_priority_goes_before_any_share() {
        let mut tenants = tenants(&[0]);
        tenants.set_ready(0, 0, SequenceId(0));
        let urgent = tenants.open(7, TenantId(0));
        tenants.charge(urgent, 1000);
        tenants.set_ready(urgent, 9, SequenceId(1));
        assert_eq!(next(&mut tenants), Some(1));
    }

    #[test]
    fn absence_is_not_saved_up() {
        let mut tenants = tenants(&[1000, 900, 0]);
        tenants.set_ready(0, 0, SequenceId(0));
        tenants.set_ready(1, 0, SequenceId(1));
        // Lifted to the least served of those that wait, behind it.
        tenants.set_ready(2, 0, SequenceId(2));
        assert_eq!(tenants.turn(2).1, 1000, "the first waited at 1000, so the second was lifted");
        assert_eq!(next(&mut tenants), Some(0));
    }

    #[test]
    fn leaving_and_coming_back_does_not_pay_a_debt() {
        let mut tenants = tenants(&[500, 0]);
        tenants.close(0);
        assert_eq!(tenants.open(0, TenantId(0)), 0, "remembered");
        tenants.set_ready(1, 0, SequenceId(1));
        tenants.set_ready(0, 0, SequenceId(0));
        assert_eq!(next(&mut tenants), Some(1));
    }

    #[test]
    fn accounts_are_forgotten_once_the_others_caught_up() {
        let mut tenants = tenants(&[500, 0]);
        tenants.close(0);
        tenants.charge(1, 499);
        tenants.note_admission(1);
        assert_eq!(tenants.idle.len(), 1);
        tenants.charge(1, 1);
        tenants.note_admission(1);
        assert!(tenants.idle.is_empty());
        assert_eq!(tenants.by_name.len(), 1);
    }

    #[test]
    fn idle_accounts_are_bounded() {
        let mut tenants = Tenants::default();
        for tenant in 0..3 * MAX_IDLE as u64 {
            let id = tenants.open((tenant % 3) as i32, TenantId(tenant));
            tenants.charge(id, 10 + tenant as usize);
            tenants.close(id);
        }
        assert_eq!((tenants.idle.len(), tenants.by_name.len()), (MAX_IDLE, MAX_IDLE));
        assert!(tenants.accounts.len() <= MAX_IDLE + 1);
    }
}
