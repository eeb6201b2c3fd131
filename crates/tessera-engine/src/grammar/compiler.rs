//! Grammars are compiled on one thread of their own, and kept by content.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory};
use tessera_types::Grammar;

use super::{GrammarError, GrammarVocabulary, bounds, reason};

/// Grammars that wait for the thread; one more is refused as busy.
const QUEUE_CAPACITY: usize = 64;
/// Compiled grammars that are kept, and refusals of grammars that are none. The least recently used goes.
const MAX_KEPT: usize = 64;
/// Deeply nested text is parsed by recursion.
const STACK_BYTES: usize = 64 << 20;
/// White space that may stand in one place of a JSON value.
const WHITE_SPACE: &str = r"[ \n\r\t]{1,32}";

/// A grammar ready to be followed by any number of sequences.
pub struct Compiled {
    /// At the start of the output. Copies share its lexer, which learns as they go.
    start: Matcher,
}

impl Compiled {
    pub(super) fn start(&self) -> Matcher {
        self.start.clone()
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

/// What became of a grammar.
pub type Outcome = Result<Arc<Compiled>, GrammarError>;

/// Bounds on what one grammar may cost: about 20 ms to build its automata, about 15 ms and a few megabytes for
/// the costliest mask, about 50 MB of lexer states.
pub fn limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_items_in_row: 2_000,
        max_lexer_states: 25_000,
        max_grammar_size: 250_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// A grammar on its way back from the thread.
pub struct Finished {
    grammar: Arc<Grammar>,
    outcome: Outcome,
    spent: Duration,
}

/// The compiler's end on the engine thread: asks for grammars and keeps what it got.
pub struct GrammarCompiler {
    jobs: Option<Sender<Arc<Grammar>>>,
    finished: Receiver<Finished>,
    thread: Option<JoinHandle<()>>,
    kept: Kept,
    spent: Duration,
    num_compiled: u64,
}

impl GrammarCompiler {
    /// Starts the thread, which prepares the vocabulary first (a second for 150,000 tokens).
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(vocabulary: GrammarVocabulary) -> std::io::Result<Self> {
        let (jobs, inbox) = bounded::<Arc<Grammar>>(QUEUE_CAPACITY);
        // One more than can be under way, so that the thread never waits for the engine.
        let (sender, finished) = bounded(QUEUE_CAPACITY + 2);
        let body = move || {
            let workshop = Workshop::new(vocabulary);
            for grammar in inbox {
                let started = Instant::now();
                let outcome = workshop.compile(&grammar);
                let spent = started.elapsed();
                if sender.send(Finished { grammar, outcome, spent }).is_err() {
                    return;
                }
            }
        };
        let builder = std::thread::Builder::new().name("grammars".to_owned());
        let thread = builder.stack_size(STACK_BYTES).spawn(body)?;
        Ok(Self {
            jobs: Some(jobs),
            finished,
            thread: Some(thread),
            kept: Kept::default(),
            spent: Duration::ZERO,
            num_compiled: 0,
        })
    }

    /// What became of a grammar, if that is known already.
    pub fn get(&mut self, grammar: &Grammar) -> Option<Outcome> {
        self.kept.get(grammar)
    }

    /// Asks for a grammar; [`GrammarCompiler::poll`] brings it.
    ///
    /// # Errors
    /// [`GrammarError::Busy`]; [`GrammarError::Unavailable`] if the thread has ended.
    pub fn compile(&mut self, grammar: Arc<Grammar>) -> Result<(), GrammarError> {
        let jobs = self.jobs.as_ref().ok_or(GrammarError::Unavailable)?;
        jobs.try_send(grammar).map_err(|error| match error {
            TrySendError::Full(_) => GrammarError::Busy,
            TrySendError::Disconnected(_) => GrammarError::Unavailable,
        })
    }

    /// The next grammar that has become ready.
    pub fn poll(&mut self) -> Option<(Arc<Grammar>, Outcome)> {
        let Finished { grammar, outcome, spent } = self.finished.try_recv().ok()?;
        self.spent += spent;
        self.num_compiled += 1;
        tracing::debug!(seconds = spent.as_secs_f64(), ok = outcome.is_ok(), "grammar compiled");
        self.kept.put(Arc::clone(&grammar), outcome.clone());
        Some((grammar, outcome))
    }

    /// Where outcomes arrive, to wait for.
    pub fn finished(&self) -> &Receiver<Finished> {
        &self.finished
    }

    /// Whether the thread has ended, and with it all hope for grammars that wait.
    pub fn is_gone(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished) && self.finished.is_empty()
    }

    /// Grammars compiled since the start, refused ones included, and the time they took.
    pub fn totals(&self) -> (u64, Duration) {
        (self.num_compiled, self.spent)
    }
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler")
            .field("kept", &self.kept.outcomes.len())
            .finish_non_exhaustive()
    }
}

impl Drop for GrammarCompiler {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Outcomes by content, least recently used first.
#[derive(Default)]
struct Kept {
    outcomes: HashMap<Arc<Grammar>, Outcome>,
    order: VecDeque<Arc<Grammar>>,
}

impl Kept {
    fn get(&mut self, grammar: &Grammar) -> Option<Outcome> {
        let outcome = self.outcomes.get(grammar)?.clone();
        if let Some(at) = self.order.iter().position(|kept| **kept == *grammar) {
            let grammar = self.order.remove(at).expect("it was found there");
            self.order.push_back(grammar);
        }
        Some(outcome)
    }

    fn put(&mut self, grammar: Arc<Grammar>, outcome: Outcome) {
        if self.outcomes.insert(Arc::clone(&grammar), outcome).is_none() {
            self.order.push_back(grammar);
        }
        while self.order.len() > MAX_KEPT {
            let oldest = self.order.pop_front().expect("the list is not empty");
            self.outcomes.remove(&oldest);
        }
    }
}

/// What the thread compiles with.
struct Workshop {
    factory: Option<ParserFactory>,
}

impl Workshop {
    fn new(vocabulary: GrammarVocabulary) -> Self {
        let started = Instant::now();
        let num_tokens = vocabulary.tokens.len();
        let factory = vocabulary.into_environment().and_then(|environment| factory(&environment));
        let seconds = started.elapsed().as_secs_f64();
        tracing::debug!(num_tokens, seconds, "vocabulary prepared for grammars");
        Self { factory }
    }

    fn compile(&self, grammar: &Grammar) -> Outcome {
        let factory = self.factory.as_ref().ok_or(GrammarError::Unavailable)?;
        let invalid = |reason| GrammarError::Invalid { reason };
        let parser = factory.create_parser(top_level(grammar)?);
        let mut start = Matcher::new(parser);
        if let Some(error) = start.get_error() {
            return Err(invalid(reason(error)));
        }
        // The first mask builds what all sequences share, and shows whether anything is allowed.
        start.compute_mask_or_eos().map_err(|error| invalid(reason(error)))?;
        Ok(Arc::new(Compiled { start }))
    }
}

fn factory(environment: &TokEnv) -> Option<ParserFactory> {
    let capabilities = InferenceCapabilities { ff_tokens: true, ..Default::default() };
    let slices = SlicedBiasComputer::general_slices();
    match ParserFactory::new(environment, capabilities, &slices) {
        Ok(mut factory) => {
            factory.quiet();
            *factory.limits_mut() = limits();
            Some(factory)
        }
        Err(error) => {
            tracing::error!(error = reason(error), "the vocabulary cannot be used for grammars");
            None
        }
    }
}

/// The grammar in the library's words.
fn top_level(grammar: &Grammar) -> Result<TopLevelGrammar, GrammarError> {
    let invalid = |reason: String| GrammarError::Invalid { reason };
    let grammar = match grammar {
        Grammar::JsonSchema(text) => {
            let mut schema = serde_json::from_str(text)
                .map_err(|error| invalid(format!("the schema is not JSON: {error}")))?;
            bounds::schema(&schema)?;
            bound_white_space(&mut schema);
            GrammarWithLexer::from_json_schema(schema)
        }
        Grammar::Regex(text) => {
            bounds::expression(text)?;
            GrammarWithLexer::from_regex(text)
        }
        Grammar::Choice(choices) => GrammarWithLexer::from_lark(choice(choices)),
        Grammar::Lark(text) => {
            bounds::lark(text)?;
            GrammarWithLexer::from_lark(text.clone())
        }
    };
    Ok(TopLevelGrammar::from_grammar(grammar))
}

/// Bounds the white space between the parts of a value, unless the schema has its own idea: a model that has
/// nothing to say would never stop writing it.
fn bound_white_space(schema: &mut serde_json::Value) {
    if let Some(schema) = schema.as_object_mut() {
        let options = || serde_json::json!({ "whitespace_pattern": WHITE_SPACE });
        schema.entry("x-guidance").or_insert_with(options);
    }
}

/// One of the strings, letter by letter: JSON's way to quote is Lark's.
fn choice(choices: &[String]) -> String {
    let quoted: Vec<String> =
        choices.iter().map(|choice| serde_json::Value::from(choice.as_str()).to_string()).collect();
    format!("start: {}", quoted.join(" | "))
}
