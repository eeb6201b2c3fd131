// The ranking of a row's tokens, without sorting the vocabulary: one block of 1024 threads finds where the ranking is to be cut by
// counting digits, and sorts only what it then collects. Twins: `sampling::filters`, `logprobs::likeliest`, `math::sum_exp`.

#pragma once

#include "sampler_row.cuh"

constexpr uint32_t RANK_THREADS = 1024;
/// Tokens that a block can hold and sort.
constexpr uint32_t CAPACITY = 2048;
/// Tokens of one step of `sum_exp`.
constexpr uint32_t TILE = 4 * RANK_THREADS;
/// Bits of a token id in a rank.
constexpr uint32_t ID_BITS = 22, ID_MASK = (1u << ID_BITS) - 1;

/// Likelier tokens have higher ranks, among equals the lower id; no two tokens have the same.
__device__ __forceinline__ uint64_t rank_of(float logit, uint32_t token) {
    const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(key) << ID_BITS | (ID_MASK - token);
}

__device__ __forceinline__ uint32_t token_of(uint64_t rank) {
    return ID_MASK - (static_cast<uint32_t>(rank) & ID_MASK);
}

__device__ __forceinline__ float logit_of(uint64_t rank) {
    const uint32_t key = static_cast<uint32_t>(rank >> ID_BITS);
    return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

/// The lowest rank of a token whose logit is at least `logit`.
__device__ __forceinline__ uint64_t lowest_rank(float logit) {
    return rank_of(logit, ID_MASK);
}

/// Every token but the barred ones ranks at least here.
__device__ __forceinline__ uint64_t lowest_allowed() {
    return rank_of(-infinity(), 0) + 1;
}

/// Above every rank.
constexpr uint64_t ABOVE_ALL = ~0ull;

/// Ranks `low..high`.
struct Span {
    uint64_t low;
    uint64_t high;

    __device__ __forceinline__ bool holds(uint64_t rank) const { return rank >= low && rank < high; }
};

/// Shared memory of a ranking block.
struct Arena {
    union {
        float tiles[2][TILE];
        struct {
            uint64_t list[CAPACITY];
            uint32_t histogram[CAPACITY];
            float terms[CAPACITY];
        } ranked;
    };
    uint32_t warp_sums[32];
    double lanes[16];
    double total;
    /// What top_p asks for, and the mass ranked so far.
    double target, mass;
    /// Where a digit was cut: the digit, tokens at or above it, tokens above it.
    uint32_t digit, at_least, above;
    uint32_t count;
};

/// Calls `body(group, values)` for every group of the row; `EDIT` says whether logits are edited and scaled first. A thread reads
/// `AHEAD` groups before it works on the first.
template <bool EDIT, uint32_t AHEAD = EDIT ? 2 : 4, typename Body>
__device__ __forceinline__ void for_groups(const Row& row, Body&& body) {
    const uint32_t num_groups = row.num_groups();
    for (uint32_t first = threadIdx.x; first < num_groups; first += AHEAD * RANK_THREADS) {
        float values[AHEAD][4];
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            if (first + i * RANK_THREADS < num_groups) row.raw(first + i * RANK_THREADS, values[i]);
        }
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            const uint32_t group = first + i * RANK_THREADS;
            if (group >= num_groups) continue;
            if (EDIT) {
                row.edit(group, values[i]);
                row.scale(values[i]);
            }
            body(group, values[i]);
        }
    }
}

/// The digit at which tokens counted from the highest digit down reach `wanted`, left in the arena; false when all are fewer. Every
/// thread gets the same answer.
__device__ __forceinline__ bool cut_digit(Arena& arena, uint32_t before, uint32_t wanted) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t digit = CAPACITY - 1 - 2 * threadIdx.x;
    const uint32_t first = arena.ranked.histogram[digit], second = arena.ranked.histogram[digit - 1];
    uint32_t sum = first + second;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(FULL_WARP, sum, step);
        if (lane >= static_cast<uint32_t>(step)) sum += other;
    }
    if (lane == 31) arena.warp_sums[warp] = sum;
    __syncthreads();
    uint32_t above = before;
    for (uint32_t i = 0; i < warp; i++) above += arena.warp_sums[i];
    const uint32_t end = above + sum, begin = end - first - second;
    if (begin < wanted && end >= wanted) {
        const bool is_first = begin + first >= wanted;
        arena.digit = is_first ? digit : digit - 1;
        arena.above = is_first ? begin : begin + first;
        arena.at_least = is_first ? begin + first : end;
    }
    return __syncthreads_or(end >= wanted) != 0;
}

/// The rank from which on at least `wanted` tokens of `span` are found, or all, and at most `most` (`wanted` ≤ `most`).
///
/// Counts one digit of the ranks after the other, from the highest: 11 bits each, then 10.
template <bool EDIT>
__device__ __forceinline__ uint64_t find_floor(const Row& row, const Span& span, uint32_t wanted, uint32_t most, Arena& arena) {
    constexpr uint32_t DIGIT_BITS = 11, RANK_BITS = 32 + ID_BITS;
    uint64_t prefix = 0;
    uint32_t above = 0, bits_left = RANK_BITS;
    while (true) {
        const uint32_t width = min(bits_left, DIGIT_BITS), shift = bits_left - width;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < CAPACITY; i += RANK_THREADS) arena.ranked.histogram[i] = 0;
        __syncthreads();
        for_groups<EDIT>(row, [&](uint32_t group, const float(&values)[4]) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint64_t rank = rank_of(values[i], 4 * group + i);
                if (span.holds(rank) && rank >> bits_left == prefix) {
                    atomicAdd(&arena.ranked.histogram[static_cast<uint32_t>(rank >> shift) & ((1u << width) - 1)], 1u);
                }
            }
        });
        __syncthreads();
        // Only the first digit can fall short: the others cut a digit that held enough.
        if (!cut_digit(arena, above, wanted)) return span.low;
        prefix = prefix << width | arena.digit;
        const uint64_t floor = prefix << shift;
        if (arena.at_least <= most || shift == 0) return max(floor, span.low);
        above = arena.above;
        bits_left = shift;
    }
}

/// Sorts the first `count` (a power of two, at most CAPACITY) of the list, highest first.
__device__ __forceinline__ void sort_list(Arena& arena, uint32_t count) {
    for (uint32_t run = 2; run <= count; run *= 2) {
        for (uint32_t step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            if (threadIdx.x >= count / 2) continue;
            const uint32_t low = 2 * threadIdx.x - (threadIdx.x & (step - 1)), high = low + step;
            const uint64_t a = arena.ranked.list[low], b = arena.ranked.list[high];
            const bool is_descending = (low & run) == 0;
            if ((a < b) == is_descending) arena.ranked.list[low] = b, arena.ranked.list[high] = a;
        }
    }
    __syncthreads();
}

__device__ __forceinline__ uint32_t power_of_two(uint32_t count) {
    return count <= 1 ? 1 : 1u << (32 - __clz(static_cast<int>(count - 1)));
}

/// Collects the highest tokens of `span`, at least `wanted` (≤ CAPACITY) or all, sorted in the list. Returns how many.
template <bool EDIT>
__device__ __forceinline__ uint32_t collect(const Row& row, const Span& span, uint32_t wanted, Arena& arena) {
    const Span chosen = {find_floor<EDIT>(row, span, wanted, CAPACITY, arena), span.high};
    __syncthreads();
    if (threadIdx.x == 0) arena.count = 0;
    for (uint32_t i = threadIdx.x; i < CAPACITY; i += RANK_THREADS) arena.ranked.list[i] = 0;
    __syncthreads();
    for_groups<EDIT>(row, [&](uint32_t group, const float(&values)[4]) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint64_t rank = rank_of(values[i], 4 * group + i);
            if (chosen.holds(rank)) arena.ranked.list[atomicAdd(&arena.count, 1u)] = rank;
        }
    });
    __syncthreads();
    const uint32_t count = arena.count;
    sort_list(arena, power_of_two(count));
    return count;
}

/// Adds the 16 lanes in ascending pairs. For one thread.
__device__ __forceinline__ double add_lanes(double* lanes) {
    for (int width = 8; width > 0; width /= 2) {
        for (int lane = 0; lane < width; lane++) lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
    }
    return lanes[0];
}

/// Σ e^(x − highest) over the row's tokens that rank at least `floor`, in the host's order: token i adds to lane i mod 16, in
/// ascending order. All threads make the terms of a tile, 16 of them add those of the tile before.
template <bool EDIT>
__device__ __forceinline__ double sum_exp(const Row& row, float highest, uint64_t floor, Arena& arena) {
    const uint32_t num_groups = row.num_groups();
    double lane_sum = 0.0;
    uint32_t tile = 0;
    for (uint32_t first = 0; first < num_groups; first += RANK_THREADS, tile ^= 1) {
        const uint32_t group = first + threadIdx.x;
        float terms[4] = {};
        if (group < num_groups) {
            float values[4];
            row.raw(group, values);
            if (EDIT) {
                row.edit(group, values);
                row.scale(values);
            }
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                if (rank_of(values[i], 4 * group + i) >= floor) terms[i] = exp_host(values[i] - highest);
            }
        }
        // Two tiles in turn: whoever passes this barrier has added the tile before the last.
        if (first == 0) __syncthreads();
        *reinterpret_cast<float4*>(arena.tiles[tile] + 4 * threadIdx.x) = make_float4(terms[0], terms[1], terms[2], terms[3]);
        __syncthreads();
        if (threadIdx.x < 16) {
            const uint32_t count = min(TILE, 4 * (num_groups - first));
#pragma unroll 16
            for (uint32_t i = threadIdx.x; i < count; i += 16) lane_sum += static_cast<double>(arena.tiles[tile][i]);
        }
    }
    if (threadIdx.x < 16) arena.lanes[threadIdx.x] = lane_sum;
    __syncthreads();
    if (threadIdx.x == 0) arena.total = add_lanes(arena.lanes);
    __syncthreads();
    return arena.total;
}
