//! Stands in for `on_cuda` where the CUDA backend was not built.

macro_rules! cuda_tests {
    ($($test:ident),*) => {};
}
pub(crate) use cuda_tests;
