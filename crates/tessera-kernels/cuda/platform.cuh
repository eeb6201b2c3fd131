// What a kernel source may use of the device: the only header that kernels include besides their own.
//
// Under nvcc everything maps to intrinsics and inline PTX (sm_90a, compute_80); under g++ with TESSERA_EMULATOR the same names
// run on the CPU, checked (tests/cuda-emulator/README.md). A kernel file holds no `asm` and no `#ifdef`.
//
// A source file looks like this:
//
//     #include "platform.cuh"
//
//     KERNEL(double_rows_f32)(const float* x, float* y, int32_t cols) {     // or KERNEL_BOUNDS(name, 256, 2)(...)
//         SHARED(float, tile, 256);                                         // float tile[256]
//         ...
//     }
//     REGISTER(double_rows_f32)
//
// Both halves offer:
//   KERNEL, KERNEL_BOUNDS(name, max_threads, min_blocks), REGISTER, SHARED(type, name, count), DYNAMIC_SHARED(type, name)
//   threadIdx, blockIdx, blockDim, gridDim, __syncthreads[_or, _and, _count], __syncwarp
//   __shfl[_xor, _up, _down]_sync, __ballot_sync, __any_sync, __all_sync for values of at most 8 bytes
//   atomicAdd, atomicMax, atomicMin, atomicOr, atomicCAS, atomicExch for int32_t, uint32_t, uint64_t; no float atomics: their order is free
//   __threadfence[_block, _system], __ldg, __popc, __clz, __ffs, __umulhi, __umul64hi, bit casts, min, max
//   float2/4, int2/4, uint2/4 with make_*; bf16, to_float, to_bf16, from_float<T>, pack_bf16x2, bf16x2_low, bf16x2_high
//   fma_rn, add_rn, mul_rn, sub_rn, div_rn, sqrt_rn (never contracted), rsqrt_rn, exp2_fast, and the C math library
//   mma_m16n8k16_bf16, ldmatrix_x4, ldmatrix_x4_trans, ldmatrix_x2, ldmatrix_x2_trans
//   cp_async_16, cp_async_commit, cp_async_wait<N>

#pragma once

#include <cstddef>
#include <cstdint>

/// A bfloat16 number: the upper half of an f32. Trivial, so that it may lie in shared memory.
struct bf16 {
    uint16_t bits;
};

#ifdef TESSERA_EMULATOR
#include "platform_emulator.cuh"
#else
#include "platform_device.cuh"
#endif

/// All lanes of a warp.
constexpr uint32_t FULL_WARP = 0xffffffffu;

/// The value of a bf16, exactly.
__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float to_float(float x) {
    return x;
}

/// `x` as the activation type `T` (float or bf16), rounded to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return to_bf16(x);
}

/// The first of two packed bf16 numbers.
__device__ __forceinline__ float bf16x2_low(uint32_t pair) {
    return __uint_as_float(pair << 16);
}

/// The second of two packed bf16 numbers.
__device__ __forceinline__ float bf16x2_high(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}
