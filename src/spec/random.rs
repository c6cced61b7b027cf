//! Random numbers whose whole state is one `u64`, so that a host can keep it, pass it and save it.
#![forbid(unsafe_code)]

/// What the state grows by with every number.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// `SplitMix64` (Steele, Lea and Flood 2014). The field is the state: a seed to begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 up to, but not including, 1: 24 bits of one [`Random::bits`].
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 24) as f32
    }

    /// Takes the last `count` numbers back.
    pub fn rewind(&mut self, count: usize) {
        self.0 = self.0.wrapping_sub(STEP.wrapping_mul(count as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_can_be_taken_back() {
        let mut random = Random(u64::MAX - 5);
        let first: Vec<_> = (0..4).map(|_| random.bits()).collect();
        random.rewind(3);
        assert_eq!([random.bits(), random.bits(), random.bits()], first[1..]);
    }

    #[test]
    fn the_sequence_is_the_published_one() {
        let mut random = Random(1_234_567);
        assert_eq!(random.bits(), 6_457_827_717_110_365_317);
        assert_eq!(random.bits(), 3_203_168_211_198_807_973);
    }
}
