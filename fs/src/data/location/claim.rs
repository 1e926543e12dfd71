//! The mark of a block store: which volume the packs under a prefix belong to.
//!
//! Invariants:
//! - A prefix that holds anything is never claimed, and of several that claim an empty one at once exactly one succeeds.
//! - What a claim says is compared before anything is written below it.

use futures::StreamExt;
use murphy_log::VolumeId;
use object_store::{Error as ObjectError, ObjectStoreExt, PutMode, PutOptions, path::Path};

use super::OpenedStore;

/// Claims the prefix of `opened`, which must be empty, for the packs of `volume`.
pub async fn claim_prefix(opened: &OpenedStore, volume: VolumeId) -> Result<(), ClaimPrefixError> {
    if let Some(owner) = read_claim(opened).await? {
        return Err(ClaimPrefixError::Claimed { store: opened.label.clone(), volume: owner });
    }
    let mut list = opened.store.list(Some(&opened.prefix));
    match list.next().await {
        None => {}
        Some(Ok(found)) => {
            return Err(ClaimPrefixError::Used {
                store: opened.label.clone(),
                object: found.location.to_string(),
            });
        }
        Some(Err(source)) => return Err(failed(opened, source)),
    }
    put_claim(opened, volume).await
}

async fn put_claim(opened: &OpenedStore, volume: VolumeId) -> Result<(), ClaimPrefixError> {
    let text = format!("{{\"format\":{CLAIM_FORMAT},\"volume\":\"{volume}\"}}\n");
    let put = opened.store.put_opts(&path(opened), text.into(), PutOptions::from(PutMode::Create)).await;
    // An ambiguous answer is settled by reading back, like every other put.
    match (put, read_claim(opened).await?) {
        (_, Some(owner)) if owner == volume => Ok(()),
        (_, Some(owner)) => Err(ClaimPrefixError::Claimed { store: opened.label.clone(), volume: owner }),
        (Err(source), None) => Err(failed(opened, source)),
        (Ok(_), None) => Err(ClaimPrefixError::Missing { store: opened.label.clone() }),
    }
}

/// Claims a prefix that holds packs of `volume` already, for a copy of it: a store that was copied, or an archive.
pub async fn adopt_prefix(opened: &OpenedStore, volume: VolumeId) -> Result<(), ClaimPrefixError> {
    match read_claim(opened).await? {
        Some(owner) if owner == volume => Ok(()),
        Some(owner) => Err(ClaimPrefixError::Claimed { store: opened.label.clone(), volume: owner }),
        None => put_claim(opened, volume).await,
    }
}

/// Checks that the prefix of `opened` has been claimed for `volume`.
pub async fn check_prefix(opened: &OpenedStore, volume: VolumeId) -> Result<(), ClaimPrefixError> {
    match read_claim(opened).await? {
        Some(owner) if owner == volume => Ok(()),
        Some(owner) => Err(ClaimPrefixError::Claimed { store: opened.label.clone(), volume: owner }),
        None => Err(ClaimPrefixError::Missing { store: opened.label.clone() }),
    }
}

/// Takes back the claim of `volume`, when nothing came of it.
pub async fn release_prefix(opened: &OpenedStore, volume: VolumeId) -> Result<(), ClaimPrefixError> {
    check_prefix(opened, volume).await?;
    remove_object(opened, CLAIM).await
}

/// Deletes one object below the prefix, to take back what an operation that failed has begun.
pub async fn remove_object(opened: &OpenedStore, name: &str) -> Result<(), ClaimPrefixError> {
    let path = opened.prefix.clone().join(name);
    opened.store.delete(&path).await.map_err(|source| failed(opened, source))
}

async fn read_claim(opened: &OpenedStore) -> Result<Option<VolumeId>, ClaimPrefixError> {
    let found = match opened.store.get(&path(opened)).await {
        Ok(found) => found,
        Err(ObjectError::NotFound { .. }) => return Ok(None),
        Err(source) => return Err(failed(opened, source)),
    };
    let unreadable = || ClaimPrefixError::Unreadable { store: opened.label.clone() };
    if found.meta.size > CLAIM_BYTES_MAX {
        return Err(unreadable());
    }
    let bytes = found.bytes().await.map_err(|source| failed(opened, source))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| unreadable())?;
    let begin = format!("{{\"format\":{CLAIM_FORMAT},\"volume\":\"");
    let volume = text.strip_prefix(&begin).and_then(|rest| rest.strip_suffix("\"}\n"));
    volume.and_then(|volume| volume.parse().ok()).map(Some).ok_or_else(unreadable)
}

fn path(opened: &OpenedStore) -> Path {
    opened.prefix.clone().join(CLAIM)
}

fn failed(opened: &OpenedStore, source: ObjectError) -> ClaimPrefixError {
    ClaimPrefixError::Store { store: opened.label.clone(), source }
}

/// Why a prefix is not, or cannot become, the block store of a volume.
#[derive(Debug, thiserror::Error)]
pub enum ClaimPrefixError {
    /// It belongs to a volume already.
    #[error("{store} holds the packs of volume {volume}")]
    Claimed {
        /// The store.
        store: String,
        /// The volume that it belongs to.
        volume: VolumeId,
    },
    /// It is not empty, and not a block store.
    #[error("{store} is not empty: it holds {object}")]
    Used {
        /// The store.
        store: String,
        /// One of the objects in it.
        object: String,
    },
    /// There is no claim where one should be.
    #[error("{store} is not a block store of this volume: {CLAIM} is missing")]
    Missing {
        /// The store.
        store: String,
    },
    /// The claim is damaged, or of a later version.
    #[error("{CLAIM} in {store} cannot be read by this version")]
    Unreadable {
        /// The store.
        store: String,
    },
    /// The store could not be asked.
    #[error("cannot use {store}: {source}")]
    Store {
        /// The store.
        store: String,
        /// What happened.
        source: ObjectError,
    },
}

/// The object that says whose packs these are.
const CLAIM: &str = "blocks.json";
const CLAIM_FORMAT: u32 = 0;
const CLAIM_BYTES_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use super::*;

    fn opened() -> OpenedStore {
        let label = "memory://some/prefix".to_owned();
        OpenedStore { store: Arc::new(InMemory::new()), prefix: Path::from("some/prefix"), label }
    }

    /// Two volumes under one prefix would be collected by each other.
    #[tokio::test]
    async fn a_prefix_is_claimed_once() {
        let (store, mine) = (opened(), VolumeId::from_bytes([1; 16]));
        claim_prefix(&store, mine).await.unwrap();
        check_prefix(&store, mine).await.unwrap();
        let other = VolumeId::from_bytes([2; 16]);
        let refused = claim_prefix(&store, other).await.unwrap_err();
        assert!(refused.to_string().contains(&mine.to_string()), "{refused}");
        assert!(matches!(check_prefix(&store, other).await, Err(ClaimPrefixError::Claimed { .. })));
        release_prefix(&store, mine).await.unwrap();
        claim_prefix(&store, other).await.unwrap();
    }

    #[tokio::test]
    async fn a_prefix_with_anything_in_it_is_refused() {
        let store = opened();
        store.store.put(&store.prefix.clone().join("x"), "y".into()).await.unwrap();
        let refused = claim_prefix(&store, VolumeId::default()).await.unwrap_err();
        assert!(matches!(refused, ClaimPrefixError::Used { .. }), "{refused}");
        assert!(refused.to_string().starts_with("memory://some/prefix is not empty"), "{refused}");
    }

    #[tokio::test]
    async fn a_damaged_claim_is_no_claim_of_anybody() {
        let store = opened();
        store.store.put(&path(&store), "{\"format\":9}".into()).await.unwrap();
        let refused = check_prefix(&store, VolumeId::default()).await.unwrap_err();
        assert!(matches!(refused, ClaimPrefixError::Unreadable { .. }), "{refused}");
    }
}
