// The device half of platform.cuh: intrinsics and inline PTX of compute capability 8.0 and later. See platform.cuh.

#pragma once

#define KERNEL(name) extern "C" __global__ void name
#define KERNEL_BOUNDS(name, max_threads, min_blocks) extern "C" __global__ void __launch_bounds__(max_threads, min_blocks) name
#define REGISTER(name)
#define SHARED(type, name, ...) __shared__ type name[__VA_ARGS__]
#define DYNAMIC_SHARED(type, name)                                             \
    extern __shared__ __align__(128) unsigned char tessera_dynamic_shared[];   \
    type* const name = reinterpret_cast<type*>(tessera_dynamic_shared)

/// Rounds to nearest even; a NaN stays one.
__device__ __forceinline__ bf16 to_bf16(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bf16{bits};
}

/// Two numbers rounded to bf16, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub_rn(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float sqrt_rn(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ float rsqrt_rn(float x) { return __frsqrt_rn(x); }
__device__ __forceinline__ double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ __forceinline__ double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double sub_rn(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double div_rn(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ double sqrt_rn(double x) { return __dsqrt_rn(x); }

/// 2^x by the special function unit: about 2 ulp, 0 for -inf, results below the normal range flushed to 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// CUDA knows `unsigned long long`; `uint64_t` is `unsigned long` here.
__device__ __forceinline__ uint64_t atomicAdd(uint64_t* p, uint64_t v) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
__device__ __forceinline__ uint64_t atomicMax(uint64_t* p, uint64_t v) {
    return atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
__device__ __forceinline__ uint64_t atomicMin(uint64_t* p, uint64_t v) {
    return atomicMin(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
__device__ __forceinline__ uint64_t atomicOr(uint64_t* p, uint64_t v) {
    return atomicOr(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
__device__ __forceinline__ uint64_t atomicExch(uint64_t* p, uint64_t v) {
    return atomicExch(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
__device__ __forceinline__ uint64_t atomicCAS(uint64_t* p, uint64_t expected, uint64_t v) {
    return atomicCAS(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(expected), static_cast<unsigned long long>(v));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// d = a · b + c of one warp: a [16, 16] by rows, b [16, 8] by columns, c and d [16, 8] f32. With g = lane / 4, t = lane % 4:
/// a[0..4] hold rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8 (pairs); b[0..2] hold rows 2t, 2t+8 (pairs) of column g;
/// d[0..4] are (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). PTX ISA, "Matrix Fragments for mma.m16n8k16".
__device__ __forceinline__ void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

/// Loads four 8×8 matrices of 2-byte elements from shared memory. Lane 8i + r names row r of matrix i (16 bytes, 16-byte aligned);
/// lane l gets of matrix i, in r[i], the elements (l / 4, 2 (l % 4)) and the one right of it.
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// As `ldmatrix_x4`, each matrix transposed: lane l gets the elements (2 (l % 4), l / 4) and the one below it.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// Two matrices: the rows are named by lanes 0 to 15, the others' addresses are not looked at (but must be valid).
__device__ __forceinline__ void ldmatrix_x2(uint32_t r[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

/// As `ldmatrix_x2`, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t r[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

/// Starts a copy of 16 bytes from global to shared memory (both 16-byte aligned), past L1; zeroes instead when not `valid`
/// (`src` is then not read).
__device__ __forceinline__ void cp_async_16(void* dst, const void* src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(valid ? 16 : 0)
                 : "memory");
}

/// Closes the group of the copies that this thread started.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most the `N` last groups of this thread are unfinished. Other threads' copies need a barrier after it.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
