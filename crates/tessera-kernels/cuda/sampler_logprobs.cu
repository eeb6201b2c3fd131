// Log probabilities under the model's own distribution, natural log. Twin: `sampling::logprobs::token_logprobs`.

#include "sampler_rank.cuh"

/// Most likely tokens that may be asked for.
constexpr uint32_t MAX_TOP = 20;

/// A row whose log probabilities are wanted; written by the host.
struct LogprobJob {
    /// Row of the logits.
    uint32_t row;
    /// The token, or NONE for the one that was drawn from that row.
    uint32_t token;
    uint32_t num_top;
    uint32_t unused;
};

/// What a job gave; read by the host. `top` holds ids and log probabilities of the likeliest, best first.
struct Logprobs {
    /// Nonzero if the row holds an invalid value, or nothing was drawn from it.
    uint32_t status;
    float logprob;
    uint32_t num_top;
    uint32_t unused;
    uint32_t tokens[MAX_TOP];
    float values[MAX_TOP];
};

/// (row − highest) − ln Σ, rounded to f32 once.
__device__ __forceinline__ float logprob_of(float logit, float highest, double ln_sum) {
    return static_cast<float>(static_cast<double>(logit - highest) - ln_sum);
}

/// out [jobs] of logits [R, cols] f32. drawn [R] words of four: status, token (see `Drawn`). Grid [jobs], block 1024.
KERNEL_BOUNDS(sampler_logprobs, 1024, 1)(const Tables* tables, const float* logits, uint32_t cols, const LogprobJob* jobs,
                                         const uint4* drawn, Logprobs* out) {
    SHARED(Arena, arenas, 1);
    Arena& arena = arenas[0];
    const LogprobJob job = jobs[blockIdx.x];
    const Row row = open_raw_row(logits + static_cast<uint64_t>(job.row) * cols, tables->vocab, cols);
    Found whole = {no_candidate(), NONE};
    for_groups<false>(row, [&](uint32_t group, const float(&values)[4]) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const Candidate candidate = {static_cast<double>(values[i]), 4 * group + i};
            if (!(values[i] < infinity())) whole.invalid = min(whole.invalid, candidate.token);
            if (values[i] > -infinity() && beats(candidate, whole.best)) whole.best = candidate;
        }
    });
    whole = block_found(whole);
    const bool is_drawn = job.token == NONE;
    const uint32_t token = is_drawn ? drawn[job.row].y : job.token;
    Logprobs& result = out[blockIdx.x];
    if (whole.invalid != NONE || (is_drawn && drawn[job.row].x != 0)) {
        if (threadIdx.x == 0) result.status = 1;
        return;
    }
    const float highest = static_cast<float>(whole.best.score);
    const double ln_sum = ln_host(sum_exp<false>(row, highest, lowest_allowed(), arena));
    const uint32_t num_top = min(job.num_top, MAX_TOP);
    uint32_t count = 0;
    if (num_top > 0) count = min(collect<false>(row, Span{lowest_allowed(), ABOVE_ALL}, num_top, arena), num_top);
    if (threadIdx.x == 0) {
        result.status = 0;
        result.logprob = logprob_of(row.logits[token], highest, ln_sum);
        result.num_top = count;
    }
    if (threadIdx.x < count) {
        const uint64_t rank = arena.ranked.list[threadIdx.x];
        result.tokens[threadIdx.x] = token_of(rank);
        result.values[threadIdx.x] = logprob_of(logit_of(rank), highest, ln_sum);
    }
}
REGISTER(sampler_logprobs)
