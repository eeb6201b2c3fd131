//! The ranks of this process behind one face: an engine on the leader's process, ranks fed by a plan stream
//! on the others.

use std::sync::Arc;

use tessera_collective::{AbortHandle, Communicator};
use tessera_engine::error::chain;
use tessera_engine::{EngineHandle, EngineThread, EpochStart, RankProgress};
use tessera_types::Epoch;
use tokio::sync::oneshot;

use crate::following::{Ranks, lock};
use crate::leading::{LeaderLink, Plans};

/// See the module documentation. Cheap to clone.
#[derive(Clone)]
pub(crate) enum Worker {
    Leader { engine: EngineHandle, progress: Vec<RankProgress> },
    Follower { ranks: Ranks },
}

/// The engine's thread. Dropping it stops the engine and waits for it, whoever else holds a handle.
pub(crate) struct RunningEngine {
    engine: EngineHandle,
    thread: Option<EngineThread>,
}

impl RunningEngine {
    pub fn new(engine: EngineHandle, thread: EngineThread) -> Self {
        Self { engine, thread: Some(thread) }
    }

    /// Stops the engine and waits. `false`: its thread panicked.
    pub fn stop(mut self) -> bool {
        self.engine.shutdown();
        self.thread.take().is_none_or(EngineThread::join)
    }
}

impl Drop for RunningEngine {
    fn drop(&mut self) {
        self.engine.shutdown();
    }
}

/// What the ranks need to join an epoch.
pub(crate) struct Begin {
    pub epoch: Epoch,
    pub num_blocks: u32,
    pub abort: AbortHandle,
    pub communicators: Vec<Communicator>,
    /// On the leader.
    pub link: Option<Arc<LeaderLink>>,
}

impl Worker {
    /// Joins an epoch on all local ranks. After an error the ranks have left it again.
    ///
    /// # Errors
    /// Why they could not join, as text for the group's other members.
    pub async fn begin(&self, begin: Begin) -> Result<(), String> {
        let Begin { epoch, num_blocks, abort, communicators, link } = begin;
        match self {
            Self::Leader { engine, .. } => {
                let plans = link.map(|link| Box::new(Plans(link)) as Box<_>);
                let start = EpochStart { epoch, num_blocks, abort, communicators, plans };
                let (reply, answer) = oneshot::channel();
                // The lifecycle may have given up waiting; then it needs no answer.
                let reply = Box::new(move |result| drop(reply.send(result)));
                engine.begin_epoch(start, reply).map_err(|error| error.to_string())?;
                match answer.await {
                    Ok(result) => result.map_err(|error| chain(&error)),
                    Err(_) => Err("the engine has stopped".to_owned()),
                }
            }
            Self::Follower { ranks } => {
                let ranks = Arc::clone(ranks);
                let join = move || {
                    let mut ranks = lock(&ranks);
                    let begun = ranks.begin_epoch(epoch, num_blocks, abort, communicators);
                    begun.map_err(|error| {
                        let detail = chain(&error);
                        match ranks.end_epoch(&detail) {
                            Ok(()) => detail,
                            Err(error) => chain(&error),
                        }
                    })
                };
                let joined = tokio::task::spawn_blocking(join).await;
                joined.unwrap_or_else(|_| Err("a rank panicked".to_owned()))
            }
        }
    }
}
