//! The whole router over HTTP and gRPC, against a scripted decoder and encoder and an embedded store.

mod chat;
mod client;
mod cluster;
mod failures;
mod grpc;
mod limits;
mod media;
mod options;
mod refusals;
mod tools;
