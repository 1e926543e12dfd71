//! The small objects of an archive that people should be able to read: JSON with a kind, a version and a checksum.
//!
//! Invariants:
//! - The checksum is over kind, version and the body in its one serialized form: a body that parses and serializes to other bytes
//!   than were summed is refused.
//! - Kind and version are looked at before the body, so that a later version is told from damage.

use bytes::Bytes;
use murphy_log::{ChainHash, Digest, Epoch, EpochId, Lsn, Position, State, Usage};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Serializes `body` as a document of `kind`.
pub(crate) fn encode<T: Serialize>(kind: &str, body: &T) -> Result<Bytes, serde_json::Error> {
    let blake3 = checksum(kind, body)?;
    let document = Document { murphy: kind.to_owned(), version: VERSION, body, blake3 };
    let mut bytes = serde_json::to_vec_pretty(&document)?;
    bytes.push(b'\n');
    Ok(bytes.into())
}

/// Reads the document of `kind` that `bytes` are.
pub(crate) fn decode<T: Serialize + DeserializeOwned>(kind: &str, bytes: &[u8]) -> Result<T, DocumentError> {
    let syntax = |error: serde_json::Error| DocumentError::Syntax(error.to_string());
    let head: Head = serde_json::from_slice(bytes).map_err(syntax)?;
    if head.murphy != kind {
        return Err(DocumentError::Kind { expected: kind.to_owned() });
    }
    if head.version != VERSION {
        return Err(DocumentError::Version { found: head.version, known: VERSION });
    }
    let document: Document<T> = serde_json::from_slice(bytes).map_err(syntax)?;
    if checksum(kind, &document.body).map_err(syntax)? != document.blake3 {
        return Err(DocumentError::Checksum);
    }
    Ok(document.body)
}

fn checksum<T: Serialize>(kind: &str, body: &T) -> Result<String, serde_json::Error> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind.as_bytes()).update(&[0]).update(&VERSION.to_le_bytes());
    hasher.update(&serde_json::to_vec(body)?);
    Ok(hasher.finalize().to_hex().to_string())
}

#[derive(Deserialize)]
struct Head {
    murphy: String,
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<T> {
    murphy: String,
    version: u32,
    body: T,
    blake3: String,
}

/// Why bytes are not the document that was expected.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DocumentError {
    /// They are not JSON, or not of this form.
    #[error("it is not readable: {0}")]
    Syntax(String),
    /// They are something else.
    #[error("it is not a {expected} of murphy, as its field murphy says")]
    Kind {
        /// What was expected.
        expected: String,
    },
    /// A later version wrote them.
    #[error("it has format version {found} in the field version, this version knows {known}")]
    Version {
        /// The version.
        found: u32,
        /// The version that can be read.
        known: u32,
    },
    /// They are damaged.
    #[error("it does not match its checksum in the field blake3")]
    Checksum,
    /// A field has an impossible value.
    #[error("it has an impossible value in the field {0}")]
    Field(&'static str),
}

/// A position in a document.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PositionText {
    /// The number of the epoch.
    pub epoch: u32,
    /// The id of the epoch, hexadecimal.
    pub epoch_id: String,
    /// The LSN.
    pub lsn: u64,
    /// The chain hash after it, hexadecimal.
    pub hash: String,
}

impl From<Position> for PositionText {
    fn from(position: Position) -> PositionText {
        PositionText {
            epoch: position.epoch.number,
            epoch_id: position.epoch.id.to_string(),
            lsn: position.lsn.get(),
            hash: position.hash.to_string(),
        }
    }
}

impl PositionText {
    /// The position itself.
    pub fn position(&self) -> Result<Position, DocumentError> {
        let id: EpochId = self.epoch_id.parse().map_err(|_| DocumentError::Field("epoch_id"))?;
        let hash: ChainHash = self.hash.parse().map_err(|_| DocumentError::Field("hash"))?;
        if self.lsn == 0 || self.lsn > LSN_LIMIT {
            return Err(DocumentError::Field("lsn"));
        }
        Ok(Position { epoch: Epoch { number: self.epoch, id }, lsn: Lsn::new(self.lsn), hash })
    }
}

/// A state in a document.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateText {
    /// Where in history.
    pub position: PositionText,
    /// The digest of the tree, hexadecimal.
    pub digest: String,
    /// Inodes in the tree.
    pub inodes: u64,
    /// Bytes of file data.
    pub bytes: u64,
}

impl From<State> for StateText {
    fn from(state: State) -> StateText {
        StateText {
            position: state.position.into(),
            digest: state.digest.to_string(),
            inodes: state.usage.inodes,
            bytes: state.usage.bytes,
        }
    }
}

impl StateText {
    /// The state itself.
    pub fn state(&self) -> Result<State, DocumentError> {
        let canonical = self.digest.len() == 32 && self.digest.bytes().all(|b| b.is_ascii_hexdigit());
        let digest = u128::from_str_radix(&self.digest, 16).ok().filter(|_| canonical);
        Ok(State {
            position: self.position.position()?,
            digest: Digest(digest.ok_or(DocumentError::Field("digest"))?),
            usage: Usage { inodes: self.inodes, bytes: self.bytes },
        })
    }
}

/// The version of every document.
const VERSION: u32 = 0;
/// The highest LSN that a log can have.
pub(crate) const LSN_LIMIT: u64 = 1 << 62;
/// No document is longer, in bytes.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Body {
        a: u32,
    }

    #[test]
    fn a_changed_digit_is_found() {
        let bytes = encode("test", &Body { a: 12 }).unwrap();
        assert_eq!(decode::<Body>("test", &bytes), Ok(Body { a: 12 }));
        let changed = String::from_utf8(bytes.to_vec()).unwrap().replace("12", "13");
        assert_eq!(decode::<Body>("test", changed.as_bytes()), Err(DocumentError::Checksum));
    }

    #[test]
    fn a_later_version_is_told_from_damage() {
        let text = r#"{"murphy":"test","version":7,"body":{"b":true},"blake3":""}"#;
        assert_eq!(
            decode::<Body>("test", text.as_bytes()),
            Err(DocumentError::Version { found: 7, known: 0 })
        );
        let kind = DocumentError::Kind { expected: "other".to_owned() };
        assert_eq!(decode::<Body>("other", text.as_bytes()), Err(kind));
    }
}
