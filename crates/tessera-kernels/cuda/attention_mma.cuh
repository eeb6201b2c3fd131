// Attention of a tile of query rows on tensor cores, one pass over the keys (after Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018, and FlashAttention-2). Shared by the paged and the vision kernels.
//
// Bits of a row depend on the row, its keys and its values alone. Every score and every sum is one chain of m16n8k16 products in
// ascending dimension or position, whichever warp computes it; maxima have no order; the sum of the probabilities is one more
// column of the second product (a column of ones), so no shuffle orders it. Tiles of 64 keys start at absolute multiples of 64;
// masked entries have probability exactly 0. So a tile may be 16 or 128 rows high, and its warps may share rows or keys, and
// the bits stay. What is rounded: probabilities to bf16, before they are summed; all else is f32.

#pragma once

#include "platform.cuh"

/// Keys of one tile.
constexpr int TILE_KEYS = 64;
/// Positions whose partial result starts from nothing; partials are merged in ascending order.
constexpr int CHUNK_KEYS = 1024;
constexpr int CHUNK_TILES = CHUNK_KEYS / TILE_KEYS;

constexpr float NEGATIVE_INFINITY = -__builtin_huge_valf();

/// Two bf16 ones.
constexpr uint32_t ONES = 0x3f803f80u;

/// How a block of threads shares the work on a tile of query rows.
///
/// `ROW_WARPS` warps take 16·`M_TILES` rows each; `KEY_WARPS` warps share the same rows: in the first product each has some of the
/// keys, in the second some of the dimensions, and scores cross over through shared memory.
/// Rows in shared memory are 16 bytes longer than a head, so that eight of them in a column lie in different banks (a head of 80
/// takes 176 bytes, one of 128 takes 272).
template <int HEAD_DIM, int M_TILES_, int ROW_WARPS_, int KEY_WARPS_, int STAGES_>
struct TileShape {
    static constexpr int DIM = HEAD_DIM;
    static constexpr int M_TILES = M_TILES_;
    static constexpr int ROW_WARPS = ROW_WARPS_;
    static constexpr int KEY_WARPS = KEY_WARPS_;
    static constexpr int STAGES = STAGES_;
    static constexpr int THREADS = 32 * ROW_WARPS * KEY_WARPS;
    static constexpr int ROWS = 16 * M_TILES * ROW_WARPS;
    static constexpr int K_STEPS = DIM / 16;
    /// 8-wide tiles of one warp: of scores, of results.
    static constexpr int SCORE_TILES = TILE_KEYS / 8 / KEY_WARPS;
    static constexpr int VALUE_TILES = DIM / 8 / KEY_WARPS;
    /// 16-byte pieces of a head, and elements from one row in shared memory to the next.
    static constexpr int PIECES = DIM / 8;
    static constexpr int STRIDE = DIM + 8;
    static constexpr int TILE_ELEMENTS = TILE_KEYS * STRIDE;
    static constexpr int PROBABILITY_STRIDE = TILE_KEYS + 8;
    /// Elements of the parts of shared memory: queries, stages of keys and values, then for crossing over probabilities and maxima.
    static constexpr int QUERY_ELEMENTS = ROWS * STRIDE;
    static constexpr int CROSS_ELEMENTS = KEY_WARPS == 1 ? 0 : ROWS * PROBABILITY_STRIDE + 2 * KEY_WARPS * ROWS;
    static constexpr int SHARED_BYTES = 2 * (QUERY_ELEMENTS + STAGES * 2 * TILE_ELEMENTS + CROSS_ELEMENTS);
    /// Queries of one row tile stay in registers; those of two would not leave room for the results.
    static constexpr bool QUERIES_IN_REGISTERS = M_TILES == 1;
    /// f32 values that a thread carries from chunk to chunk: sums, sums of probabilities, maxima.
    static constexpr int CARRIED = M_TILES * (VALUE_TILES * 4 + 4);

    static_assert(DIM % 16 == 0 && SCORE_TILES % 2 == 0 && VALUE_TILES % 2 == 0, "whole pairs of 8-wide tiles");
    static_assert(KEY_WARPS == 1 || (SCORE_TILES == 2 && ROW_WARPS == 1), "a warp's keys are one step of the second product");
};

/// Where a thread stands, and where the parts of shared memory are.
template <typename S>
struct TilePlace {
    bf16* queries;
    /// `[STAGES][keys, values][TILE_KEYS][STRIDE]`
    bf16* stages;
    /// `[ROWS][PROBABILITY_STRIDE]`
    bf16* probabilities;
    /// `[KEY_WARPS][ROWS]`
    float* maxima;
    int lane;
    /// First row and index among the warps that share it.
    int first_row;
    int key_warp;

    __device__ __forceinline__ explicit TilePlace(bf16* shared) {
        const int warp = static_cast<int>(threadIdx.x) / 32;
        queries = shared;
        stages = queries + S::QUERY_ELEMENTS;
        probabilities = stages + S::STAGES * 2 * S::TILE_ELEMENTS;
        maxima = reinterpret_cast<float*>(probabilities + S::ROWS * S::PROBABILITY_STRIDE);
        lane = static_cast<int>(threadIdx.x) % 32;
        first_row = warp / S::KEY_WARPS * 16 * S::M_TILES;
        key_warp = warp % S::KEY_WARPS;
    }

    __device__ __forceinline__ bf16* keys(int stage) const { return stages + stage * 2 * S::TILE_ELEMENTS; }
    __device__ __forceinline__ bf16* values(int stage) const { return keys(stage) + S::TILE_ELEMENTS; }
    /// The row in the tile of half `half` (0 or 1) of row tile `m`.
    __device__ __forceinline__ int row(int m, int half) const { return first_row + 16 * m + 8 * half + lane / 4; }
    /// The dimension of the first of the two results that this thread has in 8-wide tile `n`.
    __device__ __forceinline__ int dim(int n) const { return (key_warp * S::VALUE_TILES + n) * 8 + 2 * (lane % 4); }
};

/// What a thread accumulates: rows `lane / 4` and `lane / 4 + 8` of each row tile.
template <typename S>
struct TileState {
    float sums[S::M_TILES][S::VALUE_TILES][4];
    /// Sums of probabilities: [0] and [1] of the upper row, [2] and [3] of the lower, all columns alike.
    float weights[S::M_TILES][4];
    /// Largest score so far, in powers of two.
    float maxima[S::M_TILES][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
            for (int n = 0; n < S::VALUE_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) weights[m][i] = 0.0f;
            maxima[m][0] = maxima[m][1] = NEGATIVE_INFINITY;
        }
    }
};

/// Queries of a warp as fragments, when they stay in registers.
template <typename S>
struct TileQueries {
    uint32_t fragments[S::QUERIES_IN_REGISTERS ? S::K_STEPS : 1][4];
};

/// What is subtracted from scores whose maximum is `max`: of a row that saw nothing, nothing.
__device__ __forceinline__ float softmax_shift(float max) {
    return max == NEGATIVE_INFINITY ? 0.0f : max;
}

/// What two partial results are multiplied by to be added, and their common maximum. A partial that saw nothing leaves the other
/// as it is.
struct MergeFactors {
    float old_factor;
    float new_factor;
    float max;

    __device__ __forceinline__ MergeFactors(float old_max, float new_max) {
        max = fmaxf(old_max, new_max);
        const float shift = softmax_shift(max);
        old_factor = exp2_fast(sub_rn(old_max, shift));
        new_factor = exp2_fast(sub_rn(new_max, shift));
    }

    __device__ __forceinline__ float merge(float old_value, float new_value) const {
        return fma_rn(new_value, new_factor, mul_rn(old_value, old_factor));
    }
};

/// The result of a row: sums times 1 / sum of probabilities. −0 becomes 0, since whether a sum is −0 may depend on how many masked
/// positions were added to it.
__device__ __forceinline__ float attention_result(float sum, float inverse) {
    return add_rn(mul_rn(sum, inverse), 0.0f);
}

/// The address in shared memory that this lane names for `ldmatrix`: matrices 0 to 3 are (rows 0, columns 0), (8, 0), (0, 8), (8, 8)
/// of a 16 × 16 tile at `corner`.
__device__ __forceinline__ const bf16* rows_first(const bf16* corner, int stride, int lane) {
    return corner + (lane % 16) * stride + lane / 16 * 8;
}

/// As `rows_first`, with matrices 1 and 2 swapped.
__device__ __forceinline__ const bf16* columns_first(const bf16* corner, int stride, int lane) {
    return corner + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
}

/// Queries from shared memory to registers, where they fit.
template <typename S>
__device__ __forceinline__ void take_queries(const TilePlace<S>& place, TileQueries<S>& queries) {
    if constexpr (S::QUERIES_IN_REGISTERS) {
#pragma unroll
        for (int k = 0; k < S::K_STEPS; k++) {
            ldmatrix_x4(queries.fragments[k], rows_first(place.queries + place.first_row * S::STRIDE + 16 * k, S::STRIDE, place.lane));
        }
    }
}

/// Scores of this warp's rows and its share of a tile of keys.
template <typename S>
__device__ __forceinline__ void tile_scores(
    const TilePlace<S>& place, const TileQueries<S>& queries, const bf16* keys, float (&scores)[S::M_TILES][S::SCORE_TILES][4]
) {
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < S::SCORE_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[m][n][i] = 0.0f;
        }
    }
    const bf16* corner = keys + place.key_warp * S::SCORE_TILES * 8 * S::STRIDE;
#pragma unroll
    for (int k = 0; k < S::K_STEPS; k++) {
        uint32_t a[S::M_TILES][4];
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++) {
            if constexpr (S::QUERIES_IN_REGISTERS) {
#pragma unroll
                for (int i = 0; i < 4; i++) a[m][i] = queries.fragments[k][i];
            } else {
                const bf16* rows = place.queries + (place.first_row + 16 * m) * S::STRIDE;
                ldmatrix_x4(a[m], rows_first(rows + 16 * k, S::STRIDE, place.lane));
            }
        }
#pragma unroll
        for (int n = 0; n < S::SCORE_TILES; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, columns_first(corner + 8 * n * S::STRIDE + 16 * k, S::STRIDE, place.lane));
#pragma unroll
            for (int m = 0; m < S::M_TILES; m++) {
                mma_m16n8k16_bf16(scores[m][n], a[m], b, scores[m][n]);
                mma_m16n8k16_bf16(scores[m][n + 1], a[m], b + 2, scores[m][n + 1]);
            }
        }
    }
}

/// Scores of positions that a row does not see become −∞. `first` is the tile's first position; `visible(row)` counts positions that
/// a row of the tile sees, and is asked here, for few tiles have a masked entry and the counts would take registers from all.
template <typename S, typename Visible>
__device__ __forceinline__ void mask_scores(
    const TilePlace<S>& place, int first, Visible visible, float (&scores)[S::M_TILES][S::SCORE_TILES][4]
) {
    const int column = first + place.key_warp * S::SCORE_TILES * 8 + 2 * (place.lane % 4);
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int seen = visible(place.row(m, half)) - column;
#pragma unroll
            for (int n = 0; n < S::SCORE_TILES; n++) {
                if (8 * n >= seen) scores[m][n][2 * half] = NEGATIVE_INFINITY;
                if (8 * n + 1 >= seen) scores[m][n][2 * half + 1] = NEGATIVE_INFINITY;
            }
        }
    }
}

/// Largest score of each row of this thread over the whole tile of keys, of all warps that share the rows.
template <typename S>
__device__ __forceinline__ void tile_maxima(
    const TilePlace<S>& place, const float (&scores)[S::M_TILES][S::SCORE_TILES][4], float (&maxima)[S::M_TILES][2]
) {
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float max = NEGATIVE_INFINITY;
#pragma unroll
            for (int n = 0; n < S::SCORE_TILES; n++) {
                max = fmaxf(max, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            }
            max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, 1));
            max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, 2));
            maxima[m][half] = max;
            if constexpr (S::KEY_WARPS > 1) {
                if (place.lane % 4 == 0) place.maxima[place.key_warp * S::ROWS + place.row(m, half)] = max;
            }
        }
    }
    if constexpr (S::KEY_WARPS > 1) {
        __syncthreads();
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int warp = 0; warp < S::KEY_WARPS; warp++) {
                    maxima[m][half] = fmaxf(maxima[m][half], place.maxima[warp * S::ROWS + place.row(m, half)]);
                }
            }
        }
    }
}

/// Moves on to the maxima that include this tile's: what was summed before shrinks, scores become probabilities.
template <typename S>
__device__ __forceinline__ void tile_softmax(
    const TilePlace<S>& place, float scale, TileState<S>& state, float (&scores)[S::M_TILES][S::SCORE_TILES][4]
) {
    float maxima[S::M_TILES][2];
    tile_maxima<S>(place, scores, maxima);
    float factors[S::M_TILES][2];
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float max = fmaxf(state.maxima[m][half], mul_rn(maxima[m][half], scale));
            const float shift = softmax_shift(max);
            factors[m][half] = exp2_fast(sub_rn(state.maxima[m][half], shift));
            state.maxima[m][half] = max;
#pragma unroll
            for (int n = 0; n < S::SCORE_TILES; n++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    scores[m][n][i] = exp2_fast(fma_rn(scores[m][n][i], scale, -shift));
                }
            }
        }
    }
    // Most factors are 1 after a few tiles; to ask for that first takes registers that the large tiles do not have.
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            state.weights[m][i] = mul_rn(state.weights[m][i], factors[m][i / 2]);
#pragma unroll
            for (int n = 0; n < S::VALUE_TILES; n++) state.sums[m][n][i] = mul_rn(state.sums[m][n][i], factors[m][i / 2]);
        }
    }
}

/// One step of 16 positions of the second product, and of the sum of the probabilities.
template <typename S>
__device__ __forceinline__ void add_step(
    const TilePlace<S>& place, const uint32_t (&a)[S::M_TILES][4], const bf16* values, TileState<S>& state
) {
    const uint32_t ones[2] = {ONES, ONES};
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) mma_m16n8k16_bf16(state.weights[m], a[m], ones, state.weights[m]);
    const bf16* corner = values + place.key_warp * S::VALUE_TILES * 8;
#pragma unroll
    for (int n = 0; n < S::VALUE_TILES; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, rows_first(corner + 8 * n, S::STRIDE, place.lane));
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++) {
            mma_m16n8k16_bf16(state.sums[m][n], a[m], b, state.sums[m][n]);
            mma_m16n8k16_bf16(state.sums[m][n + 1], a[m], b + 2, state.sums[m][n + 1]);
        }
    }
}

/// Adds probabilities · values of a tile.
template <typename S>
__device__ __forceinline__ void add_values(
    const TilePlace<S>& place, const float (&scores)[S::M_TILES][S::SCORE_TILES][4], const bf16* values, TileState<S>& state
) {
    if constexpr (S::KEY_WARPS > 1) {
        uint32_t* words = reinterpret_cast<uint32_t*>(place.probabilities);
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = place.row(0, half) * S::PROBABILITY_STRIDE + place.key_warp * 16 + 8 * n + 2 * (place.lane % 4);
                words[at / 2] = pack_bf16x2(scores[0][n][2 * half], scores[0][n][2 * half + 1]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < TILE_KEYS / 16; k++) {
        uint32_t a[S::M_TILES][4];
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++) {
            if constexpr (S::KEY_WARPS > 1) {
                ldmatrix_x4(a[m], rows_first(place.probabilities + 16 * k, S::PROBABILITY_STRIDE, place.lane));
            } else {
                // The layout of two 8-wide tiles of scores is that of a 16-wide left operand.
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* pair = &scores[m][2 * k + i / 2][2 * (i % 2)];
                    a[m][i] = pack_bf16x2(pair[0], pair[1]);
                }
            }
        }
        add_step<S>(place, a, values + 16 * k * S::STRIDE, state);
    }
}

/// One tile of keys and values that lies in shared memory. `masked` says whether some row does not see all of it.
template <typename S, typename Visible>
__device__ __forceinline__ void attend_tile(
    const TilePlace<S>& place, const TileQueries<S>& queries, int stage, int first, bool masked, Visible visible, float scale,
    TileState<S>& state
) {
    float scores[S::M_TILES][S::SCORE_TILES][4];
    tile_scores<S>(place, queries, place.keys(stage), scores);
    if (masked) mask_scores<S>(place, first, visible, scores);
    tile_softmax<S>(place, scale, state, scores);
    add_values<S>(place, scores, place.values(stage), state);
}

/// Starts the copies of a tile of query rows: row r from `address(r)`, zeroes where `has(r)` is false.
template <typename S, typename Address>
__device__ __forceinline__ void load_queries(const TilePlace<S>& place, int rows, const bf16* any, Address address) {
    for (int piece = static_cast<int>(threadIdx.x); piece < S::ROWS * S::PIECES; piece += S::THREADS) {
        const int row = piece / S::PIECES, at = piece % S::PIECES * 8;
        const bool has = row < rows;
        cp_async_16(place.queries + row * S::STRIDE + at, has ? address(row) + at : any, has);
    }
}
