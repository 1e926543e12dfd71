//! Asking a store whether it honours put-if-absent, before anything is entrusted to it.

use object_store::{Error as ObjectError, ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path};

/// Writes two objects of one name with put-if-absent below `prefix` of `store`, and sees whether the second is refused and
/// the first kept. Slots, seals and pack names rely on it: a store that overwrites would lose acknowledged data.
///
/// The object lies in [`PROBE_FOLDER`] and is deleted; where deleting is not permitted it stays, which does no harm.
pub async fn probe_put_if_absent(store: &dyn ObjectStore, prefix: &Path) -> Result<(), ProbeError> {
    let label = || store.to_string();
    let failed = |source| ProbeError::Store { store: label(), source };
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(ProbeError::Random)?;
    let name: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = prefix.clone().join(PROBE_FOLDER).join(name);
    let create = |text: String| store.put_opts(&path, text.into(), PutOptions::from(PutMode::Create));
    let first = format!("first {path}");
    create(first.clone()).await.map_err(failed)?;
    let second = create(format!("second {path}")).await;
    let kept = match store.get(&path).await {
        Ok(result) => result.bytes().await.map_err(failed)?,
        Err(error) => return Err(failed(error)),
    };
    if let Err(error) = store.delete(&path).await {
        tracing::warn!(store = label(), %path, %error, "the probe object cannot be deleted; it does no harm");
    }
    match second {
        Err(ObjectError::AlreadyExists { .. } | ObjectError::Precondition { .. })
            if kept == first.as_bytes() =>
        {
            Ok(())
        }
        Ok(_) | Err(ObjectError::AlreadyExists { .. } | ObjectError::Precondition { .. }) => {
            Err(ProbeError::NotHonoured { store: label() })
        }
        Err(error) => Err(failed(error)),
    }
}

/// Why a store cannot be relied on.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It lets one object overwrite another.
    #[error(
        "{store} does not honour put-if-absent: a second object of the same name was accepted or replaced the first"
    )]
    NotHonoured {
        /// The store.
        store: String,
    },
    /// It could not be asked, or cannot do such a put at all.
    #[error("cannot test {store}: {source}")]
    Store {
        /// The store.
        store: String,
        /// What happened.
        source: ObjectError,
    },
    /// No randomness.
    #[error("the operating system gives no random bytes: {0}")]
    Random(getrandom::Error),
}

/// The folder of probe objects below a prefix.
pub const PROBE_FOLDER: &str = "probe";
