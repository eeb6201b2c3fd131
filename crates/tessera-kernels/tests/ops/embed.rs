//! Embedding over a split vocabulary, with visual rows.

use tessera_kernels::{Backend, GatherRows, StepInputs, TokenSource};

use crate::support::*;

backend_tests!(embedding_and_visual_rows_sum_to_the_whole, logit_rows_are_picked);

const HIDDEN: usize = 48;

fn inputs(tokens: &[u32], visual_row: &[i32]) -> StepInputs {
    let len = tokens.len();
    StepInputs {
        token_source: tokens.iter().map(|token| TokenSource::Host(*token)).collect(),
        positions: vec![[0; 3]; len],
        slot_mapping: vec![-1; len],
        visual_row: visual_row.to_vec(),
        cu_q: vec![0],
        ..StepInputs::default()
    }
}

fn embedding_and_visual_rows_sum_to_the_whole<B: TestBackend>() {
    // 70 rows over four ranks: shards of 32, the last two short and empty.
    let vocab = 70;
    let tokens = [0, 31, 32, 69, 5, 5, 63, 64];
    let visual_row = [-1, -1, -1, -1, 1, 0, -1, -1];
    for world_size in [1u32, 2, 4] {
        let (mut noise, mut weights) = (Noise::new(30), MemoryWeights::default());
        let table = weights.add("embed.weight", &[vocab, HIDDEN], &mut noise);
        let visual = noise.values(2 * HIDDEN);
        let shard = vocab.div_ceil(16 * world_size as usize) * 16;
        let results = on_ranks(world_size, |communicator| {
            let (mut b, weights) = (planned::<B>(LIMITS), weights.clone());
            let rank = communicator.rank().index();
            let rows = (rank * shard).min(vocab)..((rank + 1) * shard).min(vocab);
            let mut part = part("embed", [vocab, HIDDEN], rows, 0..HIDDEN, false);
            part.padded_rows = shard;
            let linear = b.load_linear(&stacked(vec![part]), &weights).unwrap();
            b.set_communicator(Some(communicator)).unwrap();
            b.upload(&inputs(&tokens, &visual_row)).unwrap();
            if rank == 0 {
                set(&mut b, act(0, 2, HIDDEN), &visual);
            }
            let x = act(1, tokens.len(), HIDDEN);
            set(&mut b, x, &vec![f32::NAN; x.len()]);
            b.embed_merge(&linear, act(0, 2, HIDDEN), x).unwrap();
            b.download(x).unwrap()
        });
        for (i, (token, visual_row)) in tokens.iter().zip(visual_row).enumerate() {
            let expected = match usize::try_from(visual_row) {
                Ok(row) => &visual[row * HIDDEN..][..HIDDEN],
                Err(_) => &table[*token as usize * HIDDEN..][..HIDDEN],
            };
            let rows: Vec<&[f32]> = results.iter().map(|x| &x[i * HIDDEN..][..HIDDEN]).collect();
            let holders = rows.iter().filter(|row| row.iter().any(|value| *value != 0.0)).count();
            assert_eq!(holders, 1, "exactly one rank holds token {i} at {world_size} ranks");
            let sum: Vec<f32> =
                (0..HIDDEN).map(|col| rows.iter().map(|row| row[col]).sum()).collect();
            assert_eq!(sum, expected, "token {i} at {world_size} ranks");
        }
    }
}

fn logit_rows_are_picked<B: TestBackend>() {
    let mut b = planned::<B>(LIMITS);
    let values = Noise::new(31).values(6 * HIDDEN);
    let mut inputs = inputs(&[1; 6], &[-1; 6]);
    inputs.logit_rows = vec![0, 3, 5];
    b.upload(&inputs).unwrap();
    set(&mut b, act(0, 6, HIDDEN), &values);
    b.gather_rows(act(0, 6, HIDDEN), GatherRows::Logits, act(1, 3, HIDDEN)).unwrap();
    let picked = [0, 3, 5].map(|row| &values[row * HIDDEN..][..HIDDEN]).concat();
    assert_eq!(b.download(act(1, 3, HIDDEN)).unwrap(), picked);
}
