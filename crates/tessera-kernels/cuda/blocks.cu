// Whole KV blocks of all layers at once. A cache is `planes` planes (keys and values of each layer), plane_bytes apart, each of
// blocks of block_bytes, a multiple of 16.
//
// Grid [ceil(block_bytes / 4096), planes], block 256: a thread owns one place of 16 bytes in every block, so that copies which
// follow one another happen in order. The number of blocks is read on the device: a graph may be replayed with another.

#include "platform.cuh"

__device__ __forceinline__ char* plane_place(char* kv, int64_t plane_bytes, int32_t place) {
    return kv + blockIdx.y * plane_bytes + static_cast<int64_t>(place) * 16;
}

/// Zeroes blocks[0..*count].
KERNEL(zero_blocks)(char* kv, int64_t plane_bytes, int32_t block_bytes, const int32_t* blocks, const int32_t* count) {
    const int32_t place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= block_bytes / 16) return;
    char* base = plane_place(kv, plane_bytes, place);
    const int32_t num_blocks = *count;
    for (int32_t i = 0; i < num_blocks; i++) {
        *reinterpret_cast<uint4*>(base + static_cast<int64_t>(blocks[i]) * block_bytes) = make_uint4(0, 0, 0, 0);
    }
}
REGISTER(zero_blocks)

/// Copies block copies[2i] to block copies[2i + 1], for i in 0..*count in order.
KERNEL(copy_blocks)(char* kv, int64_t plane_bytes, int32_t block_bytes, const int32_t* copies, const int32_t* count) {
    const int32_t place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= block_bytes / 16) return;
    char* base = plane_place(kv, plane_bytes, place);
    const int32_t num_copies = *count;
    for (int32_t i = 0; i < num_copies; i++) {
        const int64_t from = copies[2 * i], to = copies[2 * i + 1];
        *reinterpret_cast<uint4*>(base + to * block_bytes) = *reinterpret_cast<const uint4*>(base + from * block_bytes);
    }
}
REGISTER(copy_blocks)
