//! Comparisons of a transaction, as etcd evaluates them.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use etcd_client::CompareOp;
use etcd_client::proto::{PbCompare, PbCompareTarget, PbKeyValue, PbTargetUnion};

use super::range::KeyRange;
use super::refusal::Refusal;

/// Whether the comparison holds for all keys of its range. A range without keys is compared as a key
/// that does not exist: all its numbers are zero, and no comparison of its value holds.
pub fn holds(
    compare: &PbCompare,
    keys: &BTreeMap<Vec<u8>, Arc<PbKeyValue>>,
) -> Result<bool, Refusal> {
    let op = CompareOp::try_from(compare.result)
        .map_err(|_| Refusal::Malformed("an unknown comparison"))?;
    let target = PbCompareTarget::try_from(compare.target)
        .map_err(|_| Refusal::Malformed("an unknown comparison target"))?;
    let union = compare.target_union.as_ref();
    let range = KeyRange::new(&compare.key, &compare.range_end);
    let mut standing = keys.range::<[u8], _>(range.bounds()).peekable();
    if standing.peek().is_none() {
        let absent = PbKeyValue::default();
        return Ok(target != PbCompareTarget::Value && fits(op, order(target, &absent, union)));
    }
    Ok(standing.all(|(_, kv)| fits(op, order(target, kv, union))))
}

/// How what stands compares to what the request names; a request that names nothing means zero.
fn order(target: PbCompareTarget, kv: &PbKeyValue, union: Option<&PbTargetUnion>) -> Ordering {
    match (target, union) {
        (PbCompareTarget::Value, Some(PbTargetUnion::Value(value))) => kv.value.cmp(value),
        (PbCompareTarget::Value, _) => kv.value.as_slice().cmp(&[]),
        (PbCompareTarget::Version, Some(PbTargetUnion::Version(v))) => kv.version.cmp(v),
        (PbCompareTarget::Version, _) => kv.version.cmp(&0),
        (PbCompareTarget::Create, Some(PbTargetUnion::CreateRevision(v))) => {
            kv.create_revision.cmp(v)
        }
        (PbCompareTarget::Create, _) => kv.create_revision.cmp(&0),
        (PbCompareTarget::Mod, Some(PbTargetUnion::ModRevision(v))) => kv.mod_revision.cmp(v),
        (PbCompareTarget::Mod, _) => kv.mod_revision.cmp(&0),
        (PbCompareTarget::Lease, Some(PbTargetUnion::Lease(v))) => kv.lease.cmp(v),
        (PbCompareTarget::Lease, _) => kv.lease.cmp(&0),
    }
}

fn fits(op: CompareOp, order: Ordering) -> bool {
    match op {
        CompareOp::Equal => order == Ordering::Equal,
        CompareOp::Greater => order == Ordering::Greater,
        CompareOp::Less => order == Ordering::Less,
        CompareOp::NotEqual => order != Ordering::Equal,
    }
}
