//! Key ranges as etcd writes them: a key, and an end that is empty (only that key), "\0" (all keys
//! from there on) or exclusive.

use std::ops::Bound;

/// A range of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    start: Vec<u8>,
    end: Vec<u8>,
}

impl KeyRange {
    /// From the two fields of a request.
    pub fn new(key: &[u8], range_end: &[u8]) -> Self {
        Self { start: key.to_vec(), end: range_end.to_vec() }
    }

    /// The key is in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        match self.end.as_slice() {
            [] => key == self.start,
            [0] => key >= self.start.as_slice(),
            end => key >= self.start.as_slice() && key < end,
        }
    }

    /// Bounds for an ordered map, which panics on a range whose start lies behind its end; such a
    /// range is empty.
    pub fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        let start = Bound::Included(self.start.as_slice());
        match self.end.as_slice() {
            [] => (start, Bound::Included(self.start.as_slice())),
            [0] => (start, Bound::Unbounded),
            end if end <= self.start.as_slice() => (Bound::Included(end), Bound::Excluded(end)),
            end => (start, Bound::Excluded(end)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn bounds_and_membership_agree() {
        let keys: [&[u8]; 6] = [b"a", b"a/1", b"a/2", b"a0", b"b", b"\xff\xff"];
        let map: BTreeMap<Vec<u8>, ()> = keys.iter().map(|key| (key.to_vec(), ())).collect();
        for start in keys {
            for end in [b"".as_slice(), b"\0", b"a", b"a0", b"b", b"c"] {
                let range = KeyRange::new(start, end);
                let by_bounds: Vec<&Vec<u8>> =
                    map.range::<[u8], _>(range.bounds()).map(|(key, ())| key).collect();
                let by_test: Vec<&Vec<u8>> = map.keys().filter(|key| range.contains(key)).collect();
                assert_eq!(by_bounds, by_test, "{start:?} to {end:?}");
            }
        }
    }
}
