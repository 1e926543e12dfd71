//! What packs are called: the random id of the writing process, and a counter.
//!
//! Invariants:
//! - A name is never derived from content and never used twice, so no two writers, branches or versions can collide and no
//!   deletion can race an equal name.
//! - Each name has exactly one text and one object path; another spelling of it is not accepted.

use std::{fmt, str::FromStr};

/// The identity of one writing process, drawn at random when it starts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriterId(u64);

impl WriterId {
    /// The id with this number.
    pub const fn from_u64(id: u64) -> WriterId {
        WriterId(id)
    }

    /// The number of the id.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// A new id from the operating system's randomness.
    pub fn random() -> Result<WriterId, getrandom::Error> {
        getrandom::u64().map(WriterId)
    }
}

impl fmt::Display for WriterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for WriterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriterId({self})")
    }
}

impl FromStr for WriterId {
    type Err = ParsePackNameError;

    fn from_str(text: &str) -> Result<WriterId, ParsePackNameError> {
        let canonical = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() != WRITER_DIGITS || !text.bytes().all(canonical) {
            return Err(ParsePackNameError);
        }
        u64::from_str_radix(text, 16).map(WriterId).map_err(|_| ParsePackNameError)
    }
}

/// The name of a pack; written `<writer, 16 hexadecimal digits>-<number, decimal>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackName {
    /// The process that wrote the pack.
    pub writer: WriterId,
    /// Counts the packs of that process.
    pub number: u64,
}

impl PackName {
    /// The name of the `number`-th pack of `writer`.
    pub const fn new(writer: WriterId, number: u64) -> PackName {
        PackName { writer, number }
    }

    /// Where the pack lies below the prefix of a store: `packs/<aa>/<name>`.
    ///
    /// `aa` is the first byte of a hash of the name. It spreads the packs of one writer evenly over 256 folders, because
    /// stores scale by key prefix and file systems slow down in huge directories.
    pub fn object_path(self) -> String {
        format!("{PACKS_FOLDER}/{:02x}/{self}", self.shard())
    }

    /// The name of the pack that lies at `path` below the prefix of a store; `None` if no pack lies there.
    pub fn from_object_path(path: &str) -> Option<PackName> {
        let name = path.rsplit('/').next()?.parse::<PackName>().ok()?;
        (name.object_path() == path).then_some(name)
    }

    /// The folder, of 256, that the pack belongs to.
    pub(super) fn shard(self) -> u8 {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&self.writer.0.to_le_bytes());
        key[8..].copy_from_slice(&self.number.to_le_bytes());
        blake3::hash(&key).as_bytes()[0]
    }
}

impl fmt::Display for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.writer, self.number)
    }
}

impl fmt::Debug for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackName({self})")
    }
}

impl FromStr for PackName {
    type Err = ParsePackNameError;

    fn from_str(text: &str) -> Result<PackName, ParsePackNameError> {
        let (writer, digits) = text.split_once('-').ok_or(ParsePackNameError)?;
        let number: u64 = digits.parse().map_err(|_| ParsePackNameError)?;
        let name = PackName::new(writer.parse()?, number);
        // A sign or a leading zero would be a second text for the same name.
        if digits.starts_with('+') || (digits.len() > 1 && digits.starts_with('0')) {
            return Err(ParsePackNameError);
        }
        Ok(name)
    }
}

/// A text that is not the name of a pack or of a writer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("expected a pack name: 16 lower-case hexadecimal digits, a dash, a decimal number")]
pub struct ParsePackNameError;

/// The folder of all packs below the prefix of a store.
pub(super) const PACKS_FOLDER: &str = "packs";

const WRITER_DIGITS: usize = 16;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_name_survives_its_text_and_its_path(writer: u64, number: u64) {
            let name = PackName::new(WriterId::from_u64(writer), number);
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            prop_assert_eq!(PackName::from_object_path(&name.object_path()), Some(name));
        }
    }

    #[test]
    fn a_second_spelling_of_a_name_is_refused() {
        for text in [
            "",
            "-",
            "0000000000000001",
            "0000000000000001-",
            "0000000000000001-01",
            "0000000000000001-+1",
            "000000000000000A-1",
            "1-1",
            "+000000000000001-1",
            "0000000000000001-18446744073709551616",
        ] {
            assert_eq!(text.parse::<PackName>(), Err(ParsePackNameError), "{text:?}");
        }
    }

    #[test]
    fn a_pack_in_the_wrong_folder_is_not_taken_for_one() {
        let name = PackName::new(WriterId::from_u64(7), 1);
        let wrong = format!("packs/{:02x}/{name}", name.shard().wrapping_add(1));
        assert_eq!(PackName::from_object_path(&wrong), None);
        assert_eq!(PackName::from_object_path(&name.to_string()), None);
    }

    #[test]
    fn the_packs_of_one_writer_spread_over_the_folders() {
        let mut counts = [0; 256];
        for number in 0..25_600 {
            counts[usize::from(PackName::new(WriterId::from_u64(3), number).shard())] += 1;
        }
        assert!(counts.iter().all(|&n| (50..150).contains(&n)), "{counts:?}");
    }
}
