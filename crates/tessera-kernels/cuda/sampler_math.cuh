// Arithmetic of the draw, the same bits as on the host: twins of `sampling::math` and `sampling::draw`. Files that include this
// are compiled with --fmad=false, and every function keeps the host's order of operations.

#pragma once

#include "platform.cuh"

/// No token, no mask, no number of log probabilities.
constexpr uint32_t NONE = 0xffffffffu;

__device__ __forceinline__ float infinity() {
    return __uint_as_float(0x7f800000u);
}

/// e^x in f32, for x ≤ 88; 0 below −87. Twin of `math::exp`.
__device__ __forceinline__ float exp_host(float x) {
    constexpr float ROUND = 12582912.0f;
    // As Rust's clamp: a NaN stays one.
    float clamped = x;
    if (clamped < -87.0f) clamped = -87.0f;
    if (clamped > 88.0f) clamped = 88.0f;
    const float rounded = clamped * 1.44269504088896340736f + ROUND;
    const float n = rounded - ROUND;
    const float r = (clamped - n * 0.6933594f) - n * -2.1219444e-4f;
    float p = 1.9875692e-4f;
    p = p * r + 1.3982e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    const uint32_t exponent = (__float_as_uint(rounded) - __float_as_uint(ROUND) + 127u) << 23;
    return x < -87.0f ? 0.0f : p * __uint_as_float(exponent);
}

/// ln x in f64, for finite x > 0 that is not subnormal. Twin of `math::ln`.
__device__ __forceinline__ double ln_host(double x) {
    constexpr uint64_t MANTISSA = (1ull << 52) - 1;
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
    int32_t e = static_cast<int32_t>(bits >> 52) - 1023;
    double m = __longlong_as_double(static_cast<long long>((bits & MANTISSA) | (1023ull << 52)));
    if (m >= 1.41421356237309504880) {
        m *= 0.5;
        e += 1;
    }
    const double s = (m - 1.0) / (m + 1.0);
    const double square = s * s;
    double series = 1.0 / 21.0;
    series = series * square + 1.0 / 19.0;
    series = series * square + 1.0 / 17.0;
    series = series * square + 1.0 / 15.0;
    series = series * square + 1.0 / 13.0;
    series = series * square + 1.0 / 11.0;
    series = series * square + 1.0 / 9.0;
    series = series * square + 1.0 / 7.0;
    series = series * square + 1.0 / 5.0;
    series = series * square + 1.0 / 3.0;
    const double exponent = static_cast<double>(e);
    return exponent * 6.931471803691238e-1 + (2.0 * s + (2.0 * s * square * series + exponent * 1.9082149292705877e-10));
}

/// Four random words.
struct Words {
    uint32_t at[4];
};

/// Philox4x32-10 at [block, output index, 0, 0] under a seed. Twin of `draw::philox_4x32_10`.
__device__ __forceinline__ Words philox(uint32_t block, uint32_t output_index, uint32_t seed_low, uint32_t seed_high) {
    uint32_t c0 = block, c1 = output_index, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t product_0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t product_1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ seed_low;
        c1 = static_cast<uint32_t>(product_1);
        c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ seed_high;
        c3 = static_cast<uint32_t>(product_0);
        seed_low += 0x9E3779B9u;
        seed_high += 0xBB67AE85u;
    }
    return Words{{c0, c1, c2, c3}};
}

/// A token and its score: the logit itself, or the logit with Gumbel noise.
struct Candidate {
    double score;
    uint32_t token;
};

__device__ __forceinline__ Candidate no_candidate() {
    return Candidate{-static_cast<double>(infinity()), NONE};
}

/// The order in which candidates win; no token loses to every other.
__device__ __forceinline__ bool beats(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
}

/// Score of a logit by its random word. Twin of `draw::gumbel_score`.
__device__ __forceinline__ double gumbel_score(float logit, uint32_t word) {
    const double uniform = (static_cast<double>(word) + 0.5) * (1.0 / 4294967296.0);
    return static_cast<double>(logit) - ln_host(-ln_host(uniform));
}

/// No score exceeds its logit by more.
constexpr float MAX_NOISE = 23.0f;

/// The best of a draw so far, with bounds that tell without logarithms that most tokens can't win.
struct Race {
    Candidate best;
    /// Logits below can't win whatever their noise, which is at most 22.87: the best score less 23 and less a slack that covers all
    /// rounding of `consider`.
    float hopeless;

    __device__ __forceinline__ void lead(const Candidate& candidate) {
        best = candidate;
        const float score = static_cast<float>(candidate.score);
        const float slack = 1e-4f + fabsf(score) * 1e-6f;
        hopeless = score - slack - MAX_NOISE;
    }

    /// Lets one token compete, by its logit (not −∞) and its random word.
    ///
    /// A win needs −ln u ≤ e^(logit − best), and −ln u is at least 1 − u, which is at least its 23 highest bits.
    __device__ __forceinline__ void consider(float logit, uint32_t token, uint32_t word) {
        if (logit < hopeless) return;
        const float least = __uint_as_float(~word >> 9 | 0x3f800000u) - 1.0f;
        if (least > exp2_fast((logit - hopeless - MAX_NOISE) * 1.44269504f)) return;
        const Candidate challenger = {gumbel_score(logit, word), token};
        if (beats(challenger, best)) lead(challenger);
    }
};
