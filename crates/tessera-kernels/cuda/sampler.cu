// The draw on the device: the sampler's table, the search of every row, and the record of what was drawn. Same tokens as
// `sampling::process_row` on the host for equal logits, bit for bit.
//
// A step launches `sampler_search` for all rows, `sampler_filter` (sampler_filter.cu) for those with filters, `sampler_finish` for
// all, and `sampler_logprobs` (sampler_logprobs.cu) for those that asked.

#include "sampler_row.cuh"

/// What one upload to a slot holds; 8 words, followed by `SlotParams` and the four lists.
struct Admission {
    uint32_t slot;
    /// Bit 0: the first upload of its sequence, bit 1: the last.
    uint32_t part;
    uint32_t last_token;
    uint32_t num_prompt;
    uint32_t num_output;
    uint32_t num_bias;
    uint32_t num_ending;
    uint32_t unused;
};
constexpr uint32_t FIRST_PART = 1, LAST_PART = 2;

/// A sequence takes a row of the table. Lists: prompt ids, output ids, (id, bias) pairs, ending ids; all ids are real tokens. A long
/// prompt comes in several parts, in order. Grid [1], block 1024.
KERNEL_BOUNDS(sampler_admit, 1024, 1)(const Tables* tables, const Admission* admission) {
    const uint32_t slot = admission->slot;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(admission + 1);
    const SlotParams* params = reinterpret_cast<const SlotParams*>(words);
    const uint32_t num_words = tables->words;
    uint32_t* marks = tables->marks + static_cast<uint64_t>(slot) * num_words * 32;
    if (admission->part & FIRST_PART) {
        constexpr uint32_t PARAM_WORDS = sizeof(SlotParams) / 4;
        uint32_t* to = reinterpret_cast<uint32_t*>(tables->params + slot);
        if (threadIdx.x < PARAM_WORDS) to[threadIdx.x] = words[threadIdx.x];
        if (threadIdx.x == 0) tables->last_sampled[slot] = admission->last_token;
    }
    if ((params->flags & EDITED) == 0) return;
    if (admission->part & FIRST_PART) {
        uint4* four = reinterpret_cast<uint4*>(marks);
        for (uint32_t i = threadIdx.x; i < num_words * 8; i += blockDim.x) four[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    const uint32_t* prompt = words + sizeof(SlotParams) / 4;
    const uint32_t* output = prompt + admission->num_prompt;
    const uint32_t* bias = output + admission->num_output;
    const uint32_t* ending = bias + 2 * admission->num_bias;
    for (uint32_t i = threadIdx.x; i < admission->num_prompt; i += blockDim.x) atomicOr(marks + prompt[i], IN_PROMPT);
    for (uint32_t i = threadIdx.x; i < admission->num_output; i += blockDim.x) atomicAdd(marks + output[i], 1u);
    for (uint32_t i = threadIdx.x; i < admission->num_bias; i += blockDim.x) {
        tables->bias[static_cast<uint64_t>(slot) * MAX_BIAS + i] = Bias{bias[2 * i], __uint_as_float(bias[2 * i + 1])};
        atomicOr(marks + bias[2 * i], BIASED);
    }
    for (uint32_t i = threadIdx.x; i < admission->num_ending; i += blockDim.x) atomicOr(marks + ending[i], ENDS);
    __syncthreads();
    if ((admission->part & LAST_PART) == 0) return;
    for (uint32_t word = threadIdx.x / 32; word < num_words; word += blockDim.x / 32) {
        const uint32_t bits = __ballot_sync(FULL_WARP, marks[32 * word + threadIdx.x % 32] != 0);
        if (threadIdx.x % 32 == 0) tables->marked[static_cast<uint64_t>(slot) * num_words + word] = bits;
    }
}
REGISTER(sampler_admit)

/// Groups of four tokens that a thread of the search holds, and tokens of its block.
constexpr uint32_t HELD = 4, SEARCH_THREADS = 256, CHUNK = 4 * HELD * SEARCH_THREADS;

/// found [R, chunks] = the winner of each chunk of tokens: the highest logit of greedy rows and of rows with filters, the highest
/// score of the others. logits [R, cols] f32. Grid [ceil(vocab / CHUNK), R], block 256.
KERNEL_BOUNDS(sampler_search, 256, 4)(const Tables* tables, const SampleRow* rows, const uint32_t* masks, const float* logits,
                                      uint32_t cols, Found* found) {
    SHARED(double, first_score, 1);
    const SampleRow sample = rows[blockIdx.y];
    const Row row = open_row(tables, sample, masks, logits + static_cast<uint64_t>(blockIdx.y) * cols, cols);
    const uint32_t first_group = blockIdx.x * (CHUNK / 4) + threadIdx.x, num_groups = row.num_groups();
    float values[HELD][4];
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++) {
        const uint32_t group = first_group + i * SEARCH_THREADS;
        values[i][0] = values[i][1] = values[i][2] = values[i][3] = -infinity();
        if (group < num_groups) row.raw(group, values[i]);
    }
    Found own = {no_candidate(), NONE};
    float highest = -infinity();
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++) {
        const uint32_t group = first_group + i * SEARCH_THREADS;
        if (group >= num_groups) continue;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (!(values[i][j] < infinity())) own.invalid = min(own.invalid, 4 * group + j);
        }
        row.edit(group, values[i]);
        row.scale(values[i]);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (values[i][j] > highest) highest = values[i][j], own.best.token = 4 * group + j;
        }
    }
    own.best.score = static_cast<double>(highest);
    own = block_found(own);
    const bool is_drawn = (row.params->flags & (GREEDY | FILTERED)) == 0;
    if (is_drawn && own.best.token != NONE) {
        const uint32_t low = row.params->seed_low, high = row.params->seed_high, at = row.output_index;
        if (threadIdx.x == 0) {
            const Words words = philox(own.best.token / 4, at, low, high);
            const uint32_t i = own.best.token % 4;
            const uint32_t word = i < 2 ? (i == 0 ? words.at[0] : words.at[1]) : (i == 2 ? words.at[2] : words.at[3]);
            first_score[0] = gumbel_score(static_cast<float>(own.best.score), word);
        }
        __syncthreads();
        Race race;
        race.lead(Candidate{first_score[0], own.best.token});
#pragma unroll
        for (uint32_t i = 0; i < HELD; i++) {
            const float best = fmaxf(fmaxf(values[i][0], values[i][1]), fmaxf(values[i][2], values[i][3]));
            if (best < race.hopeless || best == -infinity()) continue;
            const uint32_t group = first_group + i * SEARCH_THREADS;
            const Words words = philox(group, at, low, high);
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                if (values[i][j] > -infinity()) race.consider(values[i][j], 4 * group + j, words.at[j]);
            }
        }
        own.best = race.best;
        own = block_found(own);
    }
    if (threadIdx.x == 0) found[static_cast<uint64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = own;
}
REGISTER(sampler_search)

/// What a row gave; read by the host.
struct Drawn {
    uint32_t status;
    uint32_t token;
    /// Of an invalid logit: its bits.
    uint32_t value;
    uint32_t unused;
};
constexpr uint32_t DRAWN = 0, INVALID_LOGIT = 1, NOTHING_ALLOWED = 2;

/// drawn [R] = the best of found [R, chunks] (of rows with filters, the first entry is the winner); the token becomes the slot's last
/// one and counts as output. Grid [R], block 32.
KERNEL(sampler_finish)(const Tables* tables, const SampleRow* rows, const float* logits, uint32_t cols, const Found* found,
                       uint32_t chunks, Drawn* drawn) {
    const SampleRow sample = rows[blockIdx.x];
    const uint32_t flags = tables->params[sample.slot].flags;
    const Found* own = found + static_cast<uint64_t>(blockIdx.x) * chunks;
    Candidate best = no_candidate();
    uint32_t invalid = NONE;
    const uint32_t count = (flags & FILTERED) ? 1 : chunks;
    for (uint32_t i = threadIdx.x; i < count; i += 32) {
        if (beats(own[i].best, best)) best = own[i].best;
        invalid = min(invalid, own[i].invalid);
    }
    best = warp_best(best);
    invalid = warp_min(invalid);
    if (threadIdx.x != 0) return;
    Drawn result = {DRAWN, best.token, 0, 0};
    if (invalid != NONE) {
        const float value = logits[static_cast<uint64_t>(blockIdx.x) * cols + invalid];
        result = Drawn{INVALID_LOGIT, invalid, __float_as_uint(value), 0};
    } else if (best.token == NONE) {
        result.status = NOTHING_ALLOWED;
    } else {
        tables->last_sampled[sample.slot] = best.token;
        if (flags & PENALIZED) {
            const uint64_t words = tables->words;
            tables->marks[sample.slot * words * 32 + best.token] += 1;
            tables->marked[sample.slot * words + best.token / 32] |= 1u << (best.token % 32);
        }
    }
    drawn[blockIdx.x] = result;
}
REGISTER(sampler_finish)
