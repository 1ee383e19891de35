//! Numbers that look random and follow from a seed, so that a failed run can be had again.

/// A generator (SplitMix64). Equal seeds give equal sequences, on every machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that starts from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed that differs from run to run, unless `variable` is set in the environment: then it
    /// is that number. Whoever draws one prints it.
    ///
    /// # Panics
    ///
    /// If the variable is set to something that is not a number.
    pub fn seed(variable: &str) -> u64 {
        if let Ok(text) = std::env::var(variable) {
            return text
                .parse()
                .unwrap_or_else(|_| panic!("{variable}={text} is not a number"));
        }
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        // Fewer digits are easier to copy.
        (now.as_nanos() as u64 ^ u64::from(std::process::id())) % 1_000_000_000
    }

    /// A sequence from `STONEWORK_SEED` or the clock; prints which. A test's output is shown
    /// when it fails.
    pub fn announced(what: &str) -> Self {
        let seed = Self::seed("STONEWORK_SEED");
        println!("{what}: STONEWORK_SEED={seed}");
        Self::new(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, which must not be 0. (The bias is no concern here.)
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(limit)) >> 64) as u64
    }

    /// One of these.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    /// Bytes that do not repeat.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend(self.next_u64().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// Spreads `value` over all 64 bits: the output function of SplitMix64.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_that_of_splitmix64() {
        // The reference implementation's first outputs for seed 1234567.
        let mut random = Random::new(1_234_567);
        assert_eq!(random.next_u64(), 6_457_827_717_110_365_317);
        assert_eq!(random.next_u64(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn numbers_below_a_limit_reach_all_of_them() {
        let mut random = Random::new(7);
        let mut seen = [false; 5];
        for _ in 0..200 {
            seen[random.below(5) as usize] = true;
        }
        assert_eq!(seen, [true; 5]);
    }
}
