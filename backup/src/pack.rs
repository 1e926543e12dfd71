//! Packs on their way between block stores: which ones a slot names, and copying them verified.
//!
//! Invariants:
//! - A pack is put only after its footer, and every cell, was found to be what the log says.
//! - Copying is harmless to repeat: a name never changes its content.

use std::collections::BTreeMap;

use murphy_fs::{
    BlockStore, BlockStoreError, ObjectBlockStore, PackError, PackMeta, PackName, PackNumber, PackReader,
    PackRow, RowError, Table,
};
use murphy_log::{DecodeError, Frame, Lsn};

use crate::descriptor::Archive;

/// A pack that entries name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NamedPack {
    pub(crate) meta: PackMeta,
    /// The entry that referred to it first.
    pub(crate) since: Lsn,
    /// Whether these entries are the first that refer to it.
    pub(crate) is_new: bool,
    /// Whether the last of them to speak of it calls it missing.
    pub(crate) is_missing: bool,
}

impl Archive {
    /// The packs of the archive.
    pub fn packs(&self) -> ObjectBlockStore {
        let (store, prefix) = self.store().parts();
        ObjectBlockStore::new(store, prefix, self.url().to_owned())
    }
}

/// The packs that the entries of `frames` name, each once. Rows that say that nothing refers to a pack any more name none.
pub(crate) fn named_packs(frames: &[Frame]) -> Result<Vec<NamedPack>, NamedPackError> {
    let mut packs: BTreeMap<PackName, NamedPack> = BTreeMap::new();
    for entry in frames.iter().flatten() {
        let entry = entry?;
        let rows = entry.changes.iter().filter(|change| change.table == Table::Pack.number());
        for change in rows {
            let Some(value) = &change.value else { continue };
            let row =
                PackRow::decode(value).map_err(|source| NamedPackError::Row { lsn: entry.lsn, source })?;
            let number = <[u8; 8]>::try_from(&change.key[..]).map_or(0, u64::from_be_bytes);
            let (since, is_new) = (Lsn::new(number), number == entry.lsn.get());
            // Even if only the past refers to it, what was named or found here is needed from here on, and what is missing is not.
            let is_told = row.needed_since(PackNumber(number)).is_none_or(|since| since == entry.lsn);
            if row.live_bytes == 0 && !is_told {
                continue;
            }
            let (meta, is_missing) = (row.meta(), row.is_missing());
            let pack = packs.entry(meta.name).or_insert(NamedPack { meta, since, is_new, is_missing });
            pack.is_new |= is_new;
            pack.is_missing = is_missing;
        }
    }
    Ok(packs.into_values().collect())
}

/// The packs that nothing refers to any more after an entry of `frames` that is not behind `upto`. Nothing refers to them again later.
pub(crate) fn released_packs(frames: &[Frame], upto: Lsn) -> Result<Vec<PackName>, NamedPackError> {
    let mut released = Vec::new();
    for entry in frames.iter().take_while(|frame| frame.first() <= upto).flatten() {
        let entry = entry?;
        let rows = entry.changes.iter().filter(|change| change.table == Table::Pack.number());
        for value in rows.filter(|_| entry.lsn <= upto).filter_map(|change| change.value.as_ref()) {
            let row =
                PackRow::decode(value).map_err(|source| NamedPackError::Row { lsn: entry.lsn, source })?;
            if row.live_bytes == 0 {
                released.push(row.meta().name);
            }
        }
    }
    Ok(released)
}

/// Copies a pack from one store to the other, verified; returns its length in bytes.
pub(crate) async fn copy_pack(
    meta: &PackMeta,
    from: &dyn BlockStore,
    to: &dyn BlockStore,
) -> Result<u64, CopyPackError> {
    let bytes = from.get(meta.name).await?;
    let reader = PackReader::open(meta, bytes.clone()).and_then(|reader| reader.verify());
    reader.map_err(|source| CopyPackError::Damaged { store: from.label().into_owned(), source })?;
    let length = bytes.len() as u64;
    to.put(meta.name, bytes).await?;
    Ok(length)
}

/// Whether a pack's object is there with the right length.
pub(crate) async fn has_pack(meta: &PackMeta, store: &dyn BlockStore) -> Result<bool, BlockStoreError> {
    match store.size(meta.name).await {
        Ok(size) => Ok(size == meta.stored_len),
        Err(BlockStoreError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Why it is not known which packs a slot names.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NamedPackError {
    /// An entry cannot be read.
    #[error(transparent)]
    Entry(#[from] DecodeError),
    /// A row of an entry cannot be read.
    #[error("the pack row of entry {lsn}: {source}")]
    Row {
        /// The entry.
        lsn: Lsn,
        /// What is wrong with the row.
        source: RowError,
    },
}

/// Why a pack was not copied.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CopyPackError {
    /// One of the stores did not do what it was asked.
    #[error(transparent)]
    Store(#[from] BlockStoreError),
    /// It is not the pack that the log names.
    #[error("{source}, in {store}")]
    Damaged {
        /// The store that it was read from.
        store: String,
        /// What is wrong with it.
        source: PackError,
    },
}
