//! Faults in real processes while clients are being served: whatever dies, running requests end in typed
//! retryable errors or go on exactly, nothing stale is delivered, and the cluster serves again.

mod etcd_outage;
mod frozen;
mod gating;
mod killed_processes;
mod observed;
mod spares;
