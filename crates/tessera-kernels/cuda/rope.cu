// Rotary embeddings: the pair (i, i + head_dim / 2) turns by one angle, position · frequency in f32; sine and cosine are rounded
// to f32 once, as the reference rounds them (`reference::rope`).

#include "pack.cuh"

/// Cosine and sine pairs a block holds: head_dim ≤ 256.
constexpr int MAX_PAIRS = 128;

/// Cosine and sine of an angle up to 2^24, rounded to f32 from f64. The angle is reduced to [−π/4, π/4] by a multiple of π/2 in two
/// parts; Taylor series up to r^15 leave less than 1e-15.
__device__ __forceinline__ void cos_sin(float angle, float& cosine, float& sine) {
    const double x = static_cast<double>(angle);
    const double turns = rint(x * 0.63661977236758134);
    const double r = fma_rn(-turns, 6.123233995736766e-17, fma_rn(-turns, 1.5707963267948966, x));
    const double square = r * r;
    double s = -7.647163731819816e-13;
    s = fma_rn(s, square, 1.605904383682161e-10);
    s = fma_rn(s, square, -2.505210838544172e-08);
    s = fma_rn(s, square, 2.755731922398589e-06);
    s = fma_rn(s, square, -1.984126984126984e-04);
    s = fma_rn(s, square, 8.333333333333333e-03);
    s = fma_rn(s, square, -1.666666666666667e-01);
    s = fma_rn(s * square, r, r);
    double c = 4.779477332387385e-14;
    c = fma_rn(c, square, -1.147074559772973e-11);
    c = fma_rn(c, square, 2.087675698786810e-09);
    c = fma_rn(c, square, -2.755731922398589e-07);
    c = fma_rn(c, square, 2.480158730158730e-05);
    c = fma_rn(c, square, -1.388888888888889e-03);
    c = fma_rn(c, square, 4.166666666666667e-02);
    c = fma_rn(c, square, -0.5);
    c = fma_rn(c, square, 1.0);
    const int32_t quadrant = static_cast<int32_t>(turns);
    const float first = static_cast<float>(quadrant & 1 ? s : c), second = static_cast<float>(quadrant & 1 ? c : s);
    cosine = (quadrant + 1) & 2 ? -first : first;
    sine = quadrant & 2 ? -second : second;
}

/// Turns pairs `at..at + N` of one head in place.
template <typename T, int N>
__device__ __forceinline__ void rotate(T* head, int32_t at, int32_t half, const float2* angles) {
    float a[N], b[N];
    load_run<N>(head + at, a);
    load_run<N>(head + half + at, b);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float2 angle = angles[at + i];
        const float first = a[i] * angle.x - b[i] * angle.y;
        b[i] = b[i] * angle.x + a[i] * angle.y;
        a[i] = first;
    }
    store_run<N>(head + at, a);
    store_run<N>(head + half + at, b);
}

/// Copies `N` neighbours as they are.
template <typename T, int N>
__device__ __forceinline__ void copy_run(const T* from, T* to) {
    if constexpr (N == 1) {
        *to = *from;
    } else {
        static_assert(N * sizeof(T) == 16, "runs are 16 bytes");
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    }
}

/// Rotates q and k of qkv [T, (heads + 2 · kv_heads) · head_dim] in place and writes k and v to their slot. Grid [T], block any.
///
/// positions [T, 3] of (t, h, w); frequencies [head_dim / 2] f32, of which the first `section_t` follow t, those up to `section_h`
/// follow h and the rest w; cosine and sine are multiplied by `attention_factor`. k_cache and v_cache: one layer's
/// [num_blocks, kv_heads, block_size, head_dim]. slot_mapping [T]: block · block_size + offset, −1 writes nothing.
/// Twin: `reference::rope` and `ReferenceKv::write`.
template <typename T, int N>
__device__ __forceinline__ void rope_kv_write(T* qkv, const int32_t* positions, const int64_t* slot_mapping, T* k_cache, T* v_cache,
                                              const float* frequencies, float attention_factor, int32_t section_t, int32_t section_h,
                                              int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t block_size) {
    SHARED(float2, angles, MAX_PAIRS);
    const int32_t half = head_dim / 2;
    for (int32_t pair = threadIdx.x; pair < half; pair += blockDim.x) {
        const int32_t axis = (pair >= section_t) + (pair >= section_h);
        const float position = static_cast<float>(positions[3 * blockIdx.x + axis]);
        float cosine, sine;
        cos_sin(position * frequencies[pair], cosine, sine);
        angles[pair] = make_float2(cosine * attention_factor, sine * attention_factor);
    }
    __syncthreads();
    T* row = qkv + static_cast<int64_t>(blockIdx.x) * (heads + 2 * kv_heads) * head_dim;
    const int64_t slot = slot_mapping[blockIdx.x];
    const int64_t block = slot / block_size, offset = slot % block_size;
    // Runs of pairs of q and k, then runs of v.
    const int32_t pair_runs = half / N, rotated = (heads + kv_heads) * pair_runs, value_runs = head_dim / N;
    for (int32_t run = threadIdx.x; run < rotated + kv_heads * value_runs; run += blockDim.x) {
        if (run < rotated) {
            const int32_t head = run / pair_runs, at = run % pair_runs * N;
            T* place = row + head * head_dim;
            rotate<T, N>(place, at, half, angles);
            if (head >= heads && slot >= 0) {
                T* key = k_cache + ((block * kv_heads + head - heads) * block_size + offset) * head_dim;
                copy_run<T, N>(place + at, key + at);
                copy_run<T, N>(place + half + at, key + half + at);
            }
        } else if (slot >= 0) {
            const int32_t head = (run - rotated) / value_runs, at = (run - rotated) % value_runs * N;
            T* value = v_cache + ((block * kv_heads + head) * block_size + offset) * head_dim;
            copy_run<T, N>(row + (heads + kv_heads + head) * head_dim + at, value + at);
        }
    }
}

#define ROPE_KV_WRITE(suffix, type, run)                                                                                         \
    KERNEL(rope_kv_write##suffix)(type* qkv, const int32_t* positions, const int64_t* slot_mapping, type* k_cache, type* v_cache,  \
                                  const float* frequencies, float attention_factor, int32_t section_t, int32_t section_h,        \
                                  int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t block_size) {                       \
        rope_kv_write<type, run>(qkv, positions, slot_mapping, k_cache, v_cache, frequencies, attention_factor, section_t,       \
                                 section_h, heads, kv_heads, head_dim, block_size);                                              \
    }                                                                                                                            \
    REGISTER(rope_kv_write##suffix)

ROPE_KV_WRITE(_f32, float, 1)
ROPE_KV_WRITE(_bf16, bf16, 1)
ROPE_KV_WRITE(_wide_f32, float, 4)
ROPE_KV_WRITE(_wide_bf16, bf16, 8)

/// Rotates q and k of qkv [P, 3, heads, head_dim] in place. row_col [P, 2]; frequencies [head_dim / 4] f32: the first half of the
/// pairs follows the row, the second the column. Grid [P], block any. Twin: `reference::rope::VisionRope`.
template <typename T, int N>
__device__ __forceinline__ void rope_2d(T* qkv, const int32_t* row_col, const float* frequencies, int32_t heads, int32_t head_dim) {
    SHARED(float2, angles, MAX_PAIRS);
    const int32_t half = head_dim / 2, quarter = head_dim / 4;
    for (int32_t pair = threadIdx.x; pair < half; pair += blockDim.x) {
        const int32_t axis = pair >= quarter;
        const float position = static_cast<float>(row_col[2 * blockIdx.x + axis]);
        float cosine, sine;
        cos_sin(position * frequencies[pair - axis * quarter], cosine, sine);
        angles[pair] = make_float2(cosine, sine);
    }
    __syncthreads();
    T* row = qkv + static_cast<int64_t>(blockIdx.x) * 3 * heads * head_dim;
    const int32_t pair_runs = half / N;
    for (int32_t run = threadIdx.x; run < 2 * heads * pair_runs; run += blockDim.x) {
        rotate<T, N>(row + run / pair_runs * head_dim, run % pair_runs * N, half, angles);
    }
}

#define ROPE_2D(suffix, type, run)                                                                                       \
    KERNEL(rope_2d##suffix)(type* qkv, const int32_t* row_col, const float* frequencies, int32_t heads, int32_t head_dim) {  \
        rope_2d<type, run>(qkv, row_col, frequencies, heads, head_dim);                                                  \
    }                                                                                                                    \
    REGISTER(rope_2d##suffix)

ROPE_2D(_f32, float, 1)
ROPE_2D(_bf16, bf16, 1)
ROPE_2D(_wide_f32, float, 4)
ROPE_2D(_wide_bf16, bf16, 8)
