//! Flags of `tessera bench serve`, and what they come to.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use serde::{Serialize, Serializer};

use super::length::Length;
use super::workload::Mix;
use crate::bench::size::ImageSize;
use crate::error::{Error, Result};

/// Flags of `tessera bench serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Server: http://host:port of an OpenAI-compatible one (without /v1), or grpc://host:port of a Tessera
    /// router.
    #[arg(long, value_name = "URL")]
    url: String,
    /// Name of the model; default: the first that the server lists.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Sent as a bearer token.
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Open loop: chats that begin per second, as a Poisson process.
    #[arg(long, value_name = "CHATS", conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Closed loop: chats at a time, each followed by the next.
    #[arg(long, value_name = "CHATS")]
    concurrency: Option<usize>,
    /// Chats in all; default 100, or as many as fit into --duration.
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
    /// Begin no chat after this many seconds.
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,
    /// Chats before the measurement, one after another.
    #[arg(long, default_value_t = 2, value_name = "N")]
    warmup: u64,
    /// Share of chats about text; the three shares are a proportion.
    #[arg(long, value_name = "SHARE")]
    text: Option<f64>,
    /// Share of chats about images.
    #[arg(long, value_name = "SHARE")]
    image: Option<f64>,
    /// Share of chats about videos.
    #[arg(long, value_name = "SHARE")]
    video: Option<f64>,
    /// Sizes of images in pixels; each image has one of them.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1008x1008",
        value_name = "WIDTHxHEIGHT,..."
    )]
    image_size: Vec<ImageSize>,
    /// Images in the first message of a chat about images.
    #[arg(long, default_value_t = 1, value_name = "N")]
    images: u32,
    /// Size of video frames in pixels.
    #[arg(long, default_value = "448x448", value_name = "WIDTHxHEIGHT")]
    frame_size: ImageSize,
    /// Frames of a video, sent as a list.
    #[arg(long, default_value_t = 8, value_name = "N")]
    frames: u32,
    /// Frames per second of a video.
    #[arg(long, default_value_t = 2.0, value_name = "FPS")]
    fps: f64,
    /// Words of a question: N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA. Most words are one token.
    #[arg(long, default_value = "128", value_name = "LENGTH")]
    prompt_length: Length,
    /// Tokens of an answer, in the same form.
    #[arg(long, default_value = "64", value_name = "LENGTH")]
    output_length: Length,
    /// Share of chats that begin with the same system message.
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    prefix_share: f64,
    /// Words of that message.
    #[arg(long, default_value_t = 512, value_name = "WORDS")]
    prefix_length: u32,
    /// Questions in a chat; each repeats all that was said before, media included.
    #[arg(long, default_value_t = 1, value_name = "N")]
    turns: u32,
    /// Bounds that a good request meets, for example ttft=500ms,itl=50ms; also tpot and e2e.
    #[arg(long, value_delimiter = ',', value_name = "NAME=TIME,...")]
    slo: Vec<Bound>,
    /// Let answers end by themselves; otherwise they have exactly the length that was drawn.
    #[arg(long)]
    respect_eos: bool,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// JSON object whose fields are added to every HTTP body.
    #[arg(long, value_name = "JSON")]
    extra_body: Option<String>,
    /// Seconds after which a request has failed.
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS")]
    timeout: f64,
    /// Requests under way at most; an open loop counts those beyond as failed.
    #[arg(long, default_value_t = 4096, value_name = "N")]
    max_in_flight: usize,
    /// Decides lengths, words, pictures and arrivals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also write the figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// A latency that can be bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Latency {
    /// Until the first token.
    Ttft,
    /// Mean gap between pieces of an answer.
    Itl,
    /// Time per output token after the first.
    Tpot,
    /// Until the end.
    E2e,
}

/// The most that a good request may take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bound {
    pub latency: Latency,
    pub ms: f64,
}

impl FromStr for Bound {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "expected ttft, itl, tpot or e2e = a time in ms or s, as in ttft=500ms".to_owned();
        let (name, time) = text.split_once('=').ok_or_else(wrong)?;
        let latency = match name {
            "ttft" => Latency::Ttft,
            "itl" => Latency::Itl,
            "tpot" => Latency::Tpot,
            "e2e" => Latency::E2e,
            _ => return Err(wrong()),
        };
        let in_ms = time.strip_suffix("ms").map(|number| (number, 1.0));
        let in_seconds = || time.strip_suffix('s').map(|number| (number, 1e3));
        let (number, unit) = in_ms.or_else(in_seconds).ok_or_else(wrong)?;
        let number: f64 = number.parse().map_err(|_| wrong())?;
        match number > 0.0 && number.is_finite() {
            true => Ok(Self { latency, ms: number * unit }),
            false => Err(wrong()),
        }
    }
}

/// Where the server is, and how it is talked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Address without a path, `http://host:port`.
    Http(String),
    /// The same form; the scheme tells tonic that there is no TLS.
    Grpc(String),
}

/// When chats begin.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Loop {
    /// Per second.
    Open {
        rate: f64,
    },
    Closed {
        concurrency: usize,
    },
}

/// The flags, checked and completed.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    pub target: Target,
    pub model: Option<String>,
    #[serde(skip)]
    pub api_key: Option<String>,
    pub arrivals: Loop,
    /// Chats; `None`: as many as fit into `duration_seconds`.
    pub num_chats: Option<u64>,
    pub duration_seconds: Option<f64>,
    pub num_warmup: u64,
    pub mix: Mix,
    pub image_sizes: Vec<ImageSize>,
    pub images_per_chat: u32,
    pub frame_size: ImageSize,
    pub video_frames: u32,
    pub video_fps: f64,
    #[serde(serialize_with = "as_text")]
    pub prompt_length: Length,
    #[serde(serialize_with = "as_text")]
    pub output_length: Length,
    pub prefix_share: f64,
    pub prefix_length: u32,
    pub turns: u32,
    pub slo: Vec<Bound>,
    pub ignore_eos: bool,
    pub temperature: f64,
    pub extra_body: serde_json::Map<String, serde_json::Value>,
    pub timeout_seconds: f64,
    pub max_in_flight: usize,
    pub seed: u64,
}

fn as_text<S: Serializer>(length: &Length, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(length)
}

fn wrong(flag: &'static str, reason: impl Into<String>) -> Error {
    Error::Flag { flag, reason: reason.into() }
}

impl Plan {
    /// Time after which a request has failed.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout_seconds)
    }
}

impl ServeArgs {
    /// Checks the flags against each other.
    ///
    /// # Errors
    /// Names the flag.
    pub fn plan(&self) -> Result<Plan> {
        let is_positive = |value: f64| value > 0.0 && value.is_finite();
        let checks = [
            ("--rate", self.rate.is_none_or(is_positive)),
            ("--duration", self.duration.is_none_or(is_positive)),
            ("--timeout", is_positive(self.timeout)),
            ("--fps", is_positive(self.fps)),
            ("--concurrency", self.concurrency != Some(0)),
            ("--requests", self.requests != Some(0)),
            ("--images", self.images > 0),
            ("--frames", self.frames > 0),
            ("--turns", self.turns > 0),
            ("--max-in-flight", self.max_in_flight > 0),
        ];
        if let Some((flag, _)) = checks.iter().find(|(_, holds)| !holds) {
            return Err(wrong(flag, "must be more than 0"));
        }
        if !(0.0..=1.0).contains(&self.prefix_share) {
            return Err(wrong("--prefix-share", "must be in [0, 1]"));
        }
        let shares = [self.text, self.image, self.video];
        let [text, image, video] = match shares {
            [None, None, None] => [1.0, 0.0, 0.0],
            _ => shares.map(|share| share.unwrap_or(0.0)),
        };
        let mix = Mix::new(text, image, video)
            .ok_or_else(|| wrong("--text", "shares must not be negative, nor all be 0"))?;
        let extra_body = match &self.extra_body {
            None => serde_json::Map::new(),
            Some(json) => serde_json::from_str(json)
                .map_err(|error| wrong("--extra-body", format!("is not a JSON object: {error}")))?,
        };
        Ok(Plan {
            target: target(&self.url)?,
            model: self.model.clone(),
            api_key: self.api_key.clone(),
            arrivals: match self.rate {
                Some(rate) => Loop::Open { rate },
                None => Loop::Closed { concurrency: self.concurrency.unwrap_or(1) },
            },
            num_chats: match (self.requests, self.duration) {
                (None, None) => Some(100),
                (requests, _) => requests,
            },
            duration_seconds: self.duration,
            num_warmup: self.warmup,
            mix,
            image_sizes: self.image_size.clone(),
            images_per_chat: self.images,
            frame_size: self.frame_size,
            video_frames: self.frames,
            video_fps: self.fps,
            prompt_length: self.prompt_length,
            output_length: self.output_length,
            prefix_share: self.prefix_share,
            prefix_length: self.prefix_length,
            turns: self.turns,
            slo: self.slo.clone(),
            ignore_eos: !self.respect_eos,
            temperature: self.temperature,
            extra_body,
            timeout_seconds: self.timeout,
            max_in_flight: self.max_in_flight,
            seed: self.seed,
        })
    }
}

fn target(url: &str) -> Result<Target> {
    let url = url.trim_end_matches('/');
    let url = url.strip_suffix("/v1").unwrap_or(url);
    match url.split_once("://") {
        Some(("http", _)) => Ok(Target::Http(url.to_owned())),
        Some(("grpc", address)) => Ok(Target::Grpc(format!("http://{address}"))),
        _ => Err(wrong("--url", "must begin with http:// or grpc://; TLS is not spoken")),
    }
}

#[cfg(test)]
pub mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn parse(flags: &[&str]) -> Result<Plan> {
        let all = ["test", "--url", "http://127.0.0.1:8000/v1/"].iter().chain(flags);
        Flags::try_parse_from(all).expect("flags that parse").serve.plan()
    }

    /// A plan from flags that are right.
    pub fn plan(flags: &[&str]) -> Plan {
        parse(flags).expect("a plan")
    }

    #[test]
    fn flags_become_a_plan() {
        let plain = plan(&[]);
        assert_eq!(plain.target, Target::Http("http://127.0.0.1:8000".into()));
        assert_eq!((plain.num_chats, plain.arrivals), (Some(100), Loop::Closed { concurrency: 1 }));
        assert_eq!(plain.mix.text, 1.0);
        let full = plan(&[
            "--rate",
            "2.5",
            "--duration",
            "10",
            "--image",
            "1",
            "--slo",
            "ttft=500ms,e2e=2s",
            "--extra-body",
            r#"{"top_k": 5}"#,
        ]);
        assert_eq!((full.num_chats, full.arrivals), (None, Loop::Open { rate: 2.5 }));
        assert_eq!(full.mix.image, 1.0);
        assert_eq!(full.slo[1], Bound { latency: Latency::E2e, ms: 2000.0 });
        assert_eq!(full.extra_body["top_k"], 5);
        assert_eq!(
            target("grpc://host:1").expect("a target"),
            Target::Grpc("http://host:1".into())
        );
    }

    #[test]
    fn contradictions_are_refused_by_flag() {
        let cases: [(&str, &[&str]); 6] = [
            ("--rate", &["--rate", "0"]),
            ("--concurrency", &["--concurrency", "0"]),
            ("--prefix-share", &["--prefix-share", "1.5"]),
            ("--text", &["--text", "0"]),
            ("--extra-body", &["--extra-body", "[1]"]),
            ("--turns", &["--turns", "0"]),
        ];
        for (flag, flags) in cases {
            let error = parse(flags).expect_err(flag);
            assert!(error.to_string().starts_with(flag), "{error}");
        }
        assert!(target("https://host").is_err());
        for wrong in ["ttft", "ttft=5", "ttft=-1ms", "speed=5ms", "e2e=xs"] {
            assert!(wrong.parse::<Bound>().is_err(), "{wrong}");
        }
    }
}
