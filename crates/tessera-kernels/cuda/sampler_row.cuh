// One row of logits as the draw sees it: edited on the fly, never written. Twins: `sampling::state`, `filters::apply_mask`,
// `filters::apply_temperature`.

#pragma once

#include "sampler_math.cuh"

/// What a sequence slot was admitted with; 16 words, written by the host (`cuda::sampler`).
struct SlotParams {
    float temperature;
    /// ln min_p, rounded to f32.
    float ln_min_p;
    uint32_t top_k;
    float top_p;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    uint32_t min_tokens;
    uint32_t seed_low;
    uint32_t seed_high;
    uint32_t flags;
    uint32_t num_bias;
    uint32_t unused[4];
};

/// Flags of `SlotParams`.
constexpr uint32_t GREEDY = 1, EDITED = 2, PENALIZED = 4, FILTERED = 8, HAS_MIN_P = 16;

/// An entry of a logit bias; sorted by token within a slot.
struct Bias {
    uint32_t token;
    float value;
};
constexpr uint32_t MAX_BIAS = 1024;

/// Marks of a token in a slot's `marks`, above its number of occurrences in the output.
constexpr uint32_t IN_PROMPT = 1u << 31, BIASED = 1u << 30, ENDS = 1u << 29, COUNT = ENDS - 1;

/// Where the sampler's table lies; made once by the host.
struct Tables {
    /// [slots]
    SlotParams* params;
    /// [slots, 32 · words]; of slots without EDITED nothing is read.
    uint32_t* marks;
    /// [slots, words] a bit for every token that has a mark.
    uint32_t* marked;
    /// [slots, MAX_BIAS]
    Bias* bias;
    /// [slots] the token drawn last, or the last one that came with the sequence.
    uint32_t* last_sampled;
    /// Real tokens; logits beyond are padding.
    uint32_t vocab;
    /// Words of a bitset over the vocabulary.
    uint32_t words;
};

/// A row to draw from; written by the host.
struct SampleRow {
    uint32_t slot;
    uint32_t output_index;
    /// First word of its bitset in the step's masks, or NONE.
    uint32_t mask_at;
    uint32_t unused;
};

/// One row and all that edits it. Tokens are read in groups of four neighbours, which share a block of random words.
struct Row {
    const float* logits;
    const Tables* tables;
    const SlotParams* params;
    const uint32_t* mask;
    const uint32_t* marked;
    uint32_t slot;
    uint32_t vocab;
    uint32_t output_index;
    float temperature;
    /// Whether groups lie on 16 bytes.
    bool is_aligned;

    __device__ __forceinline__ uint32_t num_groups() const { return (vocab + 3) / 4; }

    /// Logits of tokens 4·group.. as the model gave them, −∞ beyond the real tokens.
    __device__ __forceinline__ void raw(uint32_t group, float (&out)[4]) const {
        const uint32_t token = 4 * group;
        if (is_aligned && token + 4 <= vocab) {
            const float4 four = *reinterpret_cast<const float4*>(logits + token);
            out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
        } else {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) out[i] = token + i < vocab ? logits[token + i] : -infinity();
        }
    }

    /// Raw logits to edited ones: mask, bias, penalties, min_tokens.
    __device__ __forceinline__ void edit(uint32_t group, float (&logits)[4]) const {
        if (mask != nullptr) {
            const uint32_t allowed = mask[group / 8] >> (4 * (group % 8));
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                if ((allowed >> i & 1) == 0) logits[i] = -infinity();
            }
        }
        if (marked != nullptr) {
            const uint32_t found = marked[group / 8] >> (4 * (group % 8)) & 15;
            if (found != 0) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    if (found >> i & 1) logits[i] = edit_marked(4 * group + i, logits[i]);
                }
            }
        }
    }

    /// Edited logits divided by the temperature.
    __device__ __forceinline__ void scale(float (&logits)[4]) const {
        if (temperature != 1.0f) {
#pragma unroll
            for (int i = 0; i < 4; i++) logits[i] = div_rn(logits[i], temperature);
        }
    }

    __device__ __forceinline__ float edit_marked(uint32_t token, float logit) const {
        const uint32_t mark = tables->marks[static_cast<uint64_t>(slot) * tables->words * 32 + token];
        if (mark & BIASED) {
            const Bias* bias = tables->bias + static_cast<uint64_t>(slot) * MAX_BIAS;
            uint32_t low = 0, high = params->num_bias;
            while (low < high) {
                const uint32_t middle = (low + high) / 2;
                if (bias[middle].token < token) low = middle + 1;
                else high = middle;
            }
            for (; low < params->num_bias && bias[low].token == token; low++) logit = logit + bias[low].value;
        }
        const uint32_t count = mark & COUNT;
        if ((params->flags & PENALIZED) && (count > 0 || (mark & IN_PROMPT))) {
            const float repeated =
                logit > 0.0f ? div_rn(logit, params->repetition_penalty) : logit * params->repetition_penalty;
            const float presence = count > 0 ? params->presence_penalty : 0.0f;
            logit = repeated - params->frequency_penalty * static_cast<float>(count) - presence;
        }
        const bool is_barred = (mark & ENDS) && output_index < params->min_tokens;
        return is_barred ? -infinity() : logit;
    }
};

/// The row of logits [.., cols] that `sample` names.
__device__ __forceinline__ Row open_row(const Tables* tables, const SampleRow& sample, const uint32_t* masks, const float* logits,
                                        uint32_t cols) {
    const SlotParams* params = tables->params + sample.slot;
    const bool is_edited = (params->flags & EDITED) != 0;
    Row row;
    row.logits = logits;
    row.tables = tables;
    row.slot = sample.slot;
    row.params = params;
    row.mask = sample.mask_at == NONE ? nullptr : masks + sample.mask_at;
    row.marked = is_edited ? tables->marked + static_cast<uint64_t>(sample.slot) * tables->words : nullptr;
    row.vocab = min(tables->vocab, cols);
    row.output_index = sample.output_index;
    row.temperature = (params->flags & GREEDY) ? 1.0f : params->temperature;
    row.is_aligned = cols % 4 == 0;
    return row;
}

/// The row as the model gave it, for log probabilities.
__device__ __forceinline__ Row open_raw_row(const float* logits, uint32_t vocab, uint32_t cols) {
    Row row = {};
    row.logits = logits;
    row.vocab = min(vocab, cols);
    row.temperature = 1.0f;
    row.is_aligned = cols % 4 == 0;
    return row;
}

/// The best of a warp's candidates, in every lane.
__device__ __forceinline__ Candidate warp_best(Candidate best) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        Candidate other;
        other.score = __shfl_xor_sync(FULL_WARP, best.score, step);
        other.token = __shfl_xor_sync(FULL_WARP, best.token, step);
        if (beats(other, best)) best = other;
    }
    return best;
}

__device__ __forceinline__ uint32_t warp_min(uint32_t value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = min(value, __shfl_xor_sync(FULL_WARP, value, step));
    return value;
}

/// What one block, or all of them, found in a row.
struct Found {
    Candidate best;
    /// Lowest token whose raw logit is NaN or +∞, or NONE.
    uint32_t invalid;
};

/// What the whole block found, in every thread. For blocks of at most 1024 threads.
__device__ __forceinline__ Found block_found(Found found) {
    SHARED(double, scores, 32);
    SHARED(uint32_t, tokens, 32);
    SHARED(uint32_t, invalids, 32);
    found.best = warp_best(found.best);
    found.invalid = warp_min(found.invalid);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) scores[warp] = found.best.score, tokens[warp] = found.best.token, invalids[warp] = found.invalid;
    __syncthreads();
    const bool is_warp = lane < blockDim.x / 32;
    found.best = is_warp ? Candidate{scores[lane], tokens[lane]} : no_candidate();
    found.invalid = is_warp ? invalids[lane] : NONE;
    found.best = warp_best(found.best);
    found.invalid = warp_min(found.invalid);
    return found;
}
