//! What a range request asks of the keys in its range: filters, order, limit, parts.

use std::sync::Arc;

use etcd_client::proto::{PbKeyValue, PbRangeRequest, PbRangeResponse};
use etcd_client::{SortOrder, SortTarget};

/// Answers the request from the keys that stand in its range, given ascending. Leaves the header open.
pub fn read_range(request: &PbRangeRequest, mut standing: Vec<Arc<PbKeyValue>>) -> PbRangeResponse {
    let count = standing.len() as i64;
    if request.count_only {
        return PbRangeResponse { count, ..PbRangeResponse::default() };
    }
    let within =
        |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
    standing.retain(|kv| {
        within(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
            && within(kv.create_revision, request.min_create_revision, request.max_create_revision)
    });
    sort(request, &mut standing);
    let limit = usize::try_from(request.limit).unwrap_or(0);
    let more = limit > 0 && standing.len() > limit;
    if more {
        standing.truncate(limit);
    }
    let kvs = standing.iter().map(|kv| PbKeyValue {
        value: if request.keys_only { Vec::new() } else { kv.value.clone() },
        key: kv.key.clone(),
        ..**kv
    });
    PbRangeResponse { header: None, kvs: kvs.collect(), more, count }
}

fn sort(request: &PbRangeRequest, standing: &mut [Arc<PbKeyValue>]) {
    let order = request.sort_order();
    let target = request.sort_target();
    // Keys come ascending; a target other than the key sorts ascending unless told otherwise.
    if order == SortOrder::None && target == SortTarget::Key {
        return;
    }
    standing.sort_by(|a, b| match target {
        SortTarget::Key => a.key.cmp(&b.key),
        SortTarget::Version => a.version.cmp(&b.version),
        SortTarget::Create => a.create_revision.cmp(&b.create_revision),
        SortTarget::Mod => a.mod_revision.cmp(&b.mod_revision),
        SortTarget::Value => a.value.cmp(&b.value),
    });
    if order == SortOrder::Descend {
        standing.reverse();
    }
}
