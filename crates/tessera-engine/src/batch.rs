//! A plan and the sequence table as the inputs of a backend.

use tessera_kernels::{GraphKey, SampleRow, ScoreRow, StepInputs, StepKind, TokenSource};
use tessera_scheduler::{SequenceTable, TableEntry};
use tessera_types::{EmbeddingKey, ScheduledSequence, SequenceId, SequenceSlot, StepPlan};

/// Consecutive rows of one embedding that a step merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VisualRun {
    pub sequence: SequenceId,
    pub key: EmbeddingKey,
    /// First row of the embedding.
    pub first_row: u32,
    pub num_rows: u32,
    /// First of the step's visual rows they go to.
    pub at: u32,
}

/// Consecutive prompt tokens of one sequence that a step scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoredRun {
    pub slot: SequenceSlot,
    pub sequence: SequenceId,
    /// Prompt token of the first score.
    pub first_token: u32,
    pub num_tokens: u32,
}

/// Everything a rank needs to run one step, built in place from one step to the next.
#[derive(Debug, Default)]
pub struct StepBatch {
    pub inputs: StepInputs,
    /// `[R]`, in the order of `logit_rows`.
    pub rows: Vec<SampleRow>,
    /// In the order of `score_rows`.
    pub scores: Vec<ScoreRow>,
    /// Whose scores these are, in the same order.
    pub scored: Vec<ScoredRun>,
    /// Visual rows in ascending order of `at`, without gaps.
    pub visual: Vec<VisualRun>,
}

impl StepBatch {
    /// Fills the batch from a plan that `table` has applied.
    pub fn build(&mut self, table: &SequenceTable, plan: &StepPlan, block_size: u32) {
        self.clear();
        self.inputs.zero_blocks.extend_from_slice(&plan.zero_blocks);
        self.inputs.block_copies.extend_from_slice(&plan.copy_blocks);
        let entries = || {
            plan.scheduled.iter().map(|scheduled| {
                let entry = table.entry(scheduled.slot);
                (scheduled, entry.expect("the table applied the plan"))
            })
        };
        let stride = entries().map(|(_, entry)| entry.block_table.len()).max().unwrap_or(0);
        self.inputs.block_table_stride = stride as u32;
        for (scheduled, entry) in entries() {
            self.push_sequence(scheduled, entry, block_size);
        }
    }

    /// Rounds a step that only decodes up to the next of `buckets`, ascending and at most `most`, with sequences
    /// of no tokens and rows that nothing is drawn from.
    pub fn round_up(&mut self, buckets: &[u32], most: u32) {
        let key = self.graph_key();
        let bucket = buckets.iter().copied().find(|&bucket| bucket >= key.seqs);
        let Some(bucket) = bucket.filter(|&bucket| {
            key.kind == StepKind::Decode && (key.seqs..=most).contains(&bucket) && key.seqs > 0
        }) else {
            return;
        };
        let (seqs, inputs) = (bucket as usize, &mut self.inputs);
        inputs.token_source.resize(seqs, TokenSource::Host(0));
        inputs.positions.resize(seqs, [0; 3]);
        inputs.visual_row.resize(seqs, -1);
        inputs.slot_mapping.resize(seqs, -1);
        inputs.cu_q.resize(seqs + 1, key.tokens);
        inputs.kv_len.resize(seqs, 0);
        inputs.block_tables.resize(seqs * inputs.block_table_stride as usize, 0);
        inputs.logit_rows.extend(key.rows..bucket);
    }

    /// Tokens T of the step.
    pub fn num_tokens(&self) -> u32 {
        self.inputs.token_source.len() as u32
    }

    /// The step's shape.
    pub fn graph_key(&self) -> GraphKey {
        let (tokens, seqs) = (self.num_tokens(), self.inputs.kv_len.len() as u32);
        let rows = self.inputs.logit_rows.len() as u32;
        let is_decode = tokens == seqs && rows == seqs;
        let kind = if is_decode { StepKind::Decode } else { StepKind::Mixed };
        GraphKey { tokens, seqs, rows, kind }
    }

    fn clear(&mut self) {
        let Self { inputs, rows, scores, scored, visual } = self;
        inputs.token_source.clear();
        inputs.positions.clear();
        inputs.slot_mapping.clear();
        inputs.visual_row.clear();
        inputs.cu_q.clear();
        inputs.cu_q.push(0);
        inputs.kv_len.clear();
        inputs.block_tables.clear();
        inputs.logit_rows.clear();
        inputs.score_rows.clear();
        inputs.zero_blocks.clear();
        inputs.block_copies.clear();
        rows.clear();
        scores.clear();
        scored.clear();
        visual.clear();
    }

    fn push_sequence(
        &mut self,
        scheduled: &ScheduledSequence,
        entry: &TableEntry,
        block_size: u32,
    ) {
        let inputs = &mut self.inputs;
        let end = entry.num_computed_tokens;
        let start = end - scheduled.num_tokens as usize;
        for index in start..end {
            inputs.token_source.push(match entry.token(index) {
                Some(token) => TokenSource::Host(token),
                // Drawn since admission: only the last drawn token can be one that is not computed yet.
                None => TokenSource::LastSampled(scheduled.slot),
            });
            let block = entry.block_table[index / block_size as usize];
            let place =
                u64::from(block.0) * u64::from(block_size) + index as u64 % u64::from(block_size);
            inputs.slot_mapping.push(place as i64);
        }
        entry.prompt.extend_positions(start, end, &mut inputs.positions);
        inputs.visual_row.resize(inputs.token_source.len(), -1);
        inputs.cu_q.push(inputs.token_source.len() as u32);
        inputs.kv_len.push(end as u32);
        inputs.block_tables.extend(entry.block_table.iter().map(|block| block.0));
        inputs.block_tables.resize(inputs.kv_len.len() * inputs.block_table_stride as usize, 0);
        if scheduled.sample {
            inputs.logit_rows.push(inputs.token_source.len() as u32 - 1);
            self.rows.push(SampleRow {
                slot: scheduled.slot,
                sequence: entry.sequence,
                // The table counts the token that is drawn now.
                output_index: entry.num_output_tokens() as u32 - 1,
            });
        }
        self.push_scores(scheduled, entry);
        self.push_visual_rows(start, end, entry);
    }

    /// The row of a prompt token scores the token after it.
    fn push_scores(&mut self, scheduled: &ScheduledSequence, entry: &TableEntry) {
        let tokens = entry.scored_tokens(scheduled.num_tokens as usize);
        if tokens.is_empty() {
            return;
        }
        let first_row = self.inputs.token_source.len() as u32 - scheduled.num_tokens;
        let num_top = entry.sampling.prompt_logprobs.unwrap_or(0);
        for (row, &target) in (first_row..).zip(&entry.prompt.tokens[tokens.clone()]) {
            self.inputs.score_rows.push(row);
            self.scores.push(ScoreRow { target, num_top });
        }
        self.scored.push(ScoredRun {
            slot: scheduled.slot,
            sequence: entry.sequence,
            first_token: tokens.start as u32,
            num_tokens: tokens.len() as u32,
        });
    }

    /// Media tokens among the last `end - start` take the step's next visual rows.
    fn push_visual_rows(&mut self, start: usize, end: usize, entry: &TableEntry) {
        let first_token = self.inputs.token_source.len() - (end - start);
        for span in &entry.prompt.media {
            let from = start.max(span.offset as usize);
            let to = end.min(span.end() as usize);
            if from >= to {
                continue;
            }
            let at = self.visual.last().map_or(0, |run| run.at + run.num_rows);
            let tokens = first_token + from - start..first_token + to - start;
            for (row, visual_row) in (at as i32..).zip(&mut self.inputs.visual_row[tokens]) {
                *visual_row = row;
            }
            self.visual.push(VisualRun {
                sequence: entry.sequence,
                key: span.embedding_key,
                first_row: (from - span.offset as usize) as u32,
                num_rows: (to - from) as u32,
                at,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tessera_scheduler::TableLimits;
    use tessera_types::{
        AdmittedSequence, BlockId, Epoch, GridThw, Hash256, MediaKind, MediaSpan, PositionSpan,
        Prompt, SamplingParams, SequenceSlot, StepId,
    };

    use super::*;

    const BLOCK_SIZE: u32 = 4;

    fn span(item: u32, offset: u32, num_tokens: u32) -> MediaSpan {
        MediaSpan {
            item,
            kind: MediaKind::Image,
            offset,
            num_tokens,
            grid: GridThw { t: 1, h: 2, w: 2 * num_tokens },
            seconds_per_grid: 0.0,
            embedding_key: EmbeddingKey(Hash256([item as u8; 32])),
        }
    }

    /// Seven tokens: text, an image of three, text.
    fn prompt() -> Arc<Prompt> {
        Arc::new(Prompt {
            tokens: vec![10, 11, 99, 99, 99, 12, 13],
            media: vec![span(5, 2, 3)],
            positions: vec![
                PositionSpan::Text { len: 2 },
                PositionSpan::Grid { t: 1, h: 1, w: 3, step: 0.0 },
                PositionSpan::Text { len: 2 },
            ],
        })
    }

    fn admitted(slot: u32, output: Vec<u32>) -> AdmittedSequence {
        AdmittedSequence {
            slot: SequenceSlot(slot),
            sequence: SequenceId(u64::from(slot) + 70),
            prompt: prompt(),
            output,
            sampling: Arc::new(SamplingParams::default()),
            eos_token_ids: Arc::from([]),
            seed: 0,
            num_computed_tokens: 0,
            block_table: Vec::new(),
        }
    }

    fn scheduled(slot: u32, num_tokens: u32, blocks: &[u32], sample: bool) -> ScheduledSequence {
        let appended_blocks = blocks.iter().map(|&block| BlockId(block)).collect();
        ScheduledSequence { slot: SequenceSlot(slot), num_tokens, appended_blocks, sample }
    }

    fn run(plans: Vec<StepPlan>) -> StepBatch {
        let limits = TableLimits { num_slots: 2, num_blocks: 16, block_size: BLOCK_SIZE };
        let mut table = SequenceTable::new(limits, Epoch(1));
        let mut batch = StepBatch::default();
        for (index, plan) in plans.into_iter().enumerate() {
            let plan = StepPlan { epoch: Epoch(1), step: StepId(index as u64 + 1), ..plan };
            table.advance(&plan).expect("a valid plan");
            batch.build(&table, &plan, BLOCK_SIZE);
        }
        batch
    }

    #[test]
    fn a_chunk_that_cuts_an_image_beside_a_decode_row() {
        let first = StepPlan {
            admitted: vec![admitted(0, vec![]), admitted(1, vec![])],
            scheduled: vec![scheduled(0, 7, &[9, 2], true), scheduled(1, 3, &[4], false)],
            ..StepPlan::default()
        };
        let second = StepPlan {
            scheduled: vec![scheduled(0, 1, &[], true), scheduled(1, 4, &[7], true)],
            zero_blocks: vec![BlockId(7)],
            ..StepPlan::default()
        };
        let batch = run(vec![first, second]);
        let host =
            |tokens: &[u32]| tokens.iter().map(|&t| TokenSource::Host(t)).collect::<Vec<_>>();
        let inputs = &batch.inputs;
        assert_eq!(inputs.token_source[0], TokenSource::LastSampled(SequenceSlot(0)));
        assert_eq!(inputs.token_source[1..], host(&[99, 99, 12, 13]));
        // Block 2 begins with the sequence's token 4, so token 7 is its last place.
        assert_eq!(inputs.slot_mapping, [11, 19, 28, 29, 30]);
        assert_eq!(inputs.visual_row, [-1, 0, 1, -1, -1]);
        assert_eq!(inputs.positions, [[7; 3], [2, 2, 3], [2, 2, 4], [5; 3], [6; 3]]);
        assert_eq!((&inputs.cu_q[..], &inputs.kv_len[..]), (&[0, 1, 5][..], &[8, 7][..]));
        assert_eq!((inputs.block_table_stride, &inputs.block_tables[..]), (2, &[9, 2, 4, 7][..]));
        assert_eq!(
            (&inputs.logit_rows[..], &inputs.zero_blocks[..]),
            (&[0, 4][..], &[BlockId(7)][..])
        );
        let indices: Vec<_> =
            batch.rows.iter().map(|row| (row.sequence.0, row.output_index)).collect();
        assert_eq!(indices, [(70, 1), (71, 0)]);
        let run = batch.visual[0];
        assert_eq!((batch.visual.len(), run.first_row, run.num_rows, run.at), (1, 1, 2, 0));
        assert_eq!(batch.graph_key().kind, StepKind::Mixed);
    }

    #[test]
    fn forced_output_is_known_and_what_follows_it_is_not() {
        let first = StepPlan {
            admitted: vec![admitted(0, vec![50, 51])],
            scheduled: vec![scheduled(0, 9, &[0, 1, 2], true)],
            ..StepPlan::default()
        };
        let decode =
            || StepPlan { scheduled: vec![scheduled(0, 1, &[], true)], ..StepPlan::default() };
        let batch = run(vec![first.clone()]);
        assert_eq!(batch.inputs.token_source[7..], [TokenSource::Host(50), TokenSource::Host(51)]);
        assert_eq!((batch.rows[0].output_index, batch.visual[0].num_rows), (2, 3));
        let batch = run(vec![first, decode()]);
        assert_eq!(batch.inputs.token_source, [TokenSource::LastSampled(SequenceSlot(0))]);
        assert_eq!((batch.rows[0].output_index, batch.inputs.kv_len[0]), (3, 10));
        assert_eq!(batch.graph_key().kind, StepKind::Decode);
    }

    #[test]
    fn a_step_of_decode_is_rounded_up_with_what_has_no_effect() {
        let first = StepPlan {
            admitted: vec![admitted(0, vec![50, 51])],
            scheduled: vec![scheduled(0, 9, &[0, 1, 2], true)],
            ..StepPlan::default()
        };
        let decode =
            StepPlan { scheduled: vec![scheduled(0, 1, &[], true)], ..StepPlan::default() };
        let mut batch = run(vec![first.clone(), decode]);
        let (plain, rows) = (batch.inputs.clone(), batch.rows.clone());
        batch.round_up(&[2, 3], 1);
        batch.round_up(&[], 8);
        assert_eq!(batch.inputs, plain, "no bucket fits");
        batch.round_up(&[3, 8], 8);
        let key = GraphKey { tokens: 3, seqs: 3, rows: 3, kind: StepKind::Decode };
        assert_eq!(batch.graph_key(), key);
        let inputs = &batch.inputs;
        assert_eq!(
            (&inputs.slot_mapping[1..], &inputs.kv_len[..]),
            (&[-1, -1][..], &[10, 0, 0][..])
        );
        assert_eq!((&inputs.cu_q[..], &inputs.logit_rows[..]), (&[0, 1, 1, 1][..], &[0, 1, 2][..]));
        assert_eq!(inputs.block_tables.len(), 3 * inputs.block_table_stride as usize);
        assert_eq!(batch.rows, rows, "nothing more is drawn");
        let mut prefill = run(vec![first]);
        let plain = prefill.inputs.clone();
        prefill.round_up(&[16], 16);
        assert_eq!(prefill.inputs, plain);
    }

    #[test]
    fn a_plan_of_releases_is_an_empty_batch() {
        let batch = run(vec![StepPlan::default()]);
        assert_eq!((batch.num_tokens(), batch.inputs.cu_q.len(), batch.rows.len()), (0, 1, 0));
    }
}
