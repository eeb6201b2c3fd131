//! Captured steps, by shape.

use std::collections::HashMap;

use super::graph_capture::Graph;
use super::kv::KvBounds;
use crate::backend::GraphKey;

/// Steps of more shapes than this run eagerly. A graph of 80 layers takes a few megabytes of the device.
const MAX_GRAPHS: usize = 128;

/// What is known of the steps of one shape.
#[derive(Debug)]
enum Known {
    /// One has run, so that all that is made at first use has been made.
    Warm,
    Captured(CapturedStep),
}

/// A captured step, with what its operations checked on the host when they were captured.
#[derive(Debug)]
pub(super) struct CapturedStep {
    pub(super) graph: Graph,
    pub(super) checks: StepChecks,
}

/// What the operations of a step ask of its inputs before they run.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StepChecks {
    /// Tokens are embedded.
    pub(super) embeds: bool,
    /// Rows of the slot with visual rows, where rows are merged.
    pub(super) visual_rows: Option<u32>,
    /// The cache that is written and read.
    pub(super) kv: Option<KvBounds>,
}

/// What to do with a step.
#[derive(Debug)]
pub(super) enum Course<'a> {
    Eager,
    Capture,
    Replay(&'a CapturedStep),
}

/// All captured steps of an epoch.
#[derive(Debug, Default)]
pub(super) struct Graphs(HashMap<GraphKey, Known>);

impl Graphs {
    /// The first step of a shape runs eagerly, the second is captured, later ones are replayed.
    pub(super) fn course(&mut self, key: &GraphKey) -> Course<'_> {
        if !self.0.contains_key(key) {
            if self.0.len() < MAX_GRAPHS {
                self.0.insert(*key, Known::Warm);
            }
            return Course::Eager;
        }
        match self.0.get(key) {
            Some(Known::Captured(step)) => Course::Replay(step),
            _ => Course::Capture,
        }
    }

    pub(super) fn insert(&mut self, key: GraphKey, step: CapturedStep) {
        self.0.insert(key, Known::Captured(step));
    }

    /// Forgets all: addresses or peers are about to change.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
