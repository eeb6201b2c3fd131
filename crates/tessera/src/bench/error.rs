//! Why a benchmark gave no figures.

use tessera_engine::{EngineError, RankError, SequenceError, SubmitError};
use tessera_kernels::KernelError;
use tessera_model::ModelError;

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("the model cannot be loaded")]
    Model(#[source] Box<ModelError>),
    #[error("the backend failed")]
    Kernel(#[source] Box<KernelError>),
    #[error("a rank cannot be loaded")]
    Rank(#[source] Box<RankError>),
    #[error("the engine failed")]
    Engine(#[source] Box<EngineError>),
    #[error("the engine took no command")]
    Submit(#[from] SubmitError),
    #[error("a sequence failed")]
    Sequence(#[source] Box<SequenceError>),
    #[error("the engine stopped in the middle of a run")]
    Stopped,
    #[error("{url}: {kind}: {detail}")]
    Server { url: String, kind: String, detail: String },
    #[error("a warm-up request failed: {kind}: {detail}")]
    WarmUp { kind: String, detail: String },
    #[error("a picture cannot be made")]
    Picture(#[from] image::ImageError),
    #[error("a thread cannot be started")]
    Thread(#[source] std::io::Error),
    #[error("the report cannot be written as JSON")]
    Json(#[source] serde_json::Error),
}

macro_rules! boxed {
    ($($variant:ident($error:ty)),*) => {$(
        impl From<$error> for BenchError {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        }
    )*};
}

boxed!(
    Model(ModelError),
    Kernel(KernelError),
    Rank(RankError),
    Engine(EngineError),
    Sequence(SequenceError)
);
