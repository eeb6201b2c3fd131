// Operations on elements: activations of the MLPs, and the counter of finished layers.
//
// Kernels ending in _wide work on runs of 16 bytes of the activation type and want rows of whole runs; the others take any size.
// Grid: [rows, ceil(threads of a row / 256)], block 256.

#include "pack.cuh"

/// silu(gate) · up, silu(x) = x / (1 + e^-x).
__device__ __forceinline__ float swiglu_of(float gate, float up) {
    return gate / (1.0f + expf(-gate)) * up;
}

/// y [M, I] = silu(gate) ∘ up of gate_up [M, 2·I], gate in the first half of each row. Twin: `ReferenceLinear::apply_swiglu`.
template <typename T, int N>
__device__ __forceinline__ void swiglu(const T* gate_up, T* y, int32_t inner) {
    const int32_t at = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (at >= inner) return;
    const T* row = gate_up + static_cast<int64_t>(blockIdx.x) * 2 * inner;
    float gate[N], up[N];
    load_run<N>(row + at, gate);
    load_run<N>(row + inner + at, up);
#pragma unroll
    for (int i = 0; i < N; i++) gate[i] = swiglu_of(gate[i], up[i]);
    store_run<N>(y + static_cast<int64_t>(blockIdx.x) * inner + at, gate);
}

KERNEL(swiglu_f32)(const float* gate_up, float* y, int32_t inner) { swiglu<float, 1>(gate_up, y, inner); }
KERNEL(swiglu_bf16)(const bf16* gate_up, bf16* y, int32_t inner) { swiglu<bf16, 1>(gate_up, y, inner); }
KERNEL(swiglu_wide_f32)(const float* gate_up, float* y, int32_t inner) { swiglu<float, 4>(gate_up, y, inner); }
KERNEL(swiglu_wide_bf16)(const bf16* gate_up, bf16* y, int32_t inner) { swiglu<bf16, 8>(gate_up, y, inner); }
REGISTER(swiglu_f32)
REGISTER(swiglu_bf16)
REGISTER(swiglu_wide_f32)
REGISTER(swiglu_wide_bf16)

/// x · Φ(x) by the complementary error function, which keeps the small values on the left exact.
__device__ __forceinline__ float gelu_of(float x) {
    return 0.5f * x * erfcf(-0.70710678118654752f * x);
}

/// x [rows, cols] = gelu(x) in place, the exact (erf) form. Twin: `reference::linear::gelu`.
template <typename T, int N>
__device__ __forceinline__ void gelu_erf(T* x, int32_t cols) {
    const int32_t at = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (at >= cols) return;
    T* run = x + static_cast<int64_t>(blockIdx.x) * cols + at;
    float values[N];
    load_run<N>(run, values);
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = gelu_of(values[i]);
    store_run<N>(run, values);
}

KERNEL(gelu_erf_f32)(float* x, int32_t cols) { gelu_erf<float, 1>(x, cols); }
KERNEL(gelu_erf_bf16)(bf16* x, int32_t cols) { gelu_erf<bf16, 1>(x, cols); }
KERNEL(gelu_erf_wide_f32)(float* x, int32_t cols) { gelu_erf<float, 4>(x, cols); }
KERNEL(gelu_erf_wide_bf16)(bf16* x, int32_t cols) { gelu_erf<bf16, 8>(x, cols); }
REGISTER(gelu_erf_f32)
REGISTER(gelu_erf_bf16)
REGISTER(gelu_erf_wide_f32)
REGISTER(gelu_erf_wide_bf16)

/// Adds one to a counter in mapped host memory. Grid [1], block 1.
KERNEL(bump_counter)(uint64_t* counter) {
    volatile uint64_t* shown = counter;
    *shown = *shown + 1;
    __threadfence_system();
}
REGISTER(bump_counter)
