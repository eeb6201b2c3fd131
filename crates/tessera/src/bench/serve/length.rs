//! Lengths drawn from a distribution.

use std::fmt;
use std::str::FromStr;

use crate::bench::random::Random;

/// Of a prompt or an output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    Fixed(u32),
    /// Both ends included.
    Uniform {
        low: u32,
        high: u32,
    },
    /// Of its logarithm, `sigma` is the standard deviation.
    LogNormal {
        median: f64,
        sigma: f64,
    },
}

/// Draws of a lognormal distribution are cut here, in medians.
const LONGEST: f64 = 16.0;

impl Length {
    /// At least 1.
    pub fn draw(&self, random: &mut Random) -> u32 {
        match *self {
            Self::Fixed(length) => length,
            Self::Uniform { low, high } => random.between(low, high),
            Self::LogNormal { median, sigma } => {
                let factor = (sigma * random.normal()).exp().min(LONGEST);
                (median * factor).round().max(1.0) as u32
            }
        }
    }
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, values) = text.split_once(':').unwrap_or(("fixed", text));
        let values: Vec<Option<f64>> = values.split(',').map(|value| value.parse().ok()).collect();
        let whole = |value: f64| (value >= 1.0 && value.fract() == 0.0).then_some(value as u32);
        let length = match (kind, values.as_slice()) {
            ("fixed", &[Some(length)]) => whole(length).map(Self::Fixed),
            ("uniform", &[Some(low), Some(high)]) if low <= high => {
                whole(low).zip(whole(high)).map(|(low, high)| Self::Uniform { low, high })
            }
            ("lognormal", &[Some(median), Some(sigma)]) if median >= 1.0 && sigma >= 0.0 => {
                Some(Self::LogNormal { median, sigma })
            }
            _ => None,
        };
        length.ok_or_else(|| {
            "expected N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA with lengths of at least 1"
                .to_owned()
        })
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(length) => write!(f, "fixed:{length}"),
            Self::Uniform { low, high } => write!(f, "uniform:{low},{high}"),
            Self::LogNormal { median, sigma } => write!(f, "lognormal:{median},{sigma}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::{percentile, sorted};

    #[test]
    fn names_survive_parsing_and_others_are_refused() {
        for name in ["fixed:7", "uniform:3,9", "lognormal:64,0.5"] {
            assert_eq!(name.parse::<Length>().expect(name).to_string(), name);
        }
        assert_eq!("12".parse(), Ok(Length::Fixed(12)));
        for wrong in
            ["", "0", "uniform:9,3", "uniform:3", "lognormal:0,1", "normal:3,1", "fixed:1.5"]
        {
            assert!(wrong.parse::<Length>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn draws_follow_their_distribution() {
        let mut random = Random::new(3);
        let mut draws =
            |length: Length| sorted((0..20_000).map(|_| f64::from(length.draw(&mut random))));
        let uniform = draws(Length::Uniform { low: 10, high: 20 });
        assert_eq!((uniform[0], uniform[19_999]), (10.0, 20.0));
        let lognormal = draws(Length::LogNormal { median: 100.0, sigma: 0.5 });
        assert!((percentile(&lognormal, 50.0) - 100.0).abs() < 3.0);
        // One standard deviation above: 100 · e^0.5.
        assert!((percentile(&lognormal, 84.13) - 164.9).abs() < 5.0);
        assert!(lognormal[19_999] <= 1600.0);
    }
}
