// Draws under min_p, top_k and top_p. Each of them keeps the front of the ranking, so that together they are one cut. Twins:
// `sampling::filters`, `draw::gumbel_argmax`.

#include "sampler_rank.cuh"

/// Tokens ranked at first when only top_p limits them, and at least in each round after it.
constexpr uint32_t FIRST_RANKED = 256, NEXT_RANKED = 1536;

/// Lets the first `count` of the list compete, one by one.
__device__ __forceinline__ void draw_listed(const Row& row, const Arena& arena, uint32_t count, Candidate& best) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count; i += RANK_THREADS) {
        const uint64_t rank = arena.ranked.list[i];
        const uint32_t token = token_of(rank), part = token % 4;
        const Words words = philox(token / 4, row.output_index, row.params->seed_low, row.params->seed_high);
        const uint32_t word = part < 2 ? (part == 0 ? words.at[0] : words.at[1]) : (part == 2 ? words.at[2] : words.at[3]);
        const Candidate challenger = {gumbel_score(logit_of(rank), word), token};
        if (beats(challenger, best)) best = challenger;
    }
}

/// Lets all tokens that rank at least `floor` compete. `likeliest` is one of them.
__device__ __forceinline__ Candidate draw_ranked(const Row& row, uint64_t floor, uint32_t likeliest, float highest) {
    const auto words_of = [&](uint32_t group) {
        return philox(group, row.output_index, row.params->seed_low, row.params->seed_high);
    };
    Race race;
    const Words words = words_of(likeliest / 4);
    const uint32_t part = likeliest % 4;
    const uint32_t word = part < 2 ? (part == 0 ? words.at[0] : words.at[1]) : (part == 2 ? words.at[2] : words.at[3]);
    race.lead(Candidate{gumbel_score(highest, word), likeliest});
    for_groups<true, 1>(row, [&](uint32_t group, const float(&values)[4]) {
        const float best = fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3]));
        if (best < race.hopeless || rank_of(best, 4 * group) < floor) return;
        const Words words = words_of(group);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (rank_of(values[i], 4 * group + i) >= floor) race.consider(values[i], 4 * group + i, words.at[i]);
        }
    });
    return race.best;
}

/// Terms e^(logit − highest) of the first `count` of the list.
__device__ __forceinline__ void make_terms(Arena& arena, uint32_t count, float highest) {
    for (uint32_t i = threadIdx.x; i < count; i += RANK_THREADS) {
        arena.ranked.terms[i] = exp_host(logit_of(arena.ranked.list[i]) - highest);
    }
    __syncthreads();
}

/// Starts the ranking whose mass is to reach a target.
__device__ __forceinline__ void begin_mass(Arena& arena, double target) {
    if (threadIdx.x == 0) arena.target = target, arena.mass = 0.0;
}

/// How many of the list's first `count` are kept until the mass reaches its target; `count` if it does not.
__device__ __forceinline__ uint32_t cut_mass(Arena& arena, uint32_t count, bool& is_reached) {
    if (threadIdx.x == 0) {
        double mass = arena.mass;
        uint32_t kept = 0;
        bool reached = false;
        while (kept < count && !reached) {
            mass += static_cast<double>(arena.ranked.terms[kept]);
            reached = mass >= arena.target;
            kept++;
        }
        arena.mass = mass;
        arena.count = kept;
        arena.digit = reached;
    }
    __syncthreads();
    is_reached = arena.digit != 0;
    return arena.count;
}

/// The sum of the list's first `count` terms in the order of `sum_exp`: by lanes of ascending ids. Leaves the list sorted as it was.
__device__ __forceinline__ double sum_listed(Arena& arena, uint32_t count, float highest) {
    // Turned round, ids are the high part: lowest id first.
    const auto turn = [&](uint32_t from_bits) {
        const uint32_t to_bits = 32 + ID_BITS - from_bits;
        const uint64_t low = (1ull << from_bits) - 1;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < count; i += RANK_THREADS) {
            const uint64_t rank = arena.ranked.list[i];
            arena.ranked.list[i] = (rank & low) << to_bits | rank >> from_bits;
        }
        for (uint32_t i = count + threadIdx.x; i < power_of_two(count); i += RANK_THREADS) arena.ranked.list[i] = 0;
        __syncthreads();
        sort_list(arena, power_of_two(count));
    };
    turn(ID_BITS);
    for (uint32_t i = threadIdx.x; i < count; i += RANK_THREADS) {
        const uint64_t turned = arena.ranked.list[i];
        const uint64_t rank = (turned & 0xffffffffu) << ID_BITS | turned >> 32;
        arena.ranked.terms[i] = exp_host(logit_of(rank) - highest);
    }
    __syncthreads();
    if (threadIdx.x < 16) {
        double sum = 0.0;
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t token = ID_MASK - static_cast<uint32_t>(arena.ranked.list[i] >> 32);
            if (token % 16 == threadIdx.x) sum += static_cast<double>(arena.ranked.terms[i]);
        }
        arena.lanes[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) arena.total = add_lanes(arena.lanes);
    __syncthreads();
    const double total = arena.total;
    turn(32);
    return total;
}

/// The winner among the `top_k` (≤ CAPACITY) highest tokens that rank at least `floor`, cut by top_p.
__device__ __forceinline__ Candidate draw_top_k(const Row& row, uint64_t floor, uint32_t top_k, float highest, Arena& arena) {
    uint32_t count = min(collect<true>(row, Span{floor, ABOVE_ALL}, top_k, arena), top_k);
    if (row.params->top_p < 1.0f) {
        begin_mass(arena, static_cast<double>(row.params->top_p) * sum_listed(arena, count, highest));
        make_terms(arena, count, highest);
        bool is_reached = false;
        count = cut_mass(arena, count, is_reached);
    }
    Candidate best = no_candidate();
    draw_listed(row, arena, count, best);
    return best;
}

/// The winner among the tokens that rank at least `floor`, cut by top_p: some are ranked and added, then some more, until the target
/// is reached.
__device__ __forceinline__ Candidate draw_top_p(const Row& row, uint64_t floor, float highest, Arena& arena) {
    begin_mass(arena, static_cast<double>(row.params->top_p) * sum_exp<true>(row, highest, floor, arena));
    Candidate best = no_candidate();
    Span rest = {floor, ABOVE_ALL};
    bool is_reached = false;
    for (uint32_t wanted = FIRST_RANKED; !is_reached; wanted = NEXT_RANKED) {
        const uint32_t count = collect<true>(row, rest, wanted, arena);
        if (count == 0) break;
        rest.high = arena.ranked.list[count - 1];
        make_terms(arena, count, highest);
        const uint32_t kept = cut_mass(arena, count, is_reached);
        draw_listed(row, arena, kept, best);
    }
    return best;
}

/// Makes found [R, chunks] at each row that `filtered` lists begin with the row's winner. Grid [filtered rows], block 1024.
KERNEL_BOUNDS(sampler_filter, 1024, 1)(const Tables* tables, const SampleRow* rows, const uint32_t* masks, const float* logits,
                                       uint32_t cols, Found* found, uint32_t chunks, const uint32_t* filtered) {
    SHARED(Arena, arenas, 1);
    Arena& arena = arenas[0];
    const uint32_t at = filtered[blockIdx.x];
    const Row row = open_row(tables, rows[at], masks, logits + static_cast<uint64_t>(at) * cols, cols);
    const Found* own = found + static_cast<uint64_t>(at) * chunks;
    Found whole = {no_candidate(), NONE};
    for (uint32_t i = threadIdx.x; i < chunks; i += RANK_THREADS) {
        if (beats(own[i].best, whole.best)) whole.best = own[i].best;
        whole.invalid = min(whole.invalid, own[i].invalid);
    }
    whole = block_found(whole);
    if (whole.invalid == NONE && whole.best.token != NONE) {
        const float highest = static_cast<float>(whole.best.score);
        const SlotParams* params = row.params;
        uint64_t floor = lowest_allowed();
        if (params->flags & HAS_MIN_P) floor = max(floor, lowest_rank(highest + params->ln_min_p));
        const uint32_t top_k = params->top_k < row.vocab ? params->top_k : 0;
        if (top_k > 0 && top_k <= CAPACITY) {
            whole.best = draw_top_k(row, floor, top_k, highest, arena);
        } else {
            if (top_k > 0) floor = find_floor<true>(row, Span{floor, ABOVE_ALL}, top_k, top_k, arena);
            whole.best = params->top_p < 1.0f ? draw_top_p(row, floor, highest, arena)
                                              : draw_ranked(row, floor, whole.best.token, highest);
        }
        whole = block_found(whole);
    }
    if (threadIdx.x == 0) found[static_cast<uint64_t>(filtered[blockIdx.x]) * chunks] = whole;
}
REGISTER(sampler_filter)
