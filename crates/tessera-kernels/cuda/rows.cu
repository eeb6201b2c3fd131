// Rows picked by index: embedding of the step's tokens, logit and score rows, the inverse window order.

#include "pack.cuh"

/// x [T, H] f32 = what the decoder starts from. Grid [T], block any.
///
/// A token is a row of table [table_rows, H], which holds the ids from first_token on; ids outside of it give 0. A token with
/// visual_row ≥ 0 is that row of visual [.., H] f32 on the leader and 0 elsewhere. token_source [T] is an id, or −1 − slot for
/// last_sampled[slot]. Twin: `HostState::embed_merge`.
template <typename T, int N>
__device__ __forceinline__ void embed_merge(const T* table, int32_t first_token, int32_t table_rows, const int32_t* token_source,
                                            const int32_t* visual_row, const uint32_t* last_sampled, const float* visual,
                                            int32_t is_leader, float* x, int32_t hidden) {
    const int32_t source = token_source[blockIdx.x];
    const int32_t visual_at = visual_row[blockIdx.x];
    const int32_t token = source >= 0 ? source : static_cast<int32_t>(last_sampled[-1 - source]);
    const int32_t at = token - first_token;
    const bool is_held = visual_at < 0 && at >= 0 && at < table_rows;
    const bool is_visual = visual_at >= 0 && is_leader != 0;
    for (int32_t col = threadIdx.x * N; col < hidden; col += blockDim.x * N) {
        float values[N] = {};
        if (is_held) load_run<N>(table + static_cast<int64_t>(at) * hidden + col, values);
        if (is_visual) load_run<N>(visual + static_cast<int64_t>(visual_at) * hidden + col, values);
        store_run<N>(x + static_cast<int64_t>(blockIdx.x) * hidden + col, values);
    }
}

#define EMBED_MERGE(suffix, type, run)                                                                                        \
    KERNEL(embed_merge##suffix)(const type* table, int32_t first_token, int32_t table_rows, const int32_t* token_source,      \
                                const int32_t* visual_row, const uint32_t* last_sampled, const float* visual,                 \
                                int32_t is_leader, float* x, int32_t hidden) {                                                \
        embed_merge<type, run>(table, first_token, table_rows, token_source, visual_row, last_sampled, visual, is_leader, x,  \
                               hidden);                                                                                       \
    }                                                                                                                         \
    REGISTER(embed_merge##suffix)

EMBED_MERGE(_f32, float, 1)
EMBED_MERGE(_bf16, bf16, 1)
EMBED_MERGE(_wide_f32, float, 4)
EMBED_MERGE(_wide_bf16, bf16, 8)

/// Row r of y = row rows[r] of x; rows of `units` elements of the copied type. Grid [rows], block any.
/// Twin: `HostState::gather_rows`.
template <typename T>
__device__ __forceinline__ void gather_rows(const T* x, const int32_t* rows, T* y, int32_t units) {
    const T* from = x + static_cast<int64_t>(rows[blockIdx.x]) * units;
    T* to = y + static_cast<int64_t>(blockIdx.x) * units;
    for (int32_t at = threadIdx.x; at < units; at += blockDim.x) to[at] = from[at];
}

KERNEL(gather_rows_2)(const uint16_t* x, const int32_t* rows, uint16_t* y, int32_t units) { gather_rows(x, rows, y, units); }
KERNEL(gather_rows_4)(const uint32_t* x, const int32_t* rows, uint32_t* y, int32_t units) { gather_rows(x, rows, y, units); }
KERNEL(gather_rows_16)(const uint4* x, const int32_t* rows, uint4* y, int32_t units) { gather_rows(x, rows, y, units); }
REGISTER(gather_rows_2)
REGISTER(gather_rows_4)
REGISTER(gather_rows_16)
