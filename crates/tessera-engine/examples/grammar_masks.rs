//! Times of structured output with a real tokenizer: preparing its vocabulary, compiling a schema, and the mask
//! of every token of documents that belong to it.
//!
//! `cargo run -p tessera-engine --example grammar_masks -- path/to/tokenizer.json [end-of-sequence ids]`

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tessera_engine::GrammarVocabulary;
use tessera_engine::grammar::{Compiled, Constraint, GrammarCompiler, Outcome};
use tessera_processor::Tokenizer;
use tessera_types::{Grammar, TokenId};

/// Qwen2.5's `<|im_end|>` and `<|endoftext|>`.
const EOS_TOKEN_IDS: [TokenId; 2] = [151_645, 151_643];
const NUM_DOCUMENTS: u32 = 40;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let file = PathBuf::from(arguments.next().ok_or("the path of a tokenizer.json is missing")?);
    let mut eos_token_ids = arguments.map(|id| id.parse()).collect::<Result<Vec<TokenId>, _>>()?;
    if eos_token_ids.is_empty() {
        eos_token_ids = EOS_TOKEN_IDS.to_vec();
    }
    let tokenizer = Tokenizer::load(&file)?;
    let started = Instant::now();
    let vocabulary = GrammarVocabulary::of(Tokenizer::load(&file)?, eos_token_ids);
    let mut compiler = GrammarCompiler::start(vocabulary)?;
    compile(&mut compiler, Grammar::Choice(vec!["ready".to_owned()]))?;
    println!("{} tokens, prepared in {:?}", tokenizer.num_tokens(), started.elapsed());
    let started = Instant::now();
    let compiled = compile(&mut compiler, Grammar::JsonSchema(schema().to_string()))?;
    println!("schema compiled in {:?}", started.elapsed());
    // The first pass builds the automata that all later sequences share.
    for pass in ["first pass", "second pass"] {
        let mut times = Vec::new();
        for index in 0..NUM_DOCUMENTS {
            walk(&compiled, &tokenizer, &document(index), &mut times)?;
        }
        times.sort_unstable();
        let at = |share: usize| times[(times.len() - 1) * share / 100];
        let total: Duration = times.iter().sum();
        println!(
            "{pass}: {} masks, p50 {:?}, p90 {:?}, p99 {:?}, max {:?}, mean {:?}",
            times.len(),
            at(50),
            at(90),
            at(99),
            at(100),
            total / times.len() as u32
        );
    }
    Ok(())
}

fn compile(
    compiler: &mut GrammarCompiler,
    grammar: Grammar,
) -> Result<Arc<Compiled>, Box<dyn Error>> {
    compiler.compile(Arc::new(grammar))?;
    let outcome: Outcome = loop {
        if let Some((_, outcome)) = compiler.poll() {
            break outcome;
        }
        std::thread::sleep(Duration::from_micros(100));
    };
    Ok(outcome?)
}

/// Computes the mask before every token of a document.
fn walk(
    compiled: &Compiled,
    tokenizer: &Tokenizer,
    text: &str,
    times: &mut Vec<Duration>,
) -> Result<(), Box<dyn Error>> {
    let mut tokens = Vec::new();
    tokenizer.encode_plain(text, &mut tokens)?;
    let mut constraint = Constraint::new(compiled, &[])?;
    for token in tokens {
        let started = Instant::now();
        let mask = constraint.mask()?;
        times.push(started.elapsed());
        // Where the grammar forces text it forces its spelling too, which may cut it elsewhere.
        if !mask.allows(token) {
            return Ok(());
        }
        constraint.accept(token)?;
    }
    Ok(())
}

fn schema() -> serde_json::Value {
    json!({
        "type": "object",
        "properties": {
            "title": { "type": "string", "maxLength": 80 },
            "summary": { "type": "string" },
            "rating": { "type": "integer", "minimum": 1, "maximum": 5 },
            "price": { "type": "number" },
            "kind": { "enum": ["photo", "chart", "document", "screenshot"] },
            "objects": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "label": { "type": "string" },
                        "bbox_2d": {
                            "type": "array",
                            "items": { "type": "integer" },
                            "minItems": 4,
                            "maxItems": 4
                        },
                        "occluded": { "type": "boolean" }
                    },
                    "required": ["label", "bbox_2d", "occluded"],
                    "additionalProperties": false
                }
            }
        },
        "required": ["title", "summary", "rating", "price", "kind", "objects"],
        "additionalProperties": false
    })
}

fn document(index: u32) -> String {
    let object = |i: u32| {
        let x = index * 7 + i * 31;
        format!(
            r#"{{"label": "a red bicycle number {i}", "bbox_2d": [{x}, {}, {}, 480], "occluded": {}}}"#,
            x + 12,
            x + 140,
            i.is_multiple_of(2)
        )
    };
    let objects: Vec<String> = (0..3).map(object).collect();
    format!(
        concat!(
            r#"{{"title": "A street in the rain, {}", "summary": "Two people walk past a café; the sign says "#,
            r#"\"open\". Bicycles lean on the wall, and the light of the shop windows falls on wet stones.", "#,
            r#""rating": {}, "price": {}.50, "kind": "photo", "objects": [{}]}}"#
        ),
        index,
        index % 5 + 1,
        index * 3,
        objects.join(", ")
    )
}
