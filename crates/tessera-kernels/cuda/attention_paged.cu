// Causal attention over the paged cache for bf16 heads of 128, prefill and decode alike.
//
// One body in two shapes of the same bits (attention_mma.cuh says why):
//   `attention_paged_small_bf16`  16 rows (a decoded token's group of query heads), four warps share them. 109 KiB of shared memory:
//                                 two blocks per SM of a H200 (227 KiB), 128 KiB of keys and values under way, more than the ~30 KiB per
//                                 SM that 4.8 TB/s need at 1 µs. A step of few tokens is cut into chunks of 1,024 positions.
//   `attention_paged_large_bf16`  128 rows (tokens × heads of the group), four warps with 32 rows each, so that a fragment of keys or
//                                 values loaded from shared memory feeds four products. 102 KiB: two blocks per SM, 8 warps,
//                                 all 255 registers (no spills on sm_90a; a few on sm_80).
// Both have as many blocks as are resident at once; each takes every gridDim.x-th pair (item, KV head) of its section of the plan.
// An item that is one chunk of several writes a partial result, which `attention_merge_bf16` joins with the others; a whole item
// joins its chunks itself, by the same arithmetic, and keeps the total in its block's own piece of global memory meanwhile (64 KiB of
// L2 traffic per 1,024 positions, a few percent of what the keys cost).

#include "attention_mma.cuh"
#include "attention_plan.cuh"

constexpr int PAGED_DIM = 128;
using SmallTile = TileShape<PAGED_DIM, 1, 1, 4, 3>;
using LargeTile = TileShape<PAGED_DIM, 2, 4, 1, 2>;

/// Arguments of one launch.
struct PagedArgs {
    const bf16* qkv;
    const bf16* k_cache;
    const bf16* v_cache;
    const uint32_t* block_tables;
    const PlanHeader* plan;
    /// `[slots · kv_heads][16][128]` and `[slots · kv_heads][16][max, sum]`
    float* partials;
    float2* states;
    /// `[blocks][CARRIED / 4][threads]` of float4
    float4* totals;
    bf16* out;
    int group, kv_heads, block_size;
    /// log2 e / √128
    float scale;
};

/// One item for one KV head: its rows, and the keys and values of one head of one sequence. It lies in shared memory, for the
/// registers of large tiles are full.
struct PagedItem {
    const bf16* k_head;
    const bf16* v_head;
    const uint32_t* block_table;
    int block_elements, block_size;
    /// Positions that the item's last row sees, as far as they are in the item's chunks.
    int end;
    uint32_t slot;
    PagedRows rows;

    __device__ __forceinline__ static PagedItem of(const PagedArgs& args, const PlanItem& item, int head, int tile_rows) {
        const PagedRows rows = PagedRows::of(item, args.group, head);
        const int seen = rows.visible_to(min(rows.num_rows, tile_rows) - 1);
        const int64_t at = static_cast<int64_t>(head) * args.block_size * PAGED_DIM;
        const uint32_t* block_table = args.block_tables + static_cast<int64_t>(item.sequence) * args.plan->block_table_stride;
        const int block_elements = args.kv_heads * args.block_size * PAGED_DIM;
        const int end = min(seen, static_cast<int>(item.end_chunk) * CHUNK_KEYS);
        return PagedItem{args.k_cache + at, args.v_cache + at, block_table, block_elements, args.block_size, end, item.slot, rows};
    }

    __device__ __forceinline__ uint32_t block_of(int position) const { return position < end ? block_table[position / block_size] : 0; }

    /// Asks for the blocks of the four sixteens of positions of a tile.
    __device__ __forceinline__ void fetch(int tile, uint32_t (&blocks)[TILE_KEYS / 16]) const {
#pragma unroll
        for (int i = 0; i < TILE_KEYS / 16; i++) blocks[i] = block_of(tile * TILE_KEYS + 16 * i);
    }

    /// Starts the copies of a tile whose blocks were asked for.
    template <typename S>
    __device__ __forceinline__ void load_fetched(
        const TilePlace<S>& place, int tile, int stage, const uint32_t (&blocks)[TILE_KEYS / 16]
    ) const {
#pragma unroll
        for (int i = 0; i < TILE_KEYS / 16; i++) load_sixteen<S>(place, tile, stage, i, blocks[i]);
    }

    /// Starts the copies of a tile.
    template <typename S>
    __device__ __forceinline__ void load(const TilePlace<S>& place, int tile, int stage) const {
#pragma unroll 1
        for (int i = 0; i < TILE_KEYS / 16; i++) load_sixteen<S>(place, tile, stage, i, block_of(tile * TILE_KEYS + 16 * i));
    }

    /// Starts the copies of sixteen positions, which lie in one block; those from the end on become zeroes, for 0 · NaN is no 0.
    template <typename S>
    __device__ __forceinline__ void load_sixteen(const TilePlace<S>& place, int tile, int stage, int index, uint32_t block) const {
        constexpr int KEYS_AT_ONCE = S::THREADS / S::PIECES;
        static_assert(16 % KEYS_AT_ONCE == 0, "a thread's keys cover each sixteen alike");
        const int thread = static_cast<int>(threadIdx.x), piece = thread % S::PIECES * 8;
        const int first = tile * TILE_KEYS + 16 * index;
        bf16* keys = place.keys(stage) + 16 * index * S::STRIDE + piece;
        bf16* values = place.values(stage) + 16 * index * S::STRIDE + piece;
        const int64_t corner = static_cast<int64_t>(block) * block_elements + first % block_size * PAGED_DIM;
#pragma unroll
        for (int j = 0; j < 16; j += KEYS_AT_ONCE) {
            const int key = j + thread / S::PIECES;
            const bool valid = first + key < end;
            const int64_t from = valid ? corner + key * PAGED_DIM + piece : 0;
            cp_async_16(keys + key * S::STRIDE, k_head + from, valid);
            cp_async_16(values + key * S::STRIDE, v_head + from, valid);
        }
    }
};

/// Writes a chunk's result to its slots.
template <typename S>
__device__ __forceinline__ void write_partial(
    const TilePlace<S>& place, const PagedArgs& args, const PagedItem& item, const TileState<S>& state
) {
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
        const int64_t slot = static_cast<int64_t>(item.slot + place.first_row / 16 + m) * args.kv_heads + item.rows.head;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t row = slot * 16 + 8 * half + place.lane / 4;
            float* sums = args.partials + row * PAGED_DIM;
#pragma unroll
            for (int n = 0; n < S::VALUE_TILES; n++) {
                const float2 pair = make_float2(state.sums[m][n][2 * half], state.sums[m][n][2 * half + 1]);
                *reinterpret_cast<float2*>(sums + place.dim(n)) = pair;
            }
            if (place.lane % 4 == 0 && place.key_warp == 0) {
                args.states[row] = make_float2(state.maxima[m][half], state.weights[m][2 * half]);
            }
        }
    }
}

/// Writes the rows of a finished item.
template <typename S>
__device__ __forceinline__ void write_rows(const TilePlace<S>& place, const PagedArgs& args, const PagedRows& rows, const TileState<S>& state) {
    const int cols = args.kv_heads * args.group * PAGED_DIM;
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = place.row(m, half);
            if (row >= rows.num_rows) continue;
            bf16* out = args.out + rows.at(row, cols, PAGED_DIM);
            const float inverse = div_rn(1.0f, state.weights[m][2 * half]);
#pragma unroll
            for (int n = 0; n < S::VALUE_TILES; n++) {
                const float* pair = &state.sums[m][n][2 * half];
                const uint32_t word = pack_bf16x2(attention_result(pair[0], inverse), attention_result(pair[1], inverse));
                *reinterpret_cast<uint32_t*>(out + place.dim(n)) = word;
            }
        }
    }
}

/// Puts what this thread has so far aside.
template <typename S>
__device__ __forceinline__ void store_total(float4* total, const TileState<S>& state) {
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < S::VALUE_TILES; n++) {
            const float* sums = state.sums[m][n];
            *total = make_float4(sums[0], sums[1], sums[2], sums[3]);
            total += S::THREADS;
        }
        *total = make_float4(state.maxima[m][0], state.maxima[m][1], state.weights[m][0], state.weights[m][2]);
        total += S::THREADS;
    }
}

/// Joins a chunk with the total of all before it; the result is in `state`.
template <typename S>
__device__ __forceinline__ void merge_total(const float4* total, TileState<S>& state) {
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
        const float4* sums = total + m * (S::VALUE_TILES + 1) * S::THREADS;
        const float4 old = sums[S::VALUE_TILES * S::THREADS];
        const MergeFactors upper(old.x, state.maxima[m][0]), lower(old.y, state.maxima[m][1]);
#pragma unroll
        for (int n = 0; n < S::VALUE_TILES; n++) {
            const float4 from = sums[n * S::THREADS];
            float* to = state.sums[m][n];
            to[0] = upper.merge(from.x, to[0]);
            to[1] = upper.merge(from.y, to[1]);
            to[2] = lower.merge(from.z, to[2]);
            to[3] = lower.merge(from.w, to[3]);
        }
        state.weights[m][0] = upper.merge(old.z, state.weights[m][0]);
        state.weights[m][2] = lower.merge(old.w, state.weights[m][2]);
        state.maxima[m][0] = upper.max;
        state.maxima[m][1] = lower.max;
    }
}

/// The item in shared memory, by all threads of the block.
template <typename S>
__device__ __forceinline__ void attend_item(const TilePlace<S>& place, const PagedArgs& args, const PagedItem& item, int first_tile) {
    // Where memory is what takes time, block ids are asked for a tile early.
    constexpr bool FETCHES_AHEAD = S::M_TILES == 1;
    const int end_tile = (item.end + TILE_KEYS - 1) / TILE_KEYS;
    const int qkv_cols = (args.group + 2) * args.kv_heads * PAGED_DIM;
    load_queries<S>(place, item.rows.num_rows, args.qkv, [&](int row) { return args.qkv + item.rows.at(row, qkv_cols, PAGED_DIM); });
#pragma unroll
    for (int stage = 0; stage < S::STAGES - 1; stage++) {
        if (first_tile + stage < end_tile) item.template load<S>(place, first_tile + stage, stage);
        cp_async_commit();
    }
    uint32_t blocks[TILE_KEYS / 16];
    if constexpr (FETCHES_AHEAD) item.fetch(first_tile + S::STAGES - 1, blocks);

    const auto visible = [&](int row) { return item.rows.visible_to(row); };
    // The least that a row sees. Rows that pad the tile compute with zeroes what nobody reads.
    const int all_see = item.rows.visible_to(0);
    TileQueries<S> queries;
    TileState<S> state;
    state.clear();
    int stage = 0;
    for (int tile = first_tile; tile < end_tile;) {
        const int chunk_end = min(end_tile, (tile / CHUNK_TILES + 1) * CHUNK_TILES);
        for (; tile < chunk_end; tile++) {
            cp_async_wait<S::STAGES - 2>();
            // All copies of this tile are there, and all warps are done with the tile before.
            __syncthreads();
            if (tile == first_tile) take_queries<S>(place, queries);
            const int ahead = tile + S::STAGES - 1;
            if (ahead < end_tile) {
                const int free_stage = stage == 0 ? S::STAGES - 1 : stage - 1;
                if constexpr (FETCHES_AHEAD) {
                    item.template load_fetched<S>(place, ahead, free_stage, blocks);
                } else {
                    item.template load<S>(place, ahead, free_stage);
                }
            }
            cp_async_commit();
            if constexpr (FETCHES_AHEAD) item.fetch(ahead + 1, blocks);
            attend_tile<S>(place, queries, stage, tile * TILE_KEYS, (tile + 1) * TILE_KEYS > all_see, visible, args.scale, state);
            stage = stage + 1 == S::STAGES ? 0 : stage + 1;
        }
        if (item.slot != WHOLE) {
            write_partial<S>(place, args, item, state);
            break;
        }
        float4* total = args.totals + static_cast<int64_t>(blockIdx.x) * (S::CARRIED / 4) * S::THREADS + threadIdx.x;
        if (tile > first_tile + CHUNK_TILES) merge_total<S>(total, state);
        if (tile == end_tile) {
            write_rows<S>(place, args, item.rows, state);
        } else {
            store_total<S>(total, state);
            state.clear();
        }
    }
    cp_async_wait<0>();
}

template <typename S>
__device__ __forceinline__ void attend_section(const PagedArgs& args, uint32_t first, uint32_t count) {
    DYNAMIC_SHARED(bf16, shared);
    SHARED(PagedItem, shared_item, 1);
    const TilePlace<S> place(shared);
    const uint32_t kv_heads = static_cast<uint32_t>(args.kv_heads);
    for (uint32_t unit = blockIdx.x; unit < count * kv_heads; unit += gridDim.x) {
        const PlanItem* item = plan_items(args.plan) + first + unit / kv_heads;
        // The slowest warp may still be reading what the next copies, and the next item, overwrite.
        __syncthreads();
        if (threadIdx.x == 0) shared_item[0] = PagedItem::of(args, *item, static_cast<int>(unit % kv_heads), S::ROWS);
        __syncthreads();
        attend_item<S>(place, args, shared_item[0], static_cast<int>(item->first_chunk) * CHUNK_TILES);
    }
}

/// out `[T, hq·128]` from qkv `[T, (hq + 2·hkv)·128]` and one layer's cache `[blocks, hkv, block_size, 128]` twice, which holds this
/// step's keys already; the items of the plan's small section. Grid [any], block 128, dynamic shared `SmallTile::SHARED_BYTES`.
/// Twin: src/reference/attention.rs, `paged`.
KERNEL_BOUNDS(attention_paged_small_bf16, 128, 2)(
    const bf16* qkv, const bf16* k_cache, const bf16* v_cache, const uint32_t* block_tables, const PlanHeader* plan, float* partials,
    float2* states, float4* totals, bf16* out, int32_t group, int32_t kv_heads, int32_t block_size, float scale
) {
    const PagedArgs args{qkv, k_cache, v_cache, block_tables, plan, partials, states, totals, out, group, kv_heads, block_size, scale};
    attend_section<SmallTile>(args, plan->small_first, plan->small_count);
}
REGISTER(attention_paged_small_bf16)

/// As `attention_paged_small_bf16`, for the large section. Block 128, dynamic shared `LargeTile::SHARED_BYTES`.
KERNEL_BOUNDS(attention_paged_large_bf16, 128, 2)(
    const bf16* qkv, const bf16* k_cache, const bf16* v_cache, const uint32_t* block_tables, const PlanHeader* plan, float* partials,
    float2* states, float4* totals, bf16* out, int32_t group, int32_t kv_heads, int32_t block_size, float scale
) {
    const PagedArgs args{qkv, k_cache, v_cache, block_tables, plan, partials, states, totals, out, group, kv_heads, block_size, scale};
    attend_section<LargeTile>(args, plan->large_first, plan->large_count);
}
REGISTER(attention_paged_large_bf16)

/// Joins the partial results of the plan's merge items, chunks ascending, and writes their rows of out `[T, hq·128]`. Grid [any], block
/// 256: a warp takes one row at a time, a lane four dimensions, so that a chunk is one 512-byte read per row.
KERNEL_BOUNDS(attention_merge_bf16, 256, 4)(
    const PlanHeader* plan, const float* partials, const float2* states, bf16* out, int32_t group, int32_t kv_heads
) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int cols = group * kv_heads * PAGED_DIM;
    const uint32_t units = plan->merge_count * static_cast<uint32_t>(kv_heads);
    for (uint32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const MergeItem item = plan_merges(plan)[unit / kv_heads];
        const int head = static_cast<int>(unit % kv_heads);
        for (int row = warp; row < static_cast<int>(item.num_rows); row += 8) {
            float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float max = NEGATIVE_INFINITY, weight = 0.0f;
#pragma unroll 4
            for (uint32_t chunk = 0; chunk < item.num_chunks; chunk++) {
                const int64_t slot = static_cast<int64_t>(item.slot + chunk * item.slot_step) * kv_heads + head;
                const float2 state = states[slot * 16 + row];
                const float4 from = reinterpret_cast<const float4*>(partials + (slot * 16 + row) * PAGED_DIM)[lane];
                const MergeFactors factors(max, state.x);
                sums.x = factors.merge(sums.x, from.x);
                sums.y = factors.merge(sums.y, from.y);
                sums.z = factors.merge(sums.z, from.z);
                sums.w = factors.merge(sums.w, from.w);
                weight = factors.merge(weight, state.y);
                max = factors.max;
            }
            const int global_row = static_cast<int>(item.first_row) + row;
            const int64_t token = item.first_token + global_row / group;
            const float inverse = div_rn(1.0f, weight);
            const uint32_t low = pack_bf16x2(attention_result(sums.x, inverse), attention_result(sums.y, inverse));
            const uint32_t high = pack_bf16x2(attention_result(sums.z, inverse), attention_result(sums.w, inverse));
            bf16* to = out + token * cols + (head * group + global_row % group) * PAGED_DIM;
            reinterpret_cast<uint2*>(to)[lane] = make_uint2(low, high);
        }
    }
}
REGISTER(attention_merge_bf16)
