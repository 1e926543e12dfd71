//! Proofs: the results of verifications and restores, kept in the archive that they are about.
//!
//! Invariants:
//! - A proof is never changed. Two that end in the same nanosecond are one.

use futures::TryStreamExt;
use murphy_log::LogTime;
use serde::{Deserialize, Serialize};

use crate::{
    descriptor::Archive,
    document::{self, DOCUMENT_BYTES_MAX, DocumentError, PositionText},
    layout,
    store::StoreError,
};

/// What was proven, or not.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// What was done: `verify`, `restore`.
    pub kind: String,
    /// The node that did it, hexadecimal.
    pub node: String,
    /// When it began, in nanoseconds since 1970.
    pub began: u64,
    /// When it ended, in nanoseconds since 1970.
    pub ended: u64,
    /// Up to where it holds.
    pub position: PositionText,
    /// Of how many percent of the packs the contents were read.
    pub data_percent: u8,
    /// How many objects were looked at.
    pub objects: u64,
    /// What was found to be wrong; nothing means that it is proven.
    pub findings: Vec<String>,
}

impl Proof {
    /// Keeps the proof in `archive`, and returns the name of the object.
    pub async fn keep(&self, archive: &Archive) -> Result<String, ProofError> {
        let name = layout::proof(LogTime::from_nanos(self.ended));
        let object = || archive.store().object(&name);
        let bytes = document::encode(PROOF_KIND, self).map_err(|error| ProofError::Damaged {
            object: object(),
            reason: DocumentError::Syntax(error.to_string()),
        })?;
        archive.store().create(&name, bytes).await?;
        Ok(name)
    }

    /// Reads a proof.
    pub fn parse(bytes: &[u8]) -> Result<Proof, DocumentError> {
        document::decode(PROOF_KIND, bytes)
    }

    /// The newest proof in `archive`, by its name; `None` if none is listed. One that cannot be read hides the older ones: what it would have said
    /// is not known.
    pub async fn newest(archive: &Archive) -> Result<Option<Proof>, ProofError> {
        let mut listed = archive.store().list(layout::PROOF_FOLDER);
        let mut newest: Option<String> = None;
        while let Some(found) = listed.try_next().await? {
            newest = newest.max(Some(found.name));
        }
        match newest {
            Some(name) => Proof::read(archive, &name).await.map(Some),
            None => Ok(None),
        }
    }

    /// Reads the proof `name`.
    pub async fn read(archive: &Archive, name: &str) -> Result<Proof, ProofError> {
        let bytes = archive.store().get(name, DOCUMENT_BYTES_MAX).await?;
        Proof::parse(&bytes)
            .map_err(|reason| ProofError::Damaged { object: archive.store().object(name), reason })
    }
}

/// Why a proof is not kept or read.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// It cannot be read.
    #[error("{object} cannot be used: {reason}")]
    Damaged {
        /// The object.
        object: String,
        /// Why.
        reason: DocumentError,
    },
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The kind of a verification.
pub const VERIFY: &str = "verify";
/// The kind of a restore that came to its end.
pub const RESTORE: &str = "restore";
const PROOF_KIND: &str = "proof";
