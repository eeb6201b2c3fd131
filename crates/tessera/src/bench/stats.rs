//! Medians and percentiles.

use serde::Serialize;

/// Median and the tenth and ninetieth percentile of several runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub p10: f64,
    pub p90: f64,
}

impl Spread {
    /// Of any number of values; NaN for none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let sorted = sorted(values);
        let at = |percent| percentile(&sorted, percent);
        Self { median: at(50.0), p10: at(10.0), p90: at(90.0) }
    }
}

/// Mean and percentiles of many values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Percentiles {
    /// Of any number of values; NaN for none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let sorted = sorted(values);
        let at = |percent| percentile(&sorted, percent);
        Self {
            count: sorted.len(),
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            max: at(100.0),
        }
    }
}

/// Values in ascending order.
pub fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The value below which `percent` of `sorted` lie, interpolated linearly between neighbours; NaN for no
/// values.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = percent / 100.0 * last as f64;
    let below = (place.floor() as usize).min(last);
    let above = (below + 1).min(last);
    sorted[below] + (place - below as f64) * (sorted[above] - sorted[below])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_known_values() {
        let hundred = sorted((0..=100).rev().map(f64::from));
        for percent in [0.0, 1.0, 50.0, 90.0, 99.0, 100.0] {
            assert_eq!(percentile(&hundred, percent), percent);
        }
        // Between neighbours, as numpy.percentile does by default.
        assert_eq!(percentile(&[1.0, 2.0, 4.0, 8.0], 50.0), 3.0);
        let between = percentile(&[1.0, 2.0, 4.0, 8.0], 90.0);
        assert!((between - 6.8).abs() < 1e-9, "{between}");
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert!(percentile(&[], 50.0).is_nan());
    }

    #[test]
    fn percentiles_of_a_hundred_and_one() {
        let values = Percentiles::of((0..=100).map(f64::from));
        let expected =
            Percentiles { count: 101, mean: 50.0, p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 };
        assert_eq!(values, expected);
        let none = Percentiles::of([]);
        assert!(none.count == 0 && none.mean.is_nan() && none.max.is_nan());
    }

    #[test]
    fn a_spread_does_not_depend_on_order() {
        let spread = Spread::of([5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!(spread, Spread { median: 3.0, p10: 1.4, p90: 4.6 });
    }
}
