//! The seeded source of every decision in a simulation.
//!
//! splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators"): one word of
//! state, every seed is as good as any other, and the sequence is the same on every machine.

/// A generator whose whole future follows from its seed. Not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that begins at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, or 0 if that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(limit)) >> 64) as u64
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        debug_assert!(low <= high);
        low + self.below(high - low + 1)
    }

    /// True in `permille` of 1000 cases.
    pub fn chance(&mut self, permille: u32) -> bool {
        self.below(1000) < u64::from(permille)
    }

    /// A generator of its own, so that what one part draws does not shift what another gets.
    pub fn fork(&mut self) -> Self {
        Self(self.bits())
    }
}

/// Spreads every bit of `word` over the whole result.
pub(super) fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_that_of_splitmix64() {
        let mut random = Random::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.bits()).collect();
        let published = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ];
        assert_eq!(first, published);
    }

    #[test]
    fn numbers_stay_in_their_range_and_reach_both_ends() {
        let mut random = Random::new(7);
        let mut seen = [0_u32; 4];
        for _ in 0..1000 {
            seen[random.between(3, 6) as usize - 3] += 1;
        }
        assert!(seen.iter().all(|count| *count > 150), "{seen:?}");
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn a_chance_happens_as_often_as_it_says() {
        let mut random = Random::new(8);
        let hits = (0..10_000).filter(|_| random.chance(30)).count();
        assert!((200..400).contains(&hits), "{hits}");
        assert!((0..1000).all(|_| !random.chance(0) && random.chance(1000)));
    }
}
