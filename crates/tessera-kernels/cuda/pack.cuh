// Activations in runs of neighbours: loads and stores of up to 16 bytes, widened to f32 in registers.

#pragma once

#include "platform.cuh"

/// Elements of type `T` in 16 bytes.
template <typename T>
constexpr int WIDE = 16 / static_cast<int>(sizeof(T));

/// Reads `N` neighbours. More than one element wants `from` aligned to `N` elements.
template <int N, typename T>
__device__ __forceinline__ void load_run(const T* from, float (&to)[N]) {
    if constexpr (N == 1) {
        to[0] = to_float(*from);
    } else if constexpr (sizeof(T) == 4) {
        static_assert(N % 4 == 0, "runs of f32 are whole float4");
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + i);
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    } else if constexpr (N == 4) {
        const uint2 pairs = *reinterpret_cast<const uint2*>(from);
        to[0] = bf16x2_low(pairs.x), to[1] = bf16x2_high(pairs.x);
        to[2] = bf16x2_low(pairs.y), to[3] = bf16x2_high(pairs.y);
    } else {
        static_assert(N == 8, "runs of bf16 hold 1, 4 or 8");
        const uint4 pairs = *reinterpret_cast<const uint4*>(from);
        to[0] = bf16x2_low(pairs.x), to[1] = bf16x2_high(pairs.x);
        to[2] = bf16x2_low(pairs.y), to[3] = bf16x2_high(pairs.y);
        to[4] = bf16x2_low(pairs.z), to[5] = bf16x2_high(pairs.z);
        to[6] = bf16x2_low(pairs.w), to[7] = bf16x2_high(pairs.w);
    }
}

/// Writes `N` neighbours, rounded to `T`. More than one element wants `to` aligned to `N` elements.
template <int N, typename T>
__device__ __forceinline__ void store_run(T* to, const float (&from)[N]) {
    if constexpr (N == 1) {
        *to = from_float<T>(from[0]);
    } else if constexpr (sizeof(T) == 4) {
        static_assert(N % 4 == 0, "runs of f32 are whole float4");
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            *reinterpret_cast<float4*>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
        }
    } else if constexpr (N == 4) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16x2(from[0], from[1]), pack_bf16x2(from[2], from[3]));
    } else {
        static_assert(N == 8, "runs of bf16 hold 1, 4 or 8");
        *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16x2(from[0], from[1]), pack_bf16x2(from[2], from[3]),
                                                   pack_bf16x2(from[4], from[5]), pack_bf16x2(from[6], from[7]));
    }
}
