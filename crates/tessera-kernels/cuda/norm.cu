// RMSNorm (Zhang and Sennrich 2019), alone or after adding to the residual: y = x / sqrt(mean(x²) + eps) ∘ weight.
// Twin: `reference::norm`. x, weight and residual are f32, y is the activation type.
//
// One block per row. Sums go by lane: a thread's own elements ascending, lanes of a warp by halves, warps ascending; so a row's
// bits depend on its width alone.

#include "pack.cuh"

/// Largest number of warps in a block.
constexpr int MAX_WARPS = 32;

/// The sum of `value` over the block, the same for every thread.
__device__ __forceinline__ float block_sum(float value) {
    SHARED(float, warp_sums, MAX_WARPS);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (uint32_t warp = 0; warp < blockDim.x / 32; warp++) sum += warp_sums[warp];
    return sum;
}

__device__ __forceinline__ float norm_scale(float squares, int32_t cols, float eps) {
    return 1.0f / sqrtf(squares / static_cast<float>(cols) + eps);
}

/// Rows of at most 4 · V · block elements, a multiple of 4: they stay in registers between the two passes.
template <typename T, bool ADD, int V>
__device__ __forceinline__ void norm_wide(const float* x, float* residual, const float* weight, float eps, T* y, int32_t cols) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * cols;
    float values[V][4];
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int32_t at = (v * blockDim.x + threadIdx.x) * 4;
        if (at >= cols) continue;
        load_run<4>(x + row + at, values[v]);
        if (ADD) {
            float old[4];
            load_run<4>(residual + row + at, old);
#pragma unroll
            for (int i = 0; i < 4; i++) values[v][i] += old[i];
            store_run<4>(residual + row + at, values[v]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) squares += values[v][i] * values[v][i];
    }
    const float scale = norm_scale(block_sum(squares), cols, eps);
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int32_t at = (v * blockDim.x + threadIdx.x) * 4;
        if (at >= cols) continue;
        float gain[4];
        load_run<4>(weight + at, gain);
#pragma unroll
        for (int i = 0; i < 4; i++) gain[i] = values[v][i] * scale * gain[i];
        store_run<4>(y + row + at, gain);
    }
}

/// Rows of any width; with ADD the sums are read again from the residual.
template <typename T, bool ADD>
__device__ __forceinline__ void norm_any(const float* x, float* residual, const float* weight, float eps, T* y, int32_t cols) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * cols;
    float squares = 0.0f;
    for (int32_t at = threadIdx.x; at < cols; at += blockDim.x) {
        float value = x[row + at];
        if (ADD) {
            value += residual[row + at];
            residual[row + at] = value;
        }
        squares += value * value;
    }
    const float scale = norm_scale(block_sum(squares), cols, eps);
    const float* source = ADD ? residual : x;
    for (int32_t at = threadIdx.x; at < cols; at += blockDim.x) {
        y[row + at] = from_float<T>(source[row + at] * scale * weight[at]);
    }
}

/// y [rows, cols] = rms(x)·weight. Grid [rows]; block: a multiple of 32 up to 1024 (wide_1: cols ≤ 4 · block, wide_2: ≤ 8 · block).
#define RMS_NORM(suffix, type, ...)                                                                                     \
    KERNEL_BOUNDS(rms_norm##suffix, 1024, 1)(const float* x, const float* weight, float eps, type* y, int32_t cols) {   \
        __VA_ARGS__(x, nullptr, weight, eps, y, cols);                                                                  \
    }                                                                                                                   \
    REGISTER(rms_norm##suffix)

RMS_NORM(_f32, float, norm_any<float, false>)
RMS_NORM(_bf16, bf16, norm_any<bf16, false>)
RMS_NORM(_wide_1_f32, float, norm_wide<float, false, 1>)
RMS_NORM(_wide_1_bf16, bf16, norm_wide<bf16, false, 1>)
RMS_NORM(_wide_2_f32, float, norm_wide<float, false, 2>)
RMS_NORM(_wide_2_bf16, bf16, norm_wide<bf16, false, 2>)

/// residual [rows, cols] += partial; y = rms(residual)·weight. Grid and block as above.
#define ADD_RMS_NORM(suffix, type, ...)                                                                                  \
    KERNEL_BOUNDS(add_rms_norm##suffix, 1024, 1)(const float* partial, float* residual, const float* weight, float eps,  \
                                                 type* y, int32_t cols) {                                                \
        __VA_ARGS__(partial, residual, weight, eps, y, cols);                                                            \
    }                                                                                                                    \
    REGISTER(add_rms_norm##suffix)

ADD_RMS_NORM(_f32, float, norm_any<float, true>)
ADD_RMS_NORM(_bf16, bf16, norm_any<bf16, true>)
ADD_RMS_NORM(_wide_1_f32, float, norm_wide<float, true, 1>)
ADD_RMS_NORM(_wide_1_bf16, bf16, norm_wide<bf16, true, 1>)
ADD_RMS_NORM(_wide_2_f32, float, norm_wide<float, true, 2>)
ADD_RMS_NORM(_wide_2_bf16, bf16, norm_wide<bf16, true, 2>)
