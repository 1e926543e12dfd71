//! Numbers that look random and are the same for the same seed, for suites that draw moments, sizes and bytes.
//!
//! Invariants:
//! - One seed gives one sequence, on every machine and in every version.

/// xorshift64* (Vigna, 2016).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Random {
        // Neighbouring seeds must not begin alike, and zero is the one state that has no successor.
        let mixed = (seed ^ 0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        Random((mixed ^ (mixed >> 29)).max(1))
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `limit`, which is not zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next_u64() % limit
    }

    /// A place in a list of `length` items, which is not empty.
    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// `length` bytes, half text and half noise, so that compression has something to do and not everything.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + TEXT.len());
        while bytes.len() < length {
            let word = self.next_u64();
            bytes.extend_from_slice(&word.to_le_bytes());
            if word.is_multiple_of(3) {
                bytes.extend_from_slice(TEXT);
            }
        }
        bytes.truncate(length);
        bytes
    }
}

/// A number from the environment, or what it is when nobody gives one.
///
/// # Panics
/// If the variable is there and is not a number: a run that ignores what it was told proves something else.
pub fn number_from_env(variable: &str, usual: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
        Err(_) => usual,
    }
}

const TEXT: &[u8] = b"anything that can go wrong ";

#[cfg(test)]
mod tests {
    use super::*;

    /// A failure is reported by its seed, which must bring it back.
    #[test]
    fn a_seed_gives_the_same_sequence_and_another_seed_another() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (random.next_u64(), random.bytes(100), random.below(10))
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7).0, draw(8).0);
        assert_ne!(draw(0).0, 0);
        assert_eq!(draw(1).1.len(), 100);
    }
}
