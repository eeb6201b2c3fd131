// Full attention inside segments for bf16 heads of 80: the vision tower's windows (64 patches at most) and whole frames (many
// thousands). Five k16 steps per head, no padding of the dimensions; rows of 176 bytes in shared memory.
//
// `attention_varlen_short_bf16`  one segment of at most 64 rows: one tile of queries, one of keys, no loop. 33 KiB of shared memory and
//                                96 registers, so that five blocks per SM of a H200 hide each other's loads; a window of one head
//                                takes 30 KiB of qkv and 1.3 MFLOP, so memory bounds it.
// `attention_varlen_long_bf16`   128 rows of a longer segment, 32 per warp, keys in two stages. 66 KiB and 240
//                                registers, two blocks per SM.
// One head per blockIdx.y. A segment's bits depend on its own rows alone; keys count from its start.

#include "attention_mma.cuh"

constexpr int VARLEN_DIM = 80;
using ShortTile = TileShape<VARLEN_DIM, 1, 4, 1, 1>;
using LongTile = TileShape<VARLEN_DIM, 2, 4, 1, 2>;

/// 64 or 128 rows of one segment.
struct VarlenItem {
    /// The segment's first patch and its patches.
    uint32_t start, len;
    /// Within the segment.
    uint32_t first_row;
    uint32_t unused;
};

/// Rows of one head of one segment of qkv `[P, 3, heads, 80]`.
struct VarlenRows {
    const bf16* queries;
    int stride, len, first_row;
    /// From a query to its key, and from that to its value.
    int hidden;

    __device__ __forceinline__ VarlenRows(const bf16* qkv, const VarlenItem& item, int heads, int head) {
        hidden = heads * VARLEN_DIM;
        stride = 3 * hidden;
        queries = qkv + static_cast<int64_t>(item.start) * stride + head * VARLEN_DIM;
        len = static_cast<int>(item.len);
        first_row = static_cast<int>(item.first_row);
    }

    /// Starts the copies of tile `tile` of keys and values; positions from the end on become zeroes.
    template <typename S>
    __device__ __forceinline__ void load(const TilePlace<S>& place, int tile, int stage) const {
        bf16* keys = place.keys(stage);
        bf16* values = place.values(stage);
#pragma unroll
        for (int piece = static_cast<int>(threadIdx.x); piece < TILE_KEYS * S::PIECES; piece += S::THREADS) {
            const int key = piece / S::PIECES, at = piece % S::PIECES * 8;
            const int position = tile * TILE_KEYS + key;
            const bool valid = position < len;
            const bf16* from = valid ? queries + static_cast<int64_t>(position) * stride + hidden + at : queries;
            cp_async_16(keys + key * S::STRIDE + at, from, valid);
            cp_async_16(values + key * S::STRIDE + at, valid ? from + hidden : queries, valid);
        }
    }
};

template <typename S>
__device__ __forceinline__ void write_rows(
    const TilePlace<S>& place, const VarlenRows& rows, const VarlenItem& item, int head, const TileState<S>& state, bf16* out
) {
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = rows.first_row + place.row(m, half);
            if (row >= rows.len) continue;
            bf16* to = out + static_cast<int64_t>(item.start + row) * rows.hidden + head * VARLEN_DIM;
            const float inverse = div_rn(1.0f, state.weights[m][2 * half]);
#pragma unroll
            for (int n = 0; n < S::VALUE_TILES; n++) {
                const float* pair = &state.sums[m][n][2 * half];
                const uint32_t word = pack_bf16x2(attention_result(pair[0], inverse), attention_result(pair[1], inverse));
                *reinterpret_cast<uint32_t*>(to + place.dim(n)) = word;
            }
        }
    }
}

template <typename S>
__device__ __forceinline__ void attend_segment(const bf16* qkv, const VarlenItem* items, bf16* out, int heads, float scale) {
    DYNAMIC_SHARED(bf16, shared);
    const TilePlace<S> place(shared);
    const VarlenItem item = items[blockIdx.x];
    const int head = static_cast<int>(blockIdx.y);
    const VarlenRows rows(qkv, item, heads, head);
    const bf16* first = rows.queries + static_cast<int64_t>(rows.first_row) * rows.stride;
    load_queries<S>(place, rows.len - rows.first_row, first, [&](int row) { return first + static_cast<int64_t>(row) * rows.stride; });

    const int num_tiles = S::STAGES == 1 ? 1 : (rows.len + TILE_KEYS - 1) / TILE_KEYS;
    rows.template load<S>(place, 0, 0);
    cp_async_commit();
    const auto visible = [&](int) { return rows.len; };
    TileQueries<S> queries;
    TileState<S> state;
    state.clear();
    for (int tile = 0; tile < num_tiles; tile++) {
        cp_async_wait<0>();
        // All copies of this tile are there, and all warps are done with the tile before.
        __syncthreads();
        if (tile == 0) take_queries<S>(place, queries);
        const int stage = tile % S::STAGES;
        if (tile + 1 < num_tiles) rows.template load<S>(place, tile + 1, S::STAGES - 1 - stage);
        cp_async_commit();
        attend_tile<S>(place, queries, stage, tile * TILE_KEYS, (tile + 1) * TILE_KEYS > rows.len, visible, scale, state);
    }
    write_rows<S>(place, rows, item, head, state, out);
}

/// out `[P, heads·80]` from qkv `[P, 3, heads, 80]`; every row sees its whole segment, which has at most 64. Grid [items, heads], block
/// 128, dynamic shared `ShortTile::SHARED_BYTES`. `head_dim` is 80. Twin: src/reference/attention.rs, `varlen`.
KERNEL_BOUNDS(attention_varlen_short_bf16, 128, 5)(
    const bf16* qkv, const VarlenItem* items, bf16* out, int32_t heads, int32_t head_dim, float scale
) {
    attend_segment<ShortTile>(qkv, items, out, heads, scale);
}
REGISTER(attention_varlen_short_bf16)

/// As `attention_varlen_short_bf16`, for 128 rows of segments of any length. Dynamic shared `LongTile::SHARED_BYTES`.
KERNEL_BOUNDS(attention_varlen_long_bf16, 128, 2)(
    const bf16* qkv, const VarlenItem* items, bf16* out, int32_t heads, int32_t head_dim, float scale
) {
    attend_segment<LongTile>(qkv, items, out, heads, scale);
}
REGISTER(attention_varlen_long_bf16)
