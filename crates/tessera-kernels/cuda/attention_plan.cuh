// The work list of a step's attention, made by the host (src/cuda/attention.rs writes exactly this) and read by the kernels, so that
// a captured launch does whatever the step at hand needs.

#pragma once

#include "platform.cuh"

/// Before the items, 16 words.
struct PlanHeader {
    /// Of each section: items, and index of the first among all items.
    uint32_t small_count, small_first;
    uint32_t large_count, large_first;
    uint32_t merge_count, merge_first;
    /// Entries from one sequence's block table to the next.
    uint32_t block_table_stride;
    uint32_t unused[9];
};

/// Query rows of one sequence, and which of the positions that they see. Row r of a sequence is (token r / group, query head
/// r mod group of the KV head). Every item is done once per KV head.
struct PlanItem {
    uint32_t sequence;
    /// The sequence's first token in the batch, its number of tokens there, positions in the cache.
    uint32_t first_token, num_tokens, kv_len;
    uint32_t first_row;
    /// Chunks of positions. A whole item has all that its last row sees something of.
    uint32_t first_chunk, end_chunk;
    /// First place of 16 rows for the partial result of a single chunk, or `WHOLE`.
    uint32_t slot;
};

/// 16 query rows whose partial results are to be joined: chunk c lies at `slot + c · slot_step`.
struct MergeItem {
    uint32_t first_token, first_row;
    uint32_t num_rows, num_chunks;
    uint32_t slot, slot_step;
    uint32_t unused[2];
};

constexpr uint32_t WHOLE = 0xffffffffu;

__device__ __forceinline__ const PlanItem* plan_items(const PlanHeader* plan) {
    return reinterpret_cast<const PlanItem*>(plan + 1);
}

__device__ __forceinline__ const MergeItem* plan_merges(const PlanHeader* plan) {
    return reinterpret_cast<const MergeItem*>(plan + 1) + plan->merge_first;
}

/// The rows of a paged item for one KV head.
struct PagedRows {
    int group, head, first_token, first_row;
    /// Rows from `first_row` to the end of the sequence.
    int num_rows;
    /// Positions that the sequence's first token sees; each later one sees one more.
    int visible;

    __device__ __forceinline__ static PagedRows of(const PlanItem& item, int group, int head) {
        const int first_row = static_cast<int>(item.first_row), num_tokens = static_cast<int>(item.num_tokens);
        const int visible = static_cast<int>(item.kv_len) - num_tokens + 1;
        return PagedRows{group, head, static_cast<int>(item.first_token), first_row, num_tokens * group - first_row, visible};
    }

    /// Positions seen by row `row` of the item.
    __device__ __forceinline__ int visible_to(int row) const { return visible + (first_row + row) / group; }

    /// Where row `row` of the item begins in a matrix of `cols` columns whose first are the query heads'.
    __device__ __forceinline__ int64_t at(int row, int cols, int dim) const {
        const int token = (first_row + row) / group, query_head = head * group + (first_row + row) % group;
        return static_cast<int64_t>(first_token + token) * cols + query_head * dim;
    }
};
