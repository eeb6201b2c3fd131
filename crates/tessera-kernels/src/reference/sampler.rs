//! Sampling. Rows whose draw is separable ([`is_separable`]: greedy, plain temperature) are searched by every
//! rank in its own part of the vocabulary, and ranks exchange winners; the logits of other rows are gathered,
//! rank 0 draws, and all ranks learn the token. Either way gives the same token.

use std::sync::{Mutex, OnceLock, PoisonError};

use tessera_collective::Communicator;
use tessera_types::{
    LateInputs, Rank, SampledToken, SequenceSlot, TokenId, TokenLogprobs, TokenMask,
};

use super::collective;
use crate::error::{KernelError, Result};
use crate::inputs::{SampleRow, SamplerSequence, ScoreRow, StepLimits};
use crate::sampling::logprobs::token_logprobs;
use crate::sampling::{
    Candidate, Draw, DrawError, SamplerState, is_separable, process_row, shard_candidate,
};

/// Sent in place of a token that could not be drawn, so that no rank waits for it.
const NO_TOKEN: TokenId = TokenId::MAX;

/// Bytes of one rank's winner of one row: score, token, whether the search succeeded.
const WINNER_BYTES: usize = 16;

/// Calls `body(row)` once for every row below a number, on any threads.
pub(crate) type ForRows<'a> = dyn Fn(usize, &(dyn Fn(usize) + Sync)) + 'a;

/// The table of running sequences as the sampler sees it, indexed by slot.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    num_real_tokens: usize,
    table: Vec<Option<SamplerSlot>>,
    /// Logits of the rows that are drawn from as a whole, `[world, rows, V/tp]`.
    gathered: Vec<f32>,
    scratch: Scratch,
}

#[derive(Debug)]
struct SamplerSlot {
    /// The token drawn last, or the last of those that came with the sequence.
    last: TokenId,
    /// What edits and draws need.
    state: SamplerState,
}

/// Rows that are edited, one per thread, kept between steps.
#[derive(Debug, Default)]
struct Scratch(Mutex<Vec<Vec<f32>>>);

impl Scratch {
    fn with<T>(&self, work: impl FnOnce(&mut Vec<f32>) -> T) -> T {
        let rows = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut row = rows().pop().unwrap_or_default();
        row.clear();
        let result = work(&mut row);
        rows().push(row);
        result
    }
}

/// Logits of all ranks, `[world, rows, shard]`, of which the first `width` of a row are real tokens.
struct Gathered<'a> {
    values: &'a [f32],
    rows: usize,
    shard: usize,
    width: usize,
}

impl Gathered<'_> {
    /// Appends the real tokens' logits of one row. The vocabulary's padding is left out, which is what −inf
    /// would make of it.
    fn read(&self, row: usize, out: &mut Vec<f32>) {
        let shards = self.values.chunks_exact(self.rows * self.shard);
        for (rank, rows) in shards.enumerate() {
            let real = self.width.saturating_sub(rank * self.shard).min(self.shard);
            out.extend_from_slice(&rows[row * self.shard..][..real]);
        }
    }
}

/// A row to draw from, with what the draw needs.
struct DrawRow<'a> {
    /// Its number in the batch.
    at: usize,
    state: &'a SamplerState,
    mask: Option<&'a TokenMask>,
    output_index: u32,
}

/// What a row gave, where this rank knows it.
type Outcome = std::result::Result<Draw, DrawError>;

impl Sampler {
    pub(crate) fn new(max: &StepLimits) -> Self {
        let table = (0..max.max_sequences).map(|_| None).collect();
        let num_real_tokens = max.num_real_tokens as usize;
        Self { num_real_tokens, table, ..Self::default() }
    }

    pub(crate) fn last_sampled(&self, slot: SequenceSlot) -> Result<TokenId> {
        let row = self.table.get(slot.index()).and_then(Option::as_ref);
        row.map(|row| row.last).ok_or(KernelError::VacantSlot { slot })
    }

    pub(crate) fn admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()> {
        let slot = sequence.slot;
        let row = self.table.get_mut(slot.index()).ok_or(KernelError::VacantSlot { slot })?;
        let last = sequence.output.last().or(sequence.prompt.last());
        let last = *last.ok_or_else(|| KernelError::Input {
            field: "prompt",
            reason: format!("the sequence of slot {slot} is empty"),
        })?;
        *row = Some(SamplerSlot { last, state: SamplerState::new(&sequence) });
        Ok(())
    }

    pub(crate) fn release(&mut self, slot: SequenceSlot) {
        if let Some(row) = self.table.get_mut(slot.index()) {
            *row = None;
        }
    }

    /// Draws one token per row of the local logits `[R, V/tp]`. `rows` and `late` are the same on all ranks.
    pub(crate) fn sample(
        &mut self,
        communicator: &mut Communicator,
        logits: &[f32],
        rows: &[SampleRow],
        late: &LateInputs,
        for_rows: &ForRows<'_>,
    ) -> Result<Vec<SampledToken>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let shard = self.shard("sample", communicator, logits, rows.len())?;
        let mut buffer = std::mem::take(&mut self.gathered);
        let (separable, whole): (Vec<_>, Vec<_>) = self
            .draw_rows(rows, late)?
            .into_iter()
            .partition(|row| row.mask.is_none() && is_separable(row.state.params()));
        let mut outcomes: Vec<Option<Outcome>> = rows.iter().map(|_| None).collect();
        if !separable.is_empty() {
            self.search(communicator, logits, shard, &separable, for_rows, &mut outcomes)?;
        }
        if !whole.is_empty() {
            let local = whole.iter().flat_map(|row| &logits[row.at * shard..][..shard]);
            let local: Vec<f32> = local.copied().collect();
            let gathered = self.gather("sample", communicator, &local, whole.len(), &mut buffer)?;
            self.draw(communicator, &gathered, &whole, for_rows, &mut outcomes)?;
        }
        self.gathered = buffer;
        rows.iter().zip(outcomes).map(|(row, outcome)| self.take(row, outcome)).collect()
    }

    fn draw_rows<'a>(
        &'a self,
        rows: &[SampleRow],
        late: &'a LateInputs,
    ) -> Result<Vec<DrawRow<'a>>> {
        let row = |(at, row): (usize, &SampleRow)| {
            let slot = row.slot;
            let entry = self.table.get(slot.index()).and_then(Option::as_ref);
            let state = &entry.ok_or(KernelError::VacantSlot { slot })?.state;
            let mask = late.masks.iter().find(|(masked, _)| *masked == slot).map(|(_, mask)| mask);
            Ok(DrawRow { at, state, mask, output_index: row.output_index })
        };
        rows.iter().enumerate().map(row).collect()
    }

    /// Every rank searches its own tokens; the best of the winners wins.
    fn search(
        &self,
        communicator: &mut Communicator,
        logits: &[f32],
        shard: usize,
        rows: &[DrawRow<'_>],
        for_rows: &ForRows<'_>,
        outcomes: &mut [Option<Outcome>],
    ) -> Result<()> {
        let first_token = communicator.rank().index() * shard;
        let real = self.num_real_tokens.saturating_sub(first_token).min(shard);
        let found = on_rows(rows, for_rows, |row| {
            self.scratch.with(|scratch| {
                scratch.extend_from_slice(&logits[row.at * shard..][..real]);
                let DrawRow { state, mask, output_index, .. } = *row;
                shard_candidate(scratch, first_token as TokenId, state, mask, output_index)
            })
        });
        let own: Vec<u8> = found.iter().flat_map(winner_bytes).collect();
        let mut all = vec![0; own.len() * communicator.world_size() as usize];
        communicator.all_gather_bytes(&own, &mut all).map_err(collective("sample"))?;
        for (i, row) in rows.iter().enumerate() {
            let ranks = all.chunks_exact(own.len());
            let winners = ranks.map(|rank| read_winner(&rank[i * WINNER_BYTES..]));
            let outcome = match winners.collect::<std::result::Result<Vec<_>, _>>() {
                Ok(winners) => Ok(best_of(winners.into_iter().flatten())),
                Err(error) => Err(error),
            };
            let draw = outcome.and_then(|best| {
                let token = best.ok_or(DrawError::NothingAllowed)?.token;
                Ok(Draw { token, logprobs: None })
            });
            // Rank 0 tells why, as for rows that it alone draws.
            let tells = draw.is_ok() || communicator.rank() == Rank(0);
            outcomes[row.at] = tells.then_some(draw);
        }
        Ok(())
    }

    /// Rank 0 draws from whole rows and tells the others the tokens.
    fn draw(
        &self,
        communicator: &mut Communicator,
        logits: &Gathered<'_>,
        rows: &[DrawRow<'_>],
        for_rows: &ForRows<'_>,
        outcomes: &mut [Option<Outcome>],
    ) -> Result<()> {
        let mut tokens = vec![NO_TOKEN; rows.len()];
        let draws_itself = communicator.rank() == Rank(0);
        if draws_itself {
            let indices: Vec<usize> = (0..rows.len()).collect();
            let drawn = on_rows(&indices, for_rows, |&i| {
                self.scratch.with(|scratch| {
                    logits.read(i, scratch);
                    let DrawRow { state, mask, output_index, .. } = rows[i];
                    process_row(scratch, state, mask, output_index, logits.width)
                })
            });
            for ((token, row), drawn) in tokens.iter_mut().zip(rows).zip(drawn) {
                *token = drawn.as_ref().map_or(NO_TOKEN, |draw| draw.token);
                outcomes[row.at] = Some(drawn);
            }
        }
        // Also after a failed draw: the other ranks are waiting.
        communicator.broadcast_u32(&mut tokens, Rank(0)).map_err(collective("sample"))?;
        if !draws_itself {
            for (row, token) in rows.iter().zip(tokens).filter(|(_, token)| *token != NO_TOKEN) {
                outcomes[row.at] = Some(Ok(Draw { token, logprobs: None }));
            }
        }
        Ok(())
    }

    /// Makes a drawn token the slot's last one.
    fn take(&mut self, row: &SampleRow, outcome: Option<Outcome>) -> Result<SampledToken> {
        let SampleRow { slot, sequence, .. } = *row;
        let draw = outcome.ok_or(KernelError::DrawElsewhere { slot })?;
        let Draw { token, logprobs } = draw.map_err(|source| KernelError::Draw { slot, source })?;
        let entry = self.table.get_mut(slot.index()).and_then(Option::as_mut);
        let entry = entry.ok_or(KernelError::VacantSlot { slot })?;
        entry.last = token;
        entry.state.record(token);
        Ok(SampledToken { slot, sequence, token, logprobs })
    }

    /// Log probabilities of each row's target and of the likeliest tokens; empty on all ranks but 0.
    pub(crate) fn score(
        &mut self,
        communicator: &mut Communicator,
        logits: &[f32],
        rows: &[ScoreRow],
        for_rows: &ForRows<'_>,
    ) -> Result<Vec<TokenLogprobs>> {
        let (operation, expected) = ("score_rows", self.num_real_tokens);
        if let Some(row) = rows.iter().find(|row| row.target as usize >= expected) {
            let found = row.target as usize;
            return Err(KernelError::Shape { operation, what: "target", expected, found });
        }
        let mut buffer = std::mem::take(&mut self.gathered);
        let gathered = self.gather(operation, communicator, logits, rows.len(), &mut buffer)?;
        let mut scores = Vec::new();
        if communicator.rank() == Rank(0) {
            let indices: Vec<usize> = (0..rows.len()).collect();
            scores = on_rows(&indices, for_rows, |&i| {
                self.scratch.with(|scratch| {
                    gathered.read(i, scratch);
                    token_logprobs(scratch, rows[i].target, rows[i].num_top as usize)
                })
            });
        }
        self.gathered = buffer;
        match scores.iter().find(|score| score.logprob.is_nan()) {
            None => Ok(scores),
            Some(_) => Err(KernelError::Input {
                field: "logits",
                reason: "a row to be scored holds an invalid value".to_owned(),
            }),
        }
    }

    /// Columns of one rank's logits, checked to cover the vocabulary.
    fn shard(
        &self,
        operation: &'static str,
        communicator: &Communicator,
        local: &[f32],
        rows: usize,
    ) -> Result<usize> {
        let (world_size, width) = (communicator.world_size() as usize, self.num_real_tokens);
        let shard = local.len() / rows.max(1);
        if shard * world_size < width || width == 0 {
            let (what, expected, found) = ("vocabulary", width, shard * world_size);
            return Err(KernelError::Shape { operation, what, expected, found });
        }
        Ok(shard)
    }

    /// All ranks' logits of `rows` rows, in `buffer`.
    fn gather<'a>(
        &self,
        operation: &'static str,
        communicator: &mut Communicator,
        local: &[f32],
        rows: usize,
        buffer: &'a mut Vec<f32>,
    ) -> Result<Gathered<'a>> {
        let shard = self.shard(operation, communicator, local, rows)?;
        buffer.resize(local.len() * communicator.world_size() as usize, 0.0);
        communicator.all_gather(local, buffer).map_err(collective(operation))?;
        Ok(Gathered { values: buffer, rows, shard, width: self.num_real_tokens })
    }
}

/// `work` of every row, in the order of rows.
fn on_rows<R: Sync, T: Send + Sync>(
    rows: &[R],
    for_rows: &ForRows<'_>,
    work: impl Fn(&R) -> T + Sync,
) -> Vec<T> {
    let results: Vec<OnceLock<T>> = rows.iter().map(|_| OnceLock::new()).collect();
    for_rows(rows.len(), &|row| {
        let is_first = results[row].set(work(&rows[row])).is_ok();
        debug_assert!(is_first, "every row is worked on once");
    });
    let result = |result: OnceLock<T>| result.into_inner().expect("every row was worked on");
    results.into_iter().map(result).collect()
}

fn best_of(winners: impl Iterator<Item = Candidate>) -> Option<Candidate> {
    winners.reduce(|best, next| if next.beats(&best) { next } else { best })
}

/// A rank's winner on its way to the others: score, token ([`NO_TOKEN`] for none), and 0; or the invalid
/// value, its token, and 1.
fn winner_bytes(found: &std::result::Result<Option<Candidate>, DrawError>) -> [u8; WINNER_BYTES] {
    let (score, token, failed) = match *found {
        Ok(Some(Candidate { token, score })) => (score, token, 0u32),
        Ok(None) | Err(DrawError::NothingAllowed) => (f64::NEG_INFINITY, NO_TOKEN, 0),
        Err(DrawError::InvalidLogit { token, value }) => (f64::from(value), token, 1),
    };
    let mut bytes = [0; WINNER_BYTES];
    bytes[..8].copy_from_slice(&score.to_le_bytes());
    bytes[8..12].copy_from_slice(&token.to_le_bytes());
    bytes[12..].copy_from_slice(&failed.to_le_bytes());
    bytes
}

fn read_winner(bytes: &[u8]) -> std::result::Result<Option<Candidate>, DrawError> {
    let word = |at: usize| {
        let bytes = bytes[at..].first_chunk().expect("a winner has 16 bytes");
        u32::from_le_bytes(*bytes)
    };
    let score = f64::from_bits(u64::from(word(0)) | u64::from(word(4)) << 32);
    let token = word(8);
    match (word(12), token) {
        (0, NO_TOKEN) => Ok(None),
        (0, _) => Ok(Some(Candidate { token, score })),
        _ => Err(DrawError::InvalidLogit { token, value: score as f32 }),
    }
}
