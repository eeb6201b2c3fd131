// The emulated half of platform.cuh: every name of the device, on the CPU. See platform.cuh and README.md.

#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstring>
#include <limits>

#include "emulator.h"

#define __device__
#define __host__
#define __global__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

#define KERNEL(name) static void name
#define KERNEL_BOUNDS(name, max_threads, min_blocks)                            \
    static const ::emulator::Bounds bounds_of_##name(#name, max_threads);       \
    static void name
#define REGISTER(name)                                                                                            \
    static const ::emulator::Registration registration_of_##name(                                                 \
        #name, &::emulator::Trampoline<&name>::call, ::emulator::Trampoline<&name>::BYTES, ::emulator::Trampoline<&name>::COUNT);
#define SHARED(type, name, ...)                                                                                    \
    using name##_array = type[__VA_ARGS__];                                                                        \
    static const ::emulator::SharedSite name##_site = {#name, sizeof(name##_array), alignof(name##_array)};        \
    name##_array& name = *static_cast<name##_array*>(::emulator::static_shared(name##_site))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::emulator::current->block->dynamic_shared)

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::current->block->index)
#define blockDim (::emulator::current->block->block_dim)
#define gridDim (::emulator::current->block->grid_dim)
#define warpSize 32

#define __syncthreads() ::emulator::sync_threads(::emulator::Vote::None, 0, __FILE__, __LINE__)
#define __syncthreads_or(predicate) ::emulator::sync_threads(::emulator::Vote::Or, (predicate) != 0, __FILE__, __LINE__)
#define __syncthreads_and(predicate) ::emulator::sync_threads(::emulator::Vote::And, (predicate) != 0, __FILE__, __LINE__)
#define __syncthreads_count(predicate) ::emulator::sync_threads(::emulator::Vote::Count, (predicate) != 0, __FILE__, __LINE__)

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    ::emulator::sync_warp(mask);
}

// --- Vectors, aligned as on the device. ---

#define TESSERA_VECTORS(scalar, name)                                                        \
    struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                             \
    struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };                       \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                     \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
TESSERA_VECTORS(float, float)
TESSERA_VECTORS(int, int)
TESSERA_VECTORS(unsigned, uint)
#undef TESSERA_VECTORS

struct alignas(16) double2 { double x, y; };
inline double2 make_double2(double x, double y) { return {x, y}; }

// --- Bits, integers. ---

template <typename To, typename From>
__forceinline__ To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return bits_as<double>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using C = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<C>) return a != a ? C(b) : (C(b) < C(a) ? C(b) : C(a));
    else return C(b) < C(a) ? C(b) : C(a);
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using C = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<C>) return a != a ? C(b) : (C(a) < C(b) ? C(b) : C(a));
    else return C(a) < C(b) ? C(b) : C(a);
}

// --- Arithmetic. The build forbids contraction, so that plain expressions are the *_rn forms. ---

inline float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
#define TESSERA_ROUNDED(type)                                     \
    inline type add_rn(type a, type b) { return a + b; }          \
    inline type sub_rn(type a, type b) { return a - b; }          \
    inline type mul_rn(type a, type b) { return a * b; }          \
    inline type div_rn(type a, type b) { return a / b; }          \
    inline type sqrt_rn(type x) { return std::sqrt(x); }
TESSERA_ROUNDED(float)
TESSERA_ROUNDED(double)
#undef TESSERA_ROUNDED
inline float rsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float exp2_fast(float x) { return ::exp2f(x); }
inline float rsqrtf(float x) { return rsqrt_rn(x); }
inline float __expf(float x) { return ::expf(x); }
inline float __fdividef(float a, float b) { return a / b; }

inline bf16 to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline uint32_t pack_bf16x2(float low, float high) {
    return static_cast<uint32_t>(to_bf16(low).bits) | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}

// --- Warps. ---

template <typename T>
T shuffle_value(uint32_t mask, T value, unsigned source) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    word = ::emulator::shuffle(mask, word, source);
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    const unsigned first = ::emulator::current->lane & ~static_cast<unsigned>(width - 1);
    return shuffle_value(mask, value, first + (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1)));
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32) {
    const unsigned lane = ::emulator::current->lane, source = lane ^ static_cast<unsigned>(lane_mask);
    const unsigned end = (lane & ~static_cast<unsigned>(width - 1)) + static_cast<unsigned>(width);
    return shuffle_value(mask, value, source < end ? source : lane);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = ::emulator::current->lane, end = (lane & ~static_cast<unsigned>(width - 1)) + static_cast<unsigned>(width);
    return shuffle_value(mask, value, lane + delta < end ? lane + delta : lane);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = ::emulator::current->lane, first = lane & ~static_cast<unsigned>(width - 1);
    return shuffle_value(mask, value, lane >= first + delta ? lane - delta : lane);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return ::emulator::ballot(mask, predicate != 0); }
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// --- Memory. Atomics are real ones: blocks of several launches may run at the same time. ---

template <typename T>
constexpr bool HAS_ATOMICS = std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t> ||
                             std::is_same_v<T, unsigned long long>;

template <typename T, typename F>
T atomic_update(T* p, F&& next) {
    static_assert(HAS_ATOMICS<T>, "no such atomic on the device");
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, next(old), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
    }
    return old;
}

template <typename T>
T atomicAdd(T* p, std::common_type_t<T> v) { return atomic_update(p, [v](T old) { return static_cast<T>(old + v); }); }
template <typename T>
T atomicMax(T* p, std::common_type_t<T> v) { return atomic_update(p, [v](T old) { return old < v ? v : old; }); }
template <typename T>
T atomicMin(T* p, std::common_type_t<T> v) { return atomic_update(p, [v](T old) { return v < old ? v : old; }); }
template <typename T>
T atomicOr(T* p, std::common_type_t<T> v) { return atomic_update(p, [v](T old) { return static_cast<T>(old | v); }); }
template <typename T>
T atomicExch(T* p, std::common_type_t<T> v) { return atomic_update(p, [v](T) { return v; }); }
template <typename T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
    return atomic_update(p, [=](T old) { return old == expected ? v : old; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
__forceinline__ T __ldg(const T* p) { return *p; }

// --- Matrices and copies. ---

inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4]) {
    ::emulator::mma_m16n8k16_bf16(d, a, b, c);
}
inline void ldmatrix_x4(uint32_t r[4], const void* row) { ::emulator::load_matrices(r, row, 4, false); }
inline void ldmatrix_x4_trans(uint32_t r[4], const void* row) { ::emulator::load_matrices(r, row, 4, true); }
inline void ldmatrix_x2(uint32_t r[2], const void* row) { ::emulator::load_matrices(r, row, 2, false); }
inline void ldmatrix_x2_trans(uint32_t r[2], const void* row) { ::emulator::load_matrices(r, row, 2, true); }
inline void cp_async_16(void* dst, const void* src, bool valid) { ::emulator::copy_async_16(dst, src, valid); }
inline void cp_async_commit() { ::emulator::copy_async_commit(); }
template <int N>
void cp_async_wait() { ::emulator::copy_async_wait(N); }
