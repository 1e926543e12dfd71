//! The invitation token: one line of text that a new node needs to join.
//!
//! Invariants:
//! - A token proves nothing until its secret has been redeemed; the member book keeps only a keyed hash of the secret, and
//!   compares it in constant time.
//! - Neither a token nor a secret appears in `Debug` or in any error.
//! - A damaged or cut token is refused by its checksum before a field of it is believed, apart from its version.

use std::fmt;

use murphy_fs::MemberRole;
use murphy_log::{BranchId, LogTime, NodeId, VolumeId, VolumeKeys};

use crate::identity::PublicKey;

/// What proves an invitation.
#[derive(Clone)]
pub struct Secret([u8; SECRET_BYTES]);

impl Secret {
    /// The secret with these bytes.
    pub fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Secret {
        Secret(bytes)
    }

    /// A new random secret.
    pub fn random() -> Result<Secret, getrandom::Error> {
        let mut bytes = [0; SECRET_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Secret(bytes))
    }

    /// What the member book keeps of the secret.
    pub fn hash(&self, keys: &VolumeKeys) -> SecretHash {
        SecretHash(*blake3::keyed_hash(&keys.derived(PURPOSE_SECRET), &self.0).as_bytes())
    }

    pub(crate) fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The keyed hash of a secret. Compared in constant time.
#[derive(Clone, Copy, Debug)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// The hash with these bytes, as the member book keeps them.
    pub fn from_bytes(bytes: [u8; 32]) -> SecretHash {
        SecretHash(bytes)
    }

    /// The bytes that the member book keeps.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key of the invitation's row in the member book.
    pub fn row_id(&self) -> NodeId {
        let mut id = [0; 16];
        id.copy_from_slice(&self.0[..16]);
        NodeId::from_bytes(id)
    }
}

impl PartialEq for SecretHash {
    fn eq(&self, other: &SecretHash) -> bool {
        // This comparison of blake3 takes the same time wherever the two differ.
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

impl Eq for SecretHash {}

/// Everything that a new node needs to join.
#[derive(Clone)]
pub struct Token {
    /// Where the source listens, `host:port`, best first; at least one.
    pub addresses: Vec<String>,
    /// The volume.
    pub volume: VolumeId,
    /// The branch.
    pub branch: BranchId,
    /// The key that the source proves.
    pub source_key: PublicKey,
    /// What proves the invitation.
    pub secret: Secret,
    /// What the new member may do.
    pub role: MemberRole,
    /// Until when it can be redeemed.
    pub expires: LogTime,
}

impl Token {
    /// The text of the token. Never to be logged, nor put into a command line.
    pub fn to_text(&self) -> Result<String, TokenError> {
        if self.addresses.is_empty() || self.addresses.len() > MAX_ADDRESSES {
            return Err(TokenError::Addresses);
        }
        let mut bytes = vec![TOKEN_VERSION, self.role.code()];
        bytes.extend_from_slice(self.volume.as_bytes());
        bytes.extend_from_slice(self.branch.as_bytes());
        bytes.extend_from_slice(self.source_key.as_bytes());
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend_from_slice(&self.expires.as_nanos().to_le_bytes());
        for address in &self.addresses {
            let length = u8::try_from(address.len()).map_err(|_| TokenError::Addresses)?;
            bytes.push(length);
            bytes.extend_from_slice(address.as_bytes());
        }
        bytes.extend_from_slice(&checksum(&bytes));
        Ok(format!("{TOKEN_PREFIX}{}", to_base64(&bytes)))
    }

    /// Reads a token; white space around and inside it, as a mail program may add, is ignored.
    pub fn parse(text: &str) -> Result<Token, TokenError> {
        if text.len() > MAX_TOKEN_CHARS {
            return Err(TokenError::TooLong { limit: MAX_TOKEN_CHARS });
        }
        let text: String = text.split_whitespace().collect();
        let digits = text.strip_prefix(TOKEN_PREFIX).ok_or(TokenError::NotAToken)?;
        let bytes = from_base64(digits)?;
        // The version comes before the checksum: another version may have its checksum elsewhere.
        if let Some(version) = bytes.first().filter(|version| **version != TOKEN_VERSION) {
            return Err(TokenError::Version(*version));
        }
        let (bytes, sum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(damaged(bytes.len()))?;
        if checksum(bytes) != *sum {
            return Err(damaged(bytes.len()));
        }
        let mut fields = Fields { bytes, at: VERSION_BYTES };
        let [role] = fields.array()?;
        Ok(Token {
            role: MemberRole::from_code(role).ok_or(damaged(1))?,
            volume: VolumeId::from_bytes(fields.array()?),
            branch: BranchId::from_bytes(fields.array()?),
            source_key: PublicKey::from_bytes(fields.array()?),
            secret: Secret(fields.array()?),
            expires: LogTime::from_nanos(u64::from_le_bytes(fields.array()?)),
            addresses: fields.addresses()?,
        })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("addresses", &self.addresses)
            .field("volume", &self.volume)
            .field("role", &self.role)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// The bytes of a token, and how many of them have been read.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], TokenError> {
        let taken = self.bytes[self.at..].get(..count).ok_or(damaged(self.at))?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TokenError> {
        let at = self.at;
        self.take(N)?.try_into().map_err(|_| damaged(at))
    }

    fn addresses(&mut self) -> Result<Vec<String>, TokenError> {
        let mut addresses = Vec::new();
        while self.at < self.bytes.len() {
            let [length] = self.array()?;
            let at = self.at;
            let address = self.take(length.into())?;
            addresses.push(String::from_utf8(address.to_vec()).map_err(|_| damaged(at))?);
            if addresses.len() > MAX_ADDRESSES {
                return Err(TokenError::Addresses);
            }
        }
        if addresses.is_empty() { Err(TokenError::Addresses) } else { Ok(addresses) }
    }
}

/// A text that is not a token.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TokenError {
    /// It does not begin as tokens do.
    #[error("this is not an invitation token: at character 0 tokens begin with {TOKEN_PREFIX}")]
    NotAToken,
    /// It was made by another version.
    #[error("the token has version {0} in the field version, which this program does not know")]
    Version(u8),
    /// A character is missing, was changed or does not belong there.
    #[error("the token is damaged or incomplete at character {at}: copy all of it")]
    Damaged {
        /// Where in the text without white space; at the checksum if it does not match.
        at: usize,
    },
    /// It is longer than any token.
    #[error("the text goes on after character {limit}, where the longest token ends")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// A token holds one to [`MAX_ADDRESSES`] addresses of at most [`MAX_NAME_BYTES`] bytes.
    #[error(
        "a token has 1 to {MAX_ADDRESSES} addresses of at most {MAX_NAME_BYTES} bytes in the field addresses"
    )]
    Addresses,
}

/// A token that is damaged in the character with which the byte `at` begins.
fn damaged(at: usize) -> TokenError {
    TokenError::Damaged { at: TOKEN_PREFIX.len() + at * 4 / 3 }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..CHECKSUM_BYTES]);
    sum
}

/// Base64 with the alphabet for URLs and without padding (RFC 4648, section 5).
fn to_base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word =
            group.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..=group.len() {
            text.push(char::from(ALPHABET[(word >> (18 - 6 * digit) & 63) as usize]));
        }
    }
    text
}

fn from_base64(text: &str) -> Result<Vec<u8>, TokenError> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.as_bytes().chunks(4) {
        let mut word = 0u32;
        for (offset, char) in group.iter().enumerate() {
            // Of all digits before it come three quarters as many bytes.
            let refused = TokenError::Damaged { at: TOKEN_PREFIX.len() + bytes.len() / 3 * 4 + offset };
            let digit = ALPHABET.iter().position(|known| known == char).ok_or(refused)?;
            word = word << 6 | u32::from(digit as u8);
        }
        word <<= 6 * (4 - group.len());
        let count = group.len() - 1;
        let [_, decoded @ ..] = word.to_be_bytes();
        if count == 0 || decoded[count..].iter().any(|bits| *bits != 0) {
            return Err(damaged(bytes.len() + count));
        }
        bytes.extend_from_slice(&decoded[..count]);
    }
    Ok(bytes)
}

/// The length of a secret, in bytes.
pub const SECRET_BYTES: usize = 32;
/// How every token begins.
pub const TOKEN_PREFIX: &str = "murphy-invite.";
/// No token is longer, white space included.
pub const MAX_TOKEN_CHARS: usize = 8192;
const TOKEN_VERSION: u8 = 0;
const VERSION_BYTES: usize = 1;
const CHECKSUM_BYTES: usize = 4;
const PURPOSE_SECRET: &str = "murphy 2026 invitation secret v0";
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
/// A node has at most so many addresses, and a copy as many failure domains.
pub const MAX_ADDRESSES: usize = 8;
/// Names of nodes and addresses are at most so long, in bytes.
pub const MAX_NAME_BYTES: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            addresses: vec!["10.0.0.1:7000".to_owned(), "source.example:7000".to_owned()],
            volume: VolumeId::from_bytes([1; 16]),
            branch: BranchId::from_bytes([2; 16]),
            source_key: PublicKey::from_bytes([3; 32]),
            secret: Secret([0x5a; 32]),
            role: MemberRole::Writer,
            expires: LogTime::from_nanos(1 << 60),
        }
    }

    #[test]
    fn a_token_survives_text_and_line_breaks() {
        let text = token().to_text().unwrap();
        let broken = format!("  {}\n  {}\r\n", &text[..40], &text[40..]);
        for text in [text.as_str(), &broken] {
            let parsed = Token::parse(text).unwrap();
            assert_eq!(parsed.addresses, token().addresses);
            assert_eq!((parsed.volume, parsed.branch), (token().volume, token().branch));
            assert_eq!((parsed.source_key, parsed.role), (token().source_key, token().role));
            assert_eq!((parsed.secret.0, parsed.expires), (token().secret.0, token().expires));
        }
    }

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in
            [(&b""[..], ""), (b"f", "Zg"), (b"fo", "Zm8"), (b"foobar", "Zm9vYmFy"), (b"\xff\xfe", "__4")]
        {
            assert_eq!(to_base64(bytes), text);
            assert_eq!(from_base64(text).unwrap(), bytes);
        }
        assert_eq!(from_base64("Zh"), Err(damaged(1)), "spare bits must be zero");
    }

    /// Tokens are copied by hand: whatever is lost or changed must be noticed before anything is dialled.
    #[test]
    fn every_damage_is_noticed() {
        let text = token().to_text().unwrap();
        for end in 0..text.len() {
            assert!(Token::parse(&text[..end]).is_err(), "cut at {end}");
        }
        for at in 0..text.len() {
            let mut damaged = text.clone().into_bytes();
            damaged[at] = if damaged[at] == b'x' { b'y' } else { b'x' };
            assert!(Token::parse(str::from_utf8(&damaged).unwrap()).is_err(), "changed at {at}");
        }
        assert!(matches!(Token::parse(&"x".repeat(9000)), Err(TokenError::TooLong { .. })));
        assert_eq!(Token::parse("hello").unwrap_err(), TokenError::NotAToken);
    }

    #[test]
    fn a_secret_is_in_no_debug_output() {
        let token = token();
        let shown = format!("{token:?} {:?}", token.secret);
        assert!(!shown.contains("5a") && !shown.contains("90, 90"), "{shown}");
    }

    #[test]
    fn the_hash_of_a_secret_depends_on_the_volume() {
        let keys = |byte| VolumeKeys::derive(VolumeId::from_bytes([byte; 16]));
        let secret = Secret([1; 32]);
        assert_eq!(secret.hash(&keys(1)), secret.hash(&keys(1)));
        assert_ne!(secret.hash(&keys(1)), secret.hash(&keys(2)));
        assert_ne!(secret.hash(&keys(1)), Secret([2; 32]).hash(&keys(1)));
    }

    fn text_of(bytes: &[u8]) -> String {
        format!("{TOKEN_PREFIX}{}", to_base64(&[bytes, &checksum(bytes)].concat()))
    }

    #[test]
    fn a_token_of_a_later_version_or_with_too_many_addresses_is_refused_by_name() {
        let addresses = vec!["h:1".to_owned(); MAX_ADDRESSES];
        let most = Token { addresses: addresses.clone(), ..token() }.to_text().unwrap();
        assert_eq!(Token::parse(&most).unwrap().addresses, addresses);
        for addresses in [Vec::new(), vec!["h:1".to_owned(); MAX_ADDRESSES + 1], vec!["h".repeat(256)]] {
            assert_eq!(Token { addresses, ..token() }.to_text(), Err(TokenError::Addresses));
        }
        let mut bytes = from_base64(most.strip_prefix(TOKEN_PREFIX).unwrap()).unwrap();
        bytes.truncate(bytes.len() - CHECKSUM_BYTES);
        let none = bytes.len() - addresses.len() * 4;
        assert_eq!(Token::parse(&text_of(&bytes[..none])).unwrap_err(), TokenError::Addresses);
        bytes.extend_from_slice(b"\x03h:1");
        assert_eq!(Token::parse(&text_of(&bytes)).unwrap_err(), TokenError::Addresses);
        bytes[0] = 9;
        assert_eq!(Token::parse(&text_of(&bytes)).unwrap_err(), TokenError::Version(9));
    }
}
