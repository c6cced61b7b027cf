//! One 64-bit hash for token prefixes and file checksums: the same on every platform and in every
//! process, because what it names may lie on disk.
#![forbid(unsafe_code)]

/// Where a chain without a parent starts.
pub(crate) const START: u64 = 0x6e79_626c_6b76_0001;

/// Adds one word to a chain: an odd multiplication and the shifts of MurmurHash3's `fmix64`
/// (Appleby 2011). Every step is a bijection of the chain and of the word, so two inputs that differ in
/// one word only never collide.
#[inline]
pub(crate) fn mix(chain: u64, word: u64) -> u64 {
    let mut x = (chain ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 29
}

/// Adds bytes to a chain, eight at a time; the last word is padded with zeros and the length added.
pub(crate) fn mix_bytes(chain: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let chain = words.iter().fold(chain, |chain, word| mix(chain, u64::from_le_bytes(*word)));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    mix(mix(chain, u64::from_le_bytes(last)), bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_are_fixed() {
        // Files hold these numbers: a change needs a new format version.
        assert_eq!(mix(START, 1), 0xde6e_c21a_bbcf_0aa4);
        assert_eq!(mix_bytes(START, b"nybl kv cache"), 0xf62d_2682_2a09_6915);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_shows() {
        let bytes: Vec<u8> = (0..40).collect();
        let whole = mix_bytes(START, &bytes);
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(mix_bytes(START, &flipped), whole);
        }
        for len in 0..bytes.len() {
            assert_ne!(mix_bytes(START, &bytes[..len]), whole);
        }
    }
}
