//! Floats and ids as the bytes that travel.

/// The bytes of `values` in memory order.
#[allow(unsafe_code)]
pub(crate) fn as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: every byte of an f32 slice is initialised, u8 has no alignment, and the length is its
    // size in bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of `values`, writable.
#[allow(unsafe_code)]
pub(crate) fn as_bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as for `as_bytes`; any bytes form valid floats, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// The bytes of `ids`, writable.
#[allow(unsafe_code)]
pub(crate) fn ids_as_bytes_mut(ids: &mut [u32]) -> &mut [u8] {
    // SAFETY: every byte of a u32 slice is initialised, any bytes form valid integers, u8 has no
    // alignment, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(ids.as_mut_ptr().cast(), size_of_val(ids)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_values() {
        let mut floats = [1.5f32, -0.0, f32::NAN];
        let expected: Vec<u8> = floats.iter().flat_map(|value| value.to_ne_bytes()).collect();
        assert_eq!(as_bytes(&floats), expected);
        as_bytes_mut(&mut floats)[4..8].copy_from_slice(&2.5f32.to_ne_bytes());
        assert_eq!(floats[1], 2.5);
        let mut ids = [0u32; 2];
        ids_as_bytes_mut(&mut ids).fill(0xFF);
        assert_eq!(ids, [u32::MAX; 2]);
        assert!(as_bytes(&[]).is_empty());
    }
}
