//! All chats of a run: made ahead by one thread, begun by a Poisson process or by clients that each ask one after
//! another.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use super::args::{Loop, Plan};
use super::arrivals::Poisson;
use super::client::{Client, Conversation, Failure};
use super::observe::{ClientHealth, Watch};
use super::workload::{Chat, Kind};
use crate::bench::error::BenchError;

/// Chats made ahead; their pictures are what takes memory. When it is full, the maker waits.
const MAX_AHEAD: usize = 256;
/// Numbers of warm-up chats, which no measured chat has.
const WARM_UP: u64 = 1 << 48;
/// Failure of a request that was due while as many as allowed were under way.
const CLIENT_FULL: &str = "client full";

/// One request, from when it was due.
#[derive(Debug, Clone)]
pub struct Record {
    pub kind: Kind,
    /// Counted from 0.
    pub turn: usize,
    /// When it was meant to leave; latencies count from here.
    pub due: Instant,
    pub sent: Instant,
    pub ended: Instant,
    pub pieces: Vec<Instant>,
    pub num_prompt_tokens: u64,
    pub num_cached_tokens: u64,
    pub num_output_tokens: u64,
    pub failure: Option<Failure>,
}

/// A finished run.
#[derive(Debug)]
pub struct Outcome {
    pub records: Vec<Record>,
    pub health: ClientHealth,
    /// From the first request's due time to the last one's end.
    pub duration: Duration,
}

/// What every chat of a run needs.
struct Session {
    plan: Plan,
    client: Client,
}

/// Warms up, runs the load and waits for every answer.
///
/// # Errors
/// A warm-up request that failed; a picture that cannot be made.
pub async fn run(plan: &Plan, client: Client) -> Result<Outcome, BenchError> {
    let session = Arc::new(Session { plan: plan.clone(), client });
    for index in 0..plan.num_warmup {
        let chat = Chat::make(plan, WARM_UP + index)?;
        for record in session.run_chat(chat, Instant::now()).await {
            if let Some(Failure { kind, detail }) = record.failure {
                return Err(BenchError::WarmUp { kind, detail });
            }
        }
    }
    let chats = make_chats(plan).await?;
    let watch = Watch::start();
    let records = match plan.arrivals {
        Loop::Open { rate } => open_loop(&session, rate, chats).await?,
        Loop::Closed { concurrency } => closed_loop(&session, concurrency, chats).await?,
    };
    let health = watch.stop().await;
    let first = records.iter().map(|record| record.due).min();
    let last = records.iter().map(|record| record.ended).max();
    let duration =
        first.zip(last).map_or(Duration::ZERO, |(first, last)| last.duration_since(first));
    Ok(Outcome { records, health, duration })
}

type Chats = mpsc::Receiver<Result<Chat, BenchError>>;

/// Starts the thread that makes chats, and waits until as many as may be are ready.
async fn make_chats(plan: &Plan) -> Result<Chats, BenchError> {
    let (sender, chats) = mpsc::channel(MAX_AHEAD);
    let (owned, num_chats) = (plan.clone(), plan.num_chats.unwrap_or(u64::MAX));
    let make = move || {
        for index in 0..num_chats {
            // Nobody asks for more once the run is over.
            if sender.blocking_send(Chat::make(&owned, index)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("chats".into()).spawn(make).map_err(BenchError::Thread)?;
    let wanted = num_chats.min(MAX_AHEAD as u64) as usize;
    while chats.len() < wanted && !chats.is_closed() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(chats)
}

async fn open_loop(
    session: &Arc<Session>,
    rate: f64,
    mut chats: Chats,
) -> Result<Vec<Record>, BenchError> {
    let plan = &session.plan;
    let (start, mut running, mut records) = (Instant::now(), JoinSet::new(), Vec::new());
    for arrival in Poisson::new(rate, plan.seed) {
        if plan.duration_seconds.is_some_and(|seconds| arrival.as_secs_f64() > seconds) {
            break;
        }
        let Some(chat) = chats.recv().await else { break };
        let (chat, due) = (chat?, start + arrival);
        tokio::time::sleep_until(due.into()).await;
        while let Some(done) = running.try_join_next() {
            records.extend(done.unwrap_or_default());
        }
        if running.len() >= plan.max_in_flight {
            let detail = "as many as --max-in-flight are under way".to_owned();
            let failure = Failure { kind: CLIENT_FULL.to_owned(), detail };
            records.push(Record::new(chat.kind, 0, due).failed(failure));
            continue;
        }
        let session = Arc::clone(session);
        running.spawn(async move { session.run_chat(chat, due).await });
    }
    while let Some(done) = running.join_next().await {
        records.extend(done.unwrap_or_default());
    }
    Ok(records)
}

async fn closed_loop(
    session: &Arc<Session>,
    concurrency: usize,
    chats: Chats,
) -> Result<Vec<Record>, BenchError> {
    let (start, chats) = (Instant::now(), Arc::new(Mutex::new(chats)));
    let end = session.plan.duration_seconds.map(|seconds| start + Duration::from_secs_f64(seconds));
    let mut clients = JoinSet::new();
    for _ in 0..concurrency {
        let (session, chats) = (Arc::clone(session), Arc::clone(&chats));
        clients.spawn(async move {
            let mut records = Vec::new();
            while end.is_none_or(|end| Instant::now() < end) {
                let Some(chat) = chats.lock().await.recv().await else { break };
                records.extend(session.run_chat(chat?, Instant::now()).await);
            }
            Ok::<_, BenchError>(records)
        });
    }
    let mut records = Vec::new();
    while let Some(done) = clients.join_next().await {
        records.extend(done.unwrap_or_else(|_| Ok(Vec::new()))?);
    }
    Ok(records)
}

impl Session {
    /// All turns of a chat; a failure ends it. The first is due at `due`, each other when the answer before it
    /// has ended.
    async fn run_chat(&self, chat: Chat, due: Instant) -> Vec<Record> {
        let (mut answers, mut records): (Vec<String>, Vec<Record>) = (Vec::new(), Vec::new());
        for turn in 0..chat.turns.len() {
            let due = records.last().map_or(due, |before| before.ended);
            let mut record = Record::new(chat.kind, turn, due);
            let conversation = Conversation { chat: &chat, answers: &answers };
            match self.client.ask(conversation, &self.plan).await {
                Err(failure) => {
                    records.push(record.failed(failure));
                    break;
                }
                Ok(answer) => {
                    record.ended = Instant::now();
                    record.num_prompt_tokens = answer.num_prompt_tokens.unwrap_or(0);
                    record.num_cached_tokens = answer.num_cached_tokens.unwrap_or(0);
                    let num_pieces = answer.pieces.len() as u64;
                    record.num_output_tokens = answer.num_output_tokens.unwrap_or(num_pieces);
                    record.pieces = answer.pieces;
                    records.push(record);
                    answers.push(answer.text);
                }
            }
        }
        records
    }
}

impl Record {
    /// A request that leaves now.
    fn new(kind: Kind, turn: usize, due: Instant) -> Self {
        let now = Instant::now();
        Self {
            kind,
            turn,
            due,
            sent: now,
            ended: now,
            pieces: Vec::new(),
            num_prompt_tokens: 0,
            num_cached_tokens: 0,
            num_output_tokens: 0,
            failure: None,
        }
    }

    fn failed(self, failure: Failure) -> Self {
        Self { ended: Instant::now(), failure: Some(failure), ..self }
    }

    /// Until the first token: the first piece, or the end if no piece held text.
    pub fn ttft_ms(&self) -> f64 {
        ms(self.pieces.first().unwrap_or(&self.ended).duration_since(self.due))
    }

    /// Between successive pieces.
    pub fn gaps_ms(&self) -> impl Iterator<Item = f64> {
        self.pieces.windows(2).map(|pair| ms(pair[1].duration_since(pair[0])))
    }

    /// Mean gap between pieces; `None` for fewer than two.
    pub fn itl_ms(&self) -> Option<f64> {
        let (first, last) = (self.pieces.first()?, self.pieces.last()?);
        let num_gaps = self.pieces.len() - 1;
        (num_gaps > 0).then(|| ms(last.duration_since(*first)) / num_gaps as f64)
    }

    /// Time per output token after the first; `None` for fewer than two.
    pub fn tpot_ms(&self) -> Option<f64> {
        let num_gaps = self.num_output_tokens.checked_sub(1).filter(|&gaps| gaps > 0)?;
        Some((self.e2e_ms() - self.ttft_ms()) / num_gaps as f64)
    }

    /// Until the end.
    pub fn e2e_ms(&self) -> f64 {
        ms(self.ended.duration_since(self.due))
    }

    /// How late it left.
    pub fn lag_ms(&self) -> f64 {
        ms(self.sent.saturating_duration_since(self.due))
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A request due at `due`, sent 5 ms later, with pieces at these times after its due time.
    pub fn record(
        due: Instant,
        pieces_ms: &[u64],
        ended_ms: u64,
        num_output_tokens: u64,
    ) -> Record {
        let at = |ms: &u64| due + Duration::from_millis(*ms);
        Record {
            sent: at(&5),
            ended: at(&ended_ms),
            pieces: pieces_ms.iter().map(at).collect(),
            num_output_tokens,
            ..Record::new(Kind::Text, 0, due)
        }
    }

    #[test]
    fn latencies_count_from_the_due_time() {
        let record = record(Instant::now(), &[100, 130, 190], 200, 5);
        assert_eq!((record.ttft_ms(), record.e2e_ms(), record.lag_ms()), (100.0, 200.0, 5.0));
        assert_eq!(record.gaps_ms().collect::<Vec<_>>(), [30.0, 60.0]);
        assert_eq!((record.itl_ms(), record.tpot_ms()), (Some(45.0), Some(25.0)));
    }

    #[test]
    fn an_answer_of_one_token_has_no_gaps() {
        let one = record(Instant::now(), &[40], 50, 1);
        assert_eq!((one.itl_ms(), one.tpot_ms(), one.ttft_ms()), (None, None, 40.0));
        let silent = record(Instant::now(), &[], 50, 2);
        assert_eq!((silent.ttft_ms(), silent.itl_ms()), (50.0, None));
    }
}
