//! Exponential, logarithm and the ordered sum of exponentials, from additions and multiplications only.
//!
//! The functions of the C library differ in the last bit between versions; these do not, and their
//! loops vectorise. No fused multiply-add: it would round differently where the hardware lacks one.

/// Partial sums of [`sum_exp`]. Part of the numerics: element i adds to lane i mod 16, lanes are added
/// in ascending pairs.
const LANES: usize = 16;

/// e^x in f32, for x ≤ 88. Below −87 the result is 0. Relative error below 2e-7.
///
/// Cephes `expf`: x = n·ln 2 + r with |r| ≤ ln 2 / 2, a polynomial of degree 7 in r, scaled by 2^n.
#[inline]
pub fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5·2^23 leaves the nearest integer in the low bits; it is read from there as well.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let p = p * (r * r) + r + 1.0;
    let exponent = (rounded.to_bits().wrapping_sub(ROUND.to_bits())).wrapping_add(127) << 23;
    let scaled = p * f32::from_bits(exponent);
    if x < -87.0 { 0.0 } else { scaled }
}

/// x · Φ(x) with the normal distribution itself: the exact GELU. Absolute error below 1.5e-7 + 1.5e-7·|x|.
///
/// Φ(−|x|) = e^p(|x|) with a polynomial p of degree 8, fitted so that the largest error of |x|·Φ is least over
/// 0 ≤ |x| ≤ 6; beyond, Φ(−|x|) is below 1e-9 and counts as 0. One exponential, no branch, no division.
#[inline]
pub fn gelu(x: f32) -> f32 {
    const TAIL: f32 = 6.0;
    let size = x.abs();
    let clamped = if size < TAIL { size } else { TAIL };
    let mut p = -1.380_678_9e-6;
    for coefficient in [
        2.028_980_6e-5,
        -9.571_548e-5,
        -1.756_688e-4,
        5.002_020_3e-3,
        -3.646_165_6e-2,
        -3.182_739_3e-1,
        -7.978_884_6e-1,
        -std::f32::consts::LN_2,
    ] {
        p = p * clamped + coefficient;
    }
    let below = if size < TAIL { exp(p) } else { 0.0 };
    x * if x < 0.0 { below } else { 1.0 - below }
}

/// ln x in f64, for finite x > 0 that is not subnormal. Relative error below 1e-15.
///
/// x = 2^e·m with m in [√½, √2), ln m = 2·atanh s with s = (m − 1) / (m + 1), by its series.
#[inline]
pub fn ln(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    let mut e = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits(bits & MANTISSA | 1023 << 52);
    if m >= std::f64::consts::SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    // |s| ≤ 0.1716, so the last term is below 1e-17 of the first.
    let mut series = 1.0 / 21.0;
    for denominator in [19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0] {
        series = series * square + 1.0 / denominator;
    }
    // The low part of ln 2 keeps results near zero exact to their own last bits.
    const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let e = f64::from(e);
    e * LN_2_HIGH + (2.0 * s + (2.0 * s * square * series + e * LN_2_LOW))
}

/// Σ e^(x − max) in a fixed order, f32 terms and f64 lanes. `max` is the largest of `row`; −∞ adds 0.
pub fn sum_exp(row: &[f32], max: f32) -> f64 {
    let mut lanes = [0f64; LANES];
    let (groups, rest) = row.as_chunks::<LANES>();
    for group in groups {
        for (lane, &x) in lanes.iter_mut().zip(group) {
            *lane += f64::from(exp(x - max));
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(exp(x - max));
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
        }
    }
    lanes[0]
}

/// The largest value of `row`, −∞ for an empty one. `row` holds no NaN.
pub fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (groups, rest) = row.as_chunks::<LANES>();
    for group in groups {
        for (lane, &x) in lanes.iter_mut().zip(group) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_standard_library() {
        for i in -870_000..=880_000i32 {
            let x = i as f32 / 10_000.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / exact - 1.0).abs() < 2e-7, "exp({x}) = {ours}, exactly {exact}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
    }

    #[test]
    fn gelu_is_that_of_the_normal_distribution() {
        for i in -200_000..=200_000i32 {
            let x = i as f32 / 10_000.0;
            let (wide, ours) = (f64::from(x), f64::from(gelu(x)));
            let erf = candle_core::cpu::erf::erf_f64(wide * std::f64::consts::FRAC_1_SQRT_2);
            let (exact, bound) = (wide * 0.5 * (1.0 + erf), 1.5e-7 + 1.5e-7 * wide.abs());
            assert!((ours - exact).abs() < bound, "gelu({x}) = {ours}, exactly {exact}");
        }
        assert_eq!(gelu(0.0), 0.0);
        assert_eq!(gelu(f32::INFINITY), f32::INFINITY);
        assert!(gelu(f32::NAN).is_nan());
    }

    #[test]
    fn ln_is_that_of_the_standard_library() {
        let mut x = 1e-12;
        while x < 1e12 {
            let (ours, exact) = (ln(x), x.ln());
            assert!(
                (ours - exact).abs() <= 1e-15 * exact.abs(),
                "ln({x}) = {ours}, exactly {exact}"
            );
            x *= 1.000_37;
        }
        for i in 1..1000 {
            for x in [1.0 + f64::from(i) * 1e-12, 1.0 - f64::from(i) * 1e-12] {
                assert!((ln(x) - x.ln()).abs() <= 1e-15 * x.ln().abs(), "ln({x})");
            }
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn the_sum_of_exponentials_is_close_to_the_exact_one_and_ignores_barred_tokens() {
        for len in [1, 5, 15, 16, 17, 1000, 4099] {
            let mut row: Vec<f32> =
                (0..len).map(|i| ((i * 7919) % 1000) as f32 * 0.02 - 10.0).collect();
            let exact: f64 = row.iter().map(|&x| (f64::from(x) - 10.0).exp()).sum();
            let sum = sum_exp(&row, 10.0);
            assert!((sum / exact - 1.0).abs() < 1e-6, "{sum}, exactly {exact}");
            row.extend([f32::NEG_INFINITY; 16]);
            assert_eq!(sum_exp(&row, 10.0), sum);
            assert_eq!(max(&row), row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}
