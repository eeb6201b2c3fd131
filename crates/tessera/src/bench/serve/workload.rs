//! What is asked: chats of text, images and videos, a function of the seed alone.

use std::fmt::Write;

use bytes::Bytes;
use serde::Serialize;

use super::args::Plan;
use super::pictures;
use crate::bench::error::BenchError;
use crate::bench::random::Random;

/// Words of prompts. Common ones, of which most tokenizers make one token each.
const WORDS: [&str; 48] = [
    "time", "year", "people", "way", "day", "man", "thing", "world", "life", "hand", "part",
    "child", "eye", "place", "work", "week", "case", "point", "company", "number", "group",
    "problem", "fact", "be", "have", "do", "say", "get", "make", "go", "know", "take", "see",
    "come", "think", "look", "want", "give", "use", "find", "tell", "ask", "seem", "feel", "try",
    "leave", "call", "good",
];

/// What a chat is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Text,
    Image,
    Video,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Text, Self::Image, Self::Video];

    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Image => "image",
            Self::Video => "video",
        }
    }
}

/// Media of a user's first message.
#[derive(Debug, Clone)]
pub enum Media {
    None,
    /// JPEG files.
    Images(Vec<Bytes>),
    /// JPEG files of the frames.
    Video {
        frames: Vec<Bytes>,
        fps: f64,
    },
}

/// One conversation: a question, and after each answer the next one.
#[derive(Debug, Clone)]
pub struct Chat {
    pub kind: Kind,
    /// System message, shared by all chats that have one.
    pub system: Option<String>,
    pub media: Media,
    pub turns: Vec<Question>,
}

/// What a user says in one turn.
#[derive(Debug, Clone)]
pub struct Question {
    pub text: String,
    pub max_tokens: u32,
}

impl Chat {
    /// The chat number `index` of a plan; warm-up chats have numbers of their own.
    ///
    /// # Errors
    /// A picture that cannot be made.
    pub fn make(plan: &Plan, index: u64) -> Result<Self, BenchError> {
        let mut random =
            Random::new(Random::new(plan.seed ^ index.wrapping_mul(0x9E37_79B9)).next());
        let kind = plan.mix.pick(random.uniform());
        let has_prefix = random.uniform() < plan.prefix_share;
        let system = has_prefix.then(|| words(&mut Random::new(plan.seed), plan.prefix_length));
        let turns = (0..plan.turns).map(|_| {
            let num_words = plan.prompt_length.draw(&mut random);
            let text = words(&mut random, num_words);
            Question { text, max_tokens: plan.output_length.draw(&mut random) }
        });
        let turns = turns.collect();
        Ok(Self { kind, system, media: media(plan, kind, &mut random)?, turns })
    }
}

fn media(plan: &Plan, kind: Kind, random: &mut Random) -> Result<Media, BenchError> {
    let picture = |random: &mut Random| {
        let sizes = &plan.image_sizes;
        let size = sizes[random.between(0, sizes.len() as u32 - 1) as usize];
        Ok::<_, BenchError>(pictures::jpeg(size.width, size.height, random.next())?)
    };
    match kind {
        Kind::Text => Ok(Media::None),
        Kind::Image => {
            let images = (0..plan.images_per_chat).map(|_| picture(random));
            Ok(Media::Images(images.collect::<Result<_, _>>()?))
        }
        Kind::Video => {
            let size = plan.frame_size;
            let frame = |_| pictures::jpeg(size.width, size.height, random.next());
            let frames = (0..plan.video_frames).map(frame).collect::<Result<_, _>>()?;
            Ok(Media::Video { frames, fps: plan.video_fps })
        }
    }
}

/// That many words.
fn words(random: &mut Random, number: u32) -> String {
    let mut text = String::new();
    for index in 0..number {
        let word = WORDS[random.between(0, WORDS.len() as u32 - 1) as usize];
        let space = if index == 0 { "" } else { " " };
        write!(text, "{space}{word}").expect("strings take what is written");
    }
    text
}

/// Shares of the kinds; they sum to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mix {
    pub text: f64,
    pub image: f64,
    pub video: f64,
}

impl Mix {
    /// Shares in the given proportion. `None`: nothing is asked for, or less than nothing.
    pub fn new(text: f64, image: f64, video: f64) -> Option<Self> {
        let sum = text + image + video;
        let is_valid = [text, image, video].iter().all(|share| *share >= 0.0) && sum > 0.0;
        (is_valid && sum.is_finite()).then(|| Self {
            text: text / sum,
            image: image / sum,
            video: video / sum,
        })
    }

    /// The kind at a place in [0, 1).
    pub fn pick(&self, place: f64) -> Kind {
        match place {
            _ if place < self.text => Kind::Text,
            _ if place < self.text + self.image || self.video == 0.0 => Kind::Image,
            _ => Kind::Video,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::serve::args::tests::plan;

    #[test]
    fn chats_follow_the_mix_and_the_seed() {
        let plan = plan(&[
            "--text",
            "0.5",
            "--image",
            "0.25",
            "--video",
            "0.25",
            "--image-size",
            "28x28",
            "--frame-size",
            "28x28",
        ]);
        let chats: Vec<Chat> =
            (0..400).map(|index| Chat::make(&plan, index).expect("a chat")).collect();
        let count = |kind| chats.iter().filter(|chat| chat.kind == kind).count();
        assert!((170..230).contains(&count(Kind::Text)), "{}", count(Kind::Text));
        assert!((75..125).contains(&count(Kind::Image)), "{}", count(Kind::Image));
        assert!((75..125).contains(&count(Kind::Video)), "{}", count(Kind::Video));
        for (index, chat) in chats.iter().enumerate() {
            let again = Chat::make(&plan, index as u64).expect("a chat");
            assert_eq!(again.turns[0].text, chat.turns[0].text);
        }
        assert_ne!(chats[0].turns[0].text, chats[1].turns[0].text);
    }

    #[test]
    fn prefixes_are_shared_by_their_share() {
        let plan = plan(&[
            "--prefix-share",
            "0.5",
            "--prefix-length",
            "9",
            "--turns",
            "2",
            "--prompt-length",
            "5",
        ]);
        let chats: Vec<Chat> =
            (0..200).map(|index| Chat::make(&plan, index).expect("a chat")).collect();
        let prefixes: Vec<&String> = chats.iter().filter_map(|chat| chat.system.as_ref()).collect();
        assert!((70..130).contains(&prefixes.len()), "{}", prefixes.len());
        assert!(prefixes.iter().all(|prefix| *prefix == prefixes[0]));
        assert_eq!(prefixes[0].split(' ').count(), 9);
        assert!(chats.iter().all(|chat| chat.turns.len() == 2));
        assert_eq!(chats[0].turns[1].text.split(' ').count(), 5);
    }

    #[test]
    fn a_mix_is_a_proportion() {
        let mix = Mix::new(1.0, 3.0, 0.0).expect("a mix");
        assert_eq!((mix.text, mix.image), (0.25, 0.75));
        assert_eq!(mix.pick(0.999_999_999), Kind::Image);
        assert!(Mix::new(0.0, 0.0, 0.0).is_none());
        assert!(Mix::new(-1.0, 2.0, 0.0).is_none());
        assert!(Mix::new(f64::NAN, 2.0, 0.0).is_none());
    }
}
