// Attention for what the tensor core kernels do not take: f32, any head of at most 256, any block size. Made to be right, and fast enough
// for runs that compare with the reference.
//
// A block takes 16 query rows, each of its four warps four of them. Keys come in tiles of 32 at absolute multiples of 32, through
// shared memory, f32: lane j has the score of key j (one chain over the dimensions, ascending); maximum and sum cross the warp
// in fixed order; then lane l adds dimensions l, l + 32, … of the values, keys ascending. What a row does not see is not
// added, so that its bits depend on the row, its keys and its values alone.

#include "attention_plan.cuh"

constexpr int GENERIC_ROWS = 16;
constexpr int WARP_ROWS = 4;
constexpr int WARPS = GENERIC_ROWS / WARP_ROWS;
constexpr int GENERIC_KEYS = 32;
constexpr int MAX_DIM = 256;
constexpr int LANE_DIMS = MAX_DIM / 32;
/// Score of what is not seen.
constexpr float UNSEEN = -__builtin_huge_valf();

/// One row's running result; this lane's dimensions of the sums.
struct RowState {
    float sums[LANE_DIMS];
    float max, sum;
};

/// Scores of this lane's key for the warp's rows become probabilities; returns what the sums so far shrink by.
__device__ __forceinline__ float softmax_step(float score, bool seen, RowState& state, float& probability) {
    float max = seen ? score : UNSEEN;
    for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, step));
    max = fmaxf(max, state.max);
    const float shift = max == UNSEEN ? 0.0f : max;
    probability = seen ? exp2f(sub_rn(score, shift)) : 0.0f;
    float sum = probability;
    for (int step = 16; step > 0; step /= 2) sum = add_rn(sum, __shfl_xor_sync(FULL_WARP, sum, step));
    const float shrink = exp2f(sub_rn(state.max, shift));
    state.max = max;
    state.sum = fma_rn(state.sum, shrink, sum);
    return shrink;
}

/// Rows of one block. `Source` says where rows, keys and values lie:
/// `query(row)`, `key(position)`, `value(position)`, `out(row)` are addresses, `visible(row)` counts positions seen.
template <typename T, typename Source>
__device__ void attend_rows(const Source& source, int num_rows, int dim, float scale, float* shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32, first_row = static_cast<int>(threadIdx.x) / 32 * WARP_ROWS;
    float* queries = shared;
    float* tile = shared + GENERIC_ROWS * dim;
    const int stride = dim + 1;
    num_rows = min(num_rows, GENERIC_ROWS);
    for (int at = static_cast<int>(threadIdx.x); at < GENERIC_ROWS * dim; at += 32 * WARPS) {
        const int row = at / dim;
        queries[at] = row < num_rows ? to_float(source.query(row)[at % dim]) : 0.0f;
    }
    RowState states[WARP_ROWS];
    int visible[WARP_ROWS];
#pragma unroll
    for (int r = 0; r < WARP_ROWS; r++) {
        for (int i = 0; i < LANE_DIMS; i++) states[r].sums[i] = 0.0f;
        states[r].max = UNSEEN;
        states[r].sum = 0.0f;
        visible[r] = first_row + r < num_rows ? source.visible(first_row + r) : 0;
    }
    const int end = source.visible(num_rows - 1);
    for (int first = 0; first < end; first += GENERIC_KEYS) {
        const int count = min(GENERIC_KEYS, end - first);
        // All warps are done with the values before.
        __syncthreads();
        for (int at = static_cast<int>(threadIdx.x); at < GENERIC_KEYS * dim; at += 32 * WARPS) {
            const int key = at / dim;
            tile[key * stride + at % dim] = key < count ? to_float(source.key(first + key)[at % dim]) : 0.0f;
        }
        __syncthreads();
        float probabilities[WARP_ROWS] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int d = 0; d < dim; d++) {
            const float key = tile[lane * stride + d];
#pragma unroll
            for (int r = 0; r < WARP_ROWS; r++) probabilities[r] = fma_rn(queries[(first_row + r) * dim + d], key, probabilities[r]);
        }
#pragma unroll
        for (int r = 0; r < WARP_ROWS; r++) {
            const float score = mul_rn(probabilities[r], scale);
            const float shrink = softmax_step(score, first + lane < visible[r], states[r], probabilities[r]);
#pragma unroll
            for (int i = 0; i < LANE_DIMS; i++) states[r].sums[i] = mul_rn(states[r].sums[i], shrink);
        }
        __syncthreads();
        for (int at = static_cast<int>(threadIdx.x); at < GENERIC_KEYS * dim; at += 32 * WARPS) {
            const int key = at / dim;
            tile[key * stride + at % dim] = key < count ? to_float(source.value(first + key)[at % dim]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < WARP_ROWS; r++) {
            const int seen = min(GENERIC_KEYS, visible[r] - first);
            for (int key = 0; key < seen; key++) {
                const float probability = __shfl_sync(FULL_WARP, probabilities[r], key);
#pragma unroll
                for (int i = 0; i < LANE_DIMS; i++) {
                    const int d = lane + 32 * i;
                    if (d < dim) states[r].sums[i] = fma_rn(probability, tile[key * stride + d], states[r].sums[i]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < WARP_ROWS; r++) {
        if (first_row + r >= num_rows) continue;
        T* out = source.out(first_row + r);
#pragma unroll
        for (int i = 0; i < LANE_DIMS; i++) {
            const int d = lane + 32 * i;
            if (d < dim) out[d] = from_float<T>(add_rn(div_rn(states[r].sums[i], states[r].sum), 0.0f));
        }
    }
    // The next rows' queries go where the slowest warp may still be reading.
    __syncthreads();
}

/// Rows of one KV head of a sequence in the paged cache.
template <typename T>
struct PagedSource {
    const T* qkv;
    const T* k_cache;
    const T* v_cache;
    const uint32_t* block_table;
    T* result;
    PagedRows rows;
    int kv_heads, block_size, dim;

    __device__ __forceinline__ const T* query(int row) const { return qkv + rows.at(row, (rows.group + 2) * kv_heads * dim, dim); }
    __device__ __forceinline__ T* out(int row) const { return result + rows.at(row, rows.group * kv_heads * dim, dim); }
    __device__ __forceinline__ int visible(int row) const { return rows.visible_to(row); }
    __device__ __forceinline__ int64_t at(int position) const {
        const int64_t head = static_cast<int64_t>(block_table[position / block_size]) * kv_heads + rows.head;
        return (head * block_size + position % block_size) * dim;
    }
    __device__ __forceinline__ const T* key(int position) const { return k_cache + at(position); }
    __device__ __forceinline__ const T* value(int position) const { return v_cache + at(position); }
};

template <typename T>
__device__ __forceinline__ void attend_paged(
    const T* qkv, const T* k_cache, const T* v_cache, const uint32_t* block_tables, const PlanHeader* plan, T* out, int group, int kv_heads,
    int block_size, int dim, float scale
) {
    constexpr uint32_t PARTS = 128 / GENERIC_ROWS;
    DYNAMIC_SHARED(float, shared);
    const uint32_t heads = static_cast<uint32_t>(kv_heads);
    const uint32_t small = plan->small_count * heads, units = small + plan->large_count * PARTS * heads;
    for (uint32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const bool is_large = unit >= small;
        const uint32_t at = is_large ? (unit - small) / heads : unit / heads;
        PlanItem item = plan_items(plan)[is_large ? plan->large_first + at / PARTS : plan->small_first + at];
        if (is_large) item.first_row += at % PARTS * GENERIC_ROWS;
        const PagedRows rows = PagedRows::of(item, group, static_cast<int>(unit % heads));
        if (rows.num_rows <= 0) continue;
        const uint32_t* block_table = block_tables + static_cast<int64_t>(item.sequence) * plan->block_table_stride;
        const PagedSource<T> source{qkv, k_cache, v_cache, block_table, out, rows, kv_heads, block_size, dim};
        attend_rows<T>(source, rows.num_rows, dim, scale, shared);
    }
}

/// out `[T, hq·dim]` from qkv `[T, (hq + 2·hkv)·dim]` and one layer's cache `[blocks, hkv, block_size, dim]` twice, which holds this
/// step's keys already; all items of a plan without partial results. Grid [any], block 128, dynamic shared f32 `[16·dim + 32·(dim + 1)]`.
/// Twin: src/reference/attention.rs, `paged`.
KERNEL(attention_paged_generic_f32)(
    const float* qkv, const float* k_cache, const float* v_cache, const uint32_t* block_tables, const PlanHeader* plan, float* out,
    int32_t group, int32_t kv_heads, int32_t block_size, int32_t dim, float scale
) {
    attend_paged<float>(qkv, k_cache, v_cache, block_tables, plan, out, group, kv_heads, block_size, dim, scale);
}
REGISTER(attention_paged_generic_f32)

/// As `attention_paged_generic_f32`; probabilities stay f32.
KERNEL(attention_paged_generic_bf16)(
    const bf16* qkv, const bf16* k_cache, const bf16* v_cache, const uint32_t* block_tables, const PlanHeader* plan, bf16* out, int32_t group,
    int32_t kv_heads, int32_t block_size, int32_t dim, float scale
) {
    attend_paged<bf16>(qkv, k_cache, v_cache, block_tables, plan, out, group, kv_heads, block_size, dim, scale);
}
REGISTER(attention_paged_generic_bf16)

/// Rows of one head of a segment of qkv `[P, 3, heads, dim]`.
template <typename T>
struct SegmentSource {
    /// The head in the segment's first row, in qkv and in the result.
    const T* qkv;
    T* result;
    int first_row, len, hidden;

    __device__ __forceinline__ const T* row(int position, int which) const {
        return qkv + (static_cast<int64_t>(position) * 3 + which) * hidden;
    }
    __device__ __forceinline__ const T* query(int row_) const { return row(first_row + row_, 0); }
    __device__ __forceinline__ const T* key(int position) const { return row(position, 1); }
    __device__ __forceinline__ const T* value(int position) const { return row(position, 2); }
    __device__ __forceinline__ T* out(int row_) const { return result + static_cast<int64_t>(first_row + row_) * hidden; }
    __device__ __forceinline__ int visible(int) const { return len; }
};

template <typename T>
__device__ __forceinline__ void attend_segment_rows(const T* qkv, const uint4* items, T* out, int heads, int dim, float scale) {
    DYNAMIC_SHARED(float, shared);
    const uint4 item = items[blockIdx.x];
    const int len = static_cast<int>(item.y), first_row = static_cast<int>(item.z + blockIdx.z * GENERIC_ROWS);
    if (first_row >= len) return;
    const int hidden = heads * dim;
    const int64_t start = static_cast<int64_t>(item.x) * hidden, head = static_cast<int64_t>(blockIdx.y) * dim;
    const SegmentSource<T> source{qkv + 3 * start + head, out + start + head, first_row, len, hidden};
    attend_rows<T>(source, len - first_row, dim, scale, shared);
}

/// out `[P, heads·dim]` from qkv `[P, 3, heads, dim]`; every row sees its whole segment. Items are those of attention_varlen.cu. Grid
/// [items, heads, sixteens of rows of an item], block 128, dynamic shared as `attention_paged_generic_f32`. Twin:
/// src/reference/attention.rs, `varlen`.
KERNEL(attention_varlen_generic_f32)(const float* qkv, const uint4* items, float* out, int32_t heads, int32_t dim, float scale) {
    attend_segment_rows<float>(qkv, items, out, heads, dim, scale);
}
REGISTER(attention_varlen_generic_f32)

/// As `attention_varlen_generic_f32`; probabilities stay f32.
KERNEL(attention_varlen_generic_bf16)(const bf16* qkv, const uint4* items, bf16* out, int32_t heads, int32_t dim, float scale) {
    attend_segment_rows<bf16>(qkv, items, out, heads, dim, scale);
}
REGISTER(attention_varlen_generic_bf16)
