//! The keyed hashes of a volume: the chain over entries, the digest of rows, and keys derived for others.
//!
//! Invariants:
//! - Every key is `derive_key(purpose, volume id)`: equal bytes in two volumes have different hashes.
//! - The chain covers LSN, time, kind and body of every entry, and nothing of how they were grouped into frames.

use crate::{ChainHash, Digest, LogTime, Lsn, VolumeId};

/// The keys of one volume.
#[derive(Clone)]
pub struct VolumeKeys {
    volume: VolumeId,
    chain: [u8; 32],
    row: [u8; 32],
}

impl VolumeKeys {
    /// Derives the keys of a volume.
    pub fn derive(volume: VolumeId) -> VolumeKeys {
        let key = |purpose| blake3::derive_key(purpose, volume.as_bytes());
        VolumeKeys { volume, chain: key(PURPOSE_CHAIN), row: key(PURPOSE_ROW) }
    }

    /// The volume that the keys belong to.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// A key for another purpose. The purpose must be a constant that no one else uses.
    pub fn derived(&self, purpose: &'static str) -> [u8; 32] {
        blake3::derive_key(purpose, self.volume.as_bytes())
    }

    /// The digest of one row: what a tree's digest has more with it.
    pub fn row_digest(&self, table: u8, key: &[u8], value: &[u8]) -> Digest {
        let length = key.len() as u64;
        let total = ROW_PREFIX_BYTES + key.len() + value.len();
        let mut buffer = [0; ROW_BUFFER_BYTES];
        // Most rows fit the buffer, and one contiguous slice is hashed much faster than three.
        let hash = if let Some(buffer) = buffer.get_mut(..total) {
            buffer[0] = table;
            buffer[1..ROW_PREFIX_BYTES].copy_from_slice(&length.to_le_bytes());
            buffer[ROW_PREFIX_BYTES..][..key.len()].copy_from_slice(key);
            buffer[ROW_PREFIX_BYTES + key.len()..].copy_from_slice(value);
            blake3::keyed_hash(&self.row, buffer)
        } else {
            let mut hasher = blake3::Hasher::new_keyed(&self.row);
            hasher.update(&[table]).update(&length.to_le_bytes()).update(key).update(value);
            hasher.finalize()
        };
        let mut half = [0; 16];
        half.copy_from_slice(&hash.as_bytes()[..16]);
        Digest(u128::from_le_bytes(half))
    }

    /// The chain hash after an entry; `link` holds what [`start_link`] began, followed by the entry's body.
    pub(crate) fn chained(&self, link: &[u8]) -> ChainHash {
        ChainHash::from_bytes(*blake3::keyed_hash(&self.chain, link).as_bytes())
    }
}

impl std::fmt::Debug for VolumeKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VolumeKeys({})", self.volume)
    }
}

/// Begins the input of one link of the chain; the body of the entry follows.
pub(crate) fn start_link(link: &mut Vec<u8>, previous: &ChainHash, lsn: Lsn, time: LogTime, kind: u8) {
    link.clear();
    link.extend_from_slice(previous.as_bytes());
    link.extend_from_slice(&lsn.get().to_le_bytes());
    link.extend_from_slice(&time.as_nanos().to_le_bytes());
    link.push(kind);
}

/// What [`start_link`] writes, in bytes.
pub(crate) const LINK_START_BYTES: usize = 32 + 8 + 8 + 1;
const PURPOSE_CHAIN: &str = "murphy 2026 log chain v0";
const PURPOSE_ROW: &str = "murphy 2026 row digest v0";
const ROW_PREFIX_BYTES: usize = 1 + 8;
const ROW_BUFFER_BYTES: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moving_a_byte_between_key_and_value_changes_the_digest() {
        let keys = VolumeKeys::derive(VolumeId::from_bytes([7; 16]));
        assert_ne!(keys.row_digest(1, b"ab", b"c"), keys.row_digest(1, b"a", b"bc"));
        assert_ne!(keys.row_digest(1, b"ab", b"c"), keys.row_digest(2, b"ab", b"c"));
    }

    #[test]
    fn long_and_short_rows_are_hashed_alike() {
        let keys = VolumeKeys::derive(VolumeId::from_bytes([7; 16]));
        for length in [0, 1, ROW_BUFFER_BYTES - ROW_PREFIX_BYTES - 2, ROW_BUFFER_BYTES, 4096] {
            let value = vec![9; length];
            let mut hasher = blake3::Hasher::new_keyed(&keys.row);
            hasher.update(&[3]).update(&2u64.to_le_bytes()).update(b"kk").update(&value);
            let expected = u128::from_le_bytes(hasher.finalize().as_bytes()[..16].try_into().unwrap());
            assert_eq!(keys.row_digest(3, b"kk", &value), Digest(expected), "value of {length} bytes");
        }
    }

    #[test]
    fn two_volumes_share_no_key() {
        let (a, b) = (VolumeId::from_bytes([1; 16]), VolumeId::from_bytes([2; 16]));
        let (a, b) = (VolumeKeys::derive(a), VolumeKeys::derive(b));
        assert_ne!(a.derived("x"), b.derived("x"));
        assert_ne!(a.row_digest(1, b"k", b"v"), b.row_digest(1, b"k", b"v"));
        assert_ne!(a.chained(b"link"), b.chained(b"link"));
    }
}
