//! The canary: a fixed prompt through all ranks. As the first act of an epoch its tokens must equal those
//! that the first group with these weights and numerics wrote to the store; while idle, those of the first.

use tessera_cluster::{CanaryRecord, Record};
use tessera_engine::EngineHandle;
use tessera_engine::error::chain;
use tessera_membership::{Store, StoreError};
use tessera_types::TokenId;
use tokio::sync::oneshot;

/// Runs the canary once.
///
/// # Errors
/// It was lost with its epoch, or the engine takes nothing.
pub(crate) async fn run(engine: &EngineHandle) -> Result<Vec<TokenId>, String> {
    let (reply, answer) = oneshot::channel();
    // Whoever stopped waiting needs no answer.
    let reply = Box::new(move |result| drop(reply.send(result)));
    engine.canary(reply).map_err(|error| error.to_string())?;
    match answer.await {
        Ok(result) => result.map_err(|error| chain(&error)),
        Err(_) => Err("the engine has stopped".to_owned()),
    }
}

/// Warms the ranks up and fits the token budget; only a process's first epoch takes time for it.
///
/// # Errors
/// A step failed, and the epoch with it.
async fn warm_up(engine: &EngineHandle) -> Result<(), String> {
    let (reply, answer) = oneshot::channel();
    // Whoever stopped waiting needs no answer.
    let reply = Box::new(move |result| drop(reply.send(result)));
    engine.warm_up(reply).map_err(|error| error.to_string())?;
    match answer.await {
        Ok(result) => result.map(drop).map_err(|error| chain(&error)),
        Err(_) => Err("the engine has stopped".to_owned()),
    }
}

/// Warms up, then runs the canary and holds it against the stored tokens, or stores them if none are.
///
/// # Errors
/// It failed, its tokens differ, or the store does not answer.
pub(crate) async fn first(
    engine: EngineHandle,
    store: Store,
    key: String,
) -> Result<Vec<TokenId>, String> {
    warm_up(&engine).await?;
    let token_ids = run(&engine).await?;
    let record = CanaryRecord { token_ids };
    let stored = match store.create(&key, record.to_bytes(), None).await {
        Ok(_) => return Ok(record.token_ids),
        Err(StoreError::CompareFailed { current: Some(current), .. }) => current.value,
        Err(error) => return Err(chain(&error)),
    };
    let stored = CanaryRecord::from_bytes(&stored).map_err(|error| chain(&error))?;
    match stored == record {
        true => Ok(record.token_ids),
        false => Err(format!(
            "it gave tokens {:?}, with these weights and numerics it must give {:?}",
            record.token_ids, stored.token_ids
        )),
    }
}
