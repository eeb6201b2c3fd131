//! Stop strings over text that arrives in pieces. The text ends before the stop string that is complete
//! first (the longest, if several are complete at once); what may begin one is held back until it is
//! decided. The result does not depend on where the pieces are cut.

use std::collections::VecDeque;

use crate::error::ProcessorError;

/// Most stop strings of a request.
pub const MAX_STOPS: usize = 16;
/// Longest stop string.
pub const MAX_STOP_BYTES: usize = 1024;

/// What became certain with one call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopProgress {
    /// Text to give out.
    pub text: String,
    /// Tokens, in order and beyond those of earlier calls, that belong to the text given out: their text
    /// begins before its end. Those never reported here are dropped from reply, log probabilities and
    /// usage.
    pub num_tokens: usize,
    /// Index of the stop string that ended the text. Set once; nothing follows.
    pub matched: Option<usize>,
}

/// Watches the text of one choice.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// Tokens before which no stop string counts.
    min_tokens: usize,
    num_tokens: usize,
    /// Text that arrived and was not given out.
    held: String,
    /// Bytes given out so far.
    released: usize,
    /// Where the texts of tokens not yet reported begin, in bytes from the start of all text.
    token_starts: VecDeque<usize>,
    matched: Option<usize>,
}

/// One stop string as a Knuth-Morris-Pratt automaton.
#[derive(Debug, Clone)]
struct Stop {
    bytes: Vec<u8>,
    /// Length of the longest proper border of each prefix.
    border: Vec<usize>,
    /// Length of the prefix that the text seen so far ends with.
    state: usize,
}

impl Stop {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut border = vec![0; bytes.len()];
        let mut length = 0;
        for i in 1..bytes.len() {
            while length > 0 && bytes[i] != bytes[length] {
                length = border[length - 1];
            }
            length += usize::from(bytes[i] == bytes[length]);
            border[i] = length;
        }
        Self { bytes, border, state: 0 }
    }

    /// Takes one byte; true when the stop string is complete.
    fn advance(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.bytes[self.state] != byte {
            self.state = self.border[self.state - 1];
        }
        self.state += usize::from(self.bytes[self.state] == byte);
        self.state == self.bytes.len()
    }
}

impl StopMatcher {
    /// A matcher that heeds stop strings from the text of token `min_tokens` (counted from 0) on.
    ///
    /// # Errors
    /// Too many stop strings, an empty one, or one that is too long.
    pub fn new(stops: &[String], min_tokens: usize) -> Result<Self, ProcessorError> {
        if stops.len() > MAX_STOPS {
            return Err(ProcessorError::TooManyStops { got: stops.len(), limit: MAX_STOPS });
        }
        if let Some(stop) = stops.iter().find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            return Err(ProcessorError::StopLength { got: stop.len(), limit: MAX_STOP_BYTES });
        }
        Ok(Self {
            stops: stops.iter().map(|stop| Stop::new(stop)).collect(),
            min_tokens,
            num_tokens: 0,
            held: String::new(),
            released: 0,
            token_starts: VecDeque::new(),
            matched: None,
        })
    }

    /// Takes the text that one token completed (often none, see [`crate::Detokenizer`]). After a match
    /// everything is dropped.
    pub fn push(&mut self, text: &str) -> StopProgress {
        if self.matched.is_some() {
            return StopProgress::default();
        }
        if self.stops.is_empty() {
            return StopProgress { text: text.to_owned(), num_tokens: 1, matched: None };
        }
        self.token_starts.push_back(self.released + self.held.len());
        self.num_tokens += 1;
        let heed = self.num_tokens > self.min_tokens;
        let matched = if heed { self.scan(text) } else { None };
        self.held.push_str(text);
        if let Some(progress) = matched.map(|(stop, end)| self.cut(stop, end, text.len())) {
            return progress;
        }
        let undecided = self.stops.iter().map(|stop| stop.state).max().unwrap_or(0);
        let decided = self.held.len() - undecided;
        self.release(decided)
    }

    /// Ends the text with what the detokenizer had left. All tokens are reported unless a stop string is
    /// complete after all.
    pub fn finish(&mut self, text: &str) -> StopProgress {
        if self.matched.is_some() {
            return StopProgress::default();
        }
        let matched = self.scan(text);
        self.held.push_str(text);
        if let Some((stop, end)) = matched {
            return self.cut(stop, end, text.len());
        }
        let mut progress = self.release(self.held.len());
        progress.num_tokens += self.token_starts.len();
        self.token_starts.clear();
        progress
    }

    /// Index of the first complete stop string and where in `text` it ends.
    fn scan(&mut self, text: &str) -> Option<(usize, usize)> {
        for (i, byte) in text.bytes().enumerate() {
            let mut complete: Option<usize> = None;
            for (s, stop) in self.stops.iter_mut().enumerate() {
                // The longest wins; of equal ones the first given.
                if stop.advance(byte) && complete.is_none_or(|best| stop.bytes.len() > best) {
                    complete = Some(stop.bytes.len());
                    self.matched = Some(s);
                }
            }
            if let (Some(_), Some(stop)) = (complete, self.matched) {
                return Some((stop, i + 1));
            }
        }
        None
    }

    /// Drops the stop string, which ends `end` bytes into the last `last` bytes held, and what follows.
    fn cut(&mut self, stop: usize, end: usize, last: usize) -> StopProgress {
        let kept = self.held.len() - last + end - self.stops[stop].bytes.len();
        self.held.truncate(kept);
        let progress = self.release(kept);
        self.token_starts.clear();
        StopProgress { matched: Some(stop), ..progress }
    }

    /// Gives out the first `length` bytes held and the tokens that begin in them.
    fn release(&mut self, length: usize) -> StopProgress {
        let text: String = self.held.drain(..length).collect();
        self.released += length;
        let num_tokens = self.token_starts.partition_point(|&start| start < self.released);
        self.token_starts.drain(..num_tokens);
        StopProgress { text, num_tokens, matched: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        StopMatcher::new(&stops, 0).expect("valid stop strings")
    }

    /// All that came out of a run: text, tokens, match.
    fn run(mut matcher: StopMatcher, pieces: &[&str]) -> (String, usize, Option<usize>) {
        let mut out = (String::new(), 0, None);
        let steps: Vec<StopProgress> = pieces.iter().map(|piece| matcher.push(piece)).collect();
        for step in steps.into_iter().chain([matcher.finish("")]) {
            out.0.push_str(&step.text);
            out.1 += step.num_tokens;
            out.2 = out.2.or(step.matched);
        }
        out
    }

    #[test]
    fn a_possible_beginning_is_held_back_until_decided() {
        let mut matcher = matcher(&["STOP"]);
        assert_eq!(matcher.push("go ST").text, "go ");
        assert_eq!(matcher.push("O").text, "");
        assert_eq!(matcher.push("RM").text, "STORM");
        assert_eq!(
            matcher.push(" S"),
            StopProgress { text: " ".into(), num_tokens: 1, matched: None }
        );
        let end = matcher.push("TOP and more");
        assert_eq!(end, StopProgress { text: String::new(), num_tokens: 0, matched: Some(0) });
        assert_eq!(matcher.push("x"), StopProgress::default());
        assert_eq!(matcher.finish("x"), StopProgress::default());
    }

    #[test]
    fn tokens_belong_to_the_text_they_begin_in() {
        // "Hel" | "lo ST" | "OP!": the second begins before the cut, the third does not.
        assert_eq!(
            run(matcher(&["STOP"]), &["Hel", "lo ST", "OP!"]),
            ("Hello ".into(), 2, Some(0))
        );
        // Two tokens that make one character together.
        assert_eq!(run(matcher(&["x"]), &["a", "", "é", "x"]), ("aé".into(), 3, Some(0)));
        assert_eq!(run(matcher(&["é"]), &["a", "", "é", "x"]), ("a".into(), 1, Some(0)));
        assert_eq!(run(matcher(&["a"]), &["a"]), (String::new(), 0, Some(0)));
        // Without a match all count, also those without text at the end.
        assert_eq!(run(matcher(&["zz"]), &["a", "", "z", ""]), ("az".into(), 4, None));
        assert_eq!(run(matcher(&[]), &["a", "", "z", ""]), ("az".into(), 4, None));
    }

    #[test]
    fn the_first_complete_string_wins_and_the_longest_of_those() {
        assert_eq!(run(matcher(&["abcd", "bc"]), &["xabcd"]), ("xa".into(), 1, Some(1)));
        assert_eq!(run(matcher(&["d", "bcd"]), &["abcd"]), ("a".into(), 1, Some(1)));
        assert_eq!(run(matcher(&["aab"]), &["aaa", "ab"]), ("aa".into(), 1, Some(0)));
        assert_eq!(run(matcher(&["d", "d"]), &["abcd"]), ("abc".into(), 1, Some(0)));
    }

    #[test]
    fn early_tokens_are_not_searched() {
        let stops = ["b".to_owned()];
        let matcher = StopMatcher::new(&stops, 2).expect("valid stop strings");
        assert_eq!(run(matcher, &["ab", "b", "cb", "d"]), ("abbc".into(), 3, Some(0)));
    }

    #[test]
    fn what_the_detokenizer_had_left_is_searched_too() {
        let mut matcher = matcher(&["a\u{fffd}"]);
        assert_eq!(matcher.push("xa").text, "x");
        assert_eq!(matcher.push("").text, "");
        let end = matcher.finish("\u{fffd}");
        assert_eq!((end.text.as_str(), end.num_tokens, end.matched), ("", 0, Some(0)));
    }

    #[test]
    fn bad_stop_strings_are_refused() {
        for stops in [vec![String::new()], vec!["a".repeat(1025)], vec!["a".to_owned(); 17]] {
            assert_eq!(StopMatcher::new(&stops, 0).expect_err("refused").param(), "stop");
        }
    }

    /// The rule itself: the cut and the stop string, by looking at the whole text.
    fn expected(text: &str, stops: &[String]) -> (String, Option<usize>) {
        for end in 0..=text.len() {
            let complete = |stop: &String| text.as_bytes()[..end].ends_with(stop.as_bytes());
            let longest = stops.iter().filter(|stop| complete(stop)).map(String::len).max();
            if let Some(longest) = longest {
                let index = stops.iter().position(|stop| stop.len() == longest && complete(stop));
                return (text[..end - longest].to_owned(), index);
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn any_cut_into_pieces_gives_the_same_text(
            text in "[abé]{0,24}", stops in proptest::collection::vec("[abé]{1,4}", 0..4),
            cuts in proptest::collection::vec(0usize..24, 0..6),
        ) {
            let characters: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(characters.len())).collect();
            cuts.extend([0, characters.len()]);
            cuts.sort_unstable();
            let pieces: Vec<String> =
                cuts.windows(2).map(|pair| characters[pair[0]..pair[1]].iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();

            let matcher = StopMatcher::new(&stops, 0).expect("valid stop strings");
            let (out, num_tokens, matched) = run(matcher, &pieces);
            let (wanted, stop) = expected(&text, &stops);
            prop_assert_eq!(&out, &wanted);
            prop_assert_eq!(matched, stop);
            let mut begins = 0;
            let kept = pieces.iter().filter(|piece| {
                begins += piece.len();
                begins - piece.len() < wanted.len()
            });
            let kept = if stop.is_some() { kept.count() } else { pieces.len() };
            prop_assert_eq!(num_tokens, kept);
        }
    }
}
