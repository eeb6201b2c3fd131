//! What Tessera relies on in its store. One suite, run against the embedded store and against a real
//! etcd (`/usr/bin/etcd`, Debian's package `etcd-server`), so that neither can drift from the other.
//!
//! Time limits here only end a run that hangs; no test asserts how fast something is.

#![allow(clippy::unwrap_used)] // Test code: an unwrap is an assertion.

mod backend;
mod kv;
mod leases;
mod proxy;
mod registrations;
mod watches;

use std::time::Duration;

use backend::Backend;

/// A scenario that takes longer hangs.
const SCENARIO_TIMEOUT: Duration = Duration::from_secs(60);

fn run<F: Future<Output = ()>>(
    backend: impl Future<Output = Backend>,
    scenario: impl FnOnce(Backend) -> F,
) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let backend = backend.await;
        let scenario = tokio::time::timeout(SCENARIO_TIMEOUT, scenario(backend));
        scenario.await.expect("the scenario hangs");
    });
}

macro_rules! contract {
    ($($module:ident :: $name:ident),* $(,)?) => {
        mod embedded {
            $(
                #[test]
                fn $name() {
                    crate::run(crate::Backend::embedded(), crate::$module::$name);
                }
            )*
        }

        mod etcd {
            $(
                #[test]
                fn $name() {
                    crate::run(crate::Backend::etcd(), crate::$module::$name);
                }
            )*
        }
    };
}

contract!(
    kv::a_key_is_written_read_and_deleted,
    kv::a_prefix_is_listed_whole_at_one_revision,
    kv::a_prefix_with_large_values_is_listed_in_pieces,
    kv::every_comparison_holds_and_fails_as_it_says,
    kv::a_transaction_is_one_revision_or_nothing,
    kv::malformed_and_oversized_requests_are_refused,
    kv::one_of_twenty_concurrent_creates_wins,
    kv::concurrent_replacements_lose_no_update,
    kv::a_dead_endpoint_is_passed_over,
    kv::a_store_that_is_down_is_unavailable_and_not_a_hang,
    leases::an_expired_lease_takes_its_keys,
    leases::a_kept_lease_stays,
    leases::a_revoked_lease_is_gone_for_certain,
    watches::changes_arrive_in_order_with_whole_transactions,
    watches::a_watch_that_was_cut_off_misses_and_repeats_nothing,
    watches::after_a_compaction_the_view_is_resynced_with_deletes,
    watches::a_silent_connection_is_noticed_and_replaced,
    watches::a_slow_consumer_gets_everything_in_order,
    watches::a_large_backlog_arrives_whole,
    watches::an_expiring_lease_is_one_change,
    registrations::a_member_stands_while_registered_and_is_gone_after_revoke,
    registrations::a_lost_lease_is_won_back_with_all_keys,
    registrations::a_foreign_member_key_fences,
    registrations::a_foreign_further_key_is_a_conflict,
    registrations::a_restart_of_the_store_is_unknown_and_never_a_loss,
    registrations::a_member_that_stops_is_forgotten_after_its_ttl,
);
