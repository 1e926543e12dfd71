//! Packs on their way between block stores: which ones a slot names, and copying them verified.
//!
//! Invariants:
//! - A pack is put only after its footer, and every cell, was found to be what the log says.
//! - Copying is harmless to repeat: a name never changes its content. Only what is damaged there is replaced.

use std::collections::BTreeMap;

use murphy_fs::{
    BlockStore, BlockStoreError, IntactError, ObjectBlockStore, PackError, PackMeta, PackName, PackNumber,
    PackRow, RowError, Table, put_intact, read_intact,
};
use murphy_log::{DecodeError, Frame, Lsn};

use crate::descriptor::Archive;

/// A pack that entries name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NamedPack {
    pub(crate) meta: PackMeta,
    /// The entry that referred to it first.
    pub(crate) since: Lsn,
    /// Whether these entries are the first that refer to it, or say that it was found: before them nobody has brought it.
    pub(crate) is_new: bool,
    /// Whether the last of them to speak of it calls it missing.
    pub(crate) is_missing: bool,
    /// The entry from which on a copy needs it, as the last of them to speak of it says: that it was found makes it another one.
    pub(crate) needed: Lsn,
}

impl Archive {
    /// The packs of the archive.
    pub fn packs(&self) -> ObjectBlockStore {
        self.store().packs()
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
            let needed = row.needed_since(PackNumber(number));
            let is_told = needed.is_none_or(|needed| needed == entry.lsn);
            let needed = needed.unwrap_or(since);
            if row.live_bytes == 0 && !is_told {
                continue;
            }
            let (meta, is_missing) = (row.meta(), row.is_missing());
            let pack = packs.entry(meta.name).or_insert(NamedPack {
                meta,
                since,
                is_new: false,
                is_missing,
                needed,
            });
            pack.is_new |= is_new || is_told;
            (pack.is_missing, pack.needed) = (is_missing, needed);
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

/// Copies a pack from one store to the other, verified; returns its length in bytes. Of several stores behind `from` the first is taken
/// that has it intact.
pub(crate) async fn copy_pack(
    meta: &PackMeta,
    from: &dyn BlockStore,
    to: &dyn BlockStore,
) -> Result<u64, CopyPackError> {
    let bytes = read_intact(from, meta).await?;
    let length = bytes.len() as u64;
    put_intact(to, meta.name, bytes).await?;
    Ok(length)
}

/// Whether the object of a pack that was brought there, verified, before is still there: that is all that its length tells.
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
    /// Nobody has the pack that the log names intact.
    #[error("{source}, in {stores}")]
    Damaged {
        /// The stores that have it.
        stores: String,
        /// What is wrong in the first of them.
        source: PackError,
    },
}

impl From<IntactError> for CopyPackError {
    fn from(error: IntactError) -> CopyPackError {
        match error {
            IntactError::Damaged { stores, source } => CopyPackError::Damaged { stores, source },
            IntactError::Store(error) => CopyPackError::Store(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use murphy_fs::BlockStores;

    use super::*;
    use crate::testing::{Fault, FaultyStore, pack};

    /// The fear: of two archives one has a damaged pack, and a promoted node never ships it anywhere, although the other has it whole.
    #[tokio::test]
    async fn a_damaged_pack_in_one_store_does_not_hide_an_intact_one_in_another() {
        let (sealed, row) = pack(1, b"the bytes of a pack");
        let stores = [FaultyStore::new(), FaultyStore::new(), FaultyStore::new()];
        let [own, damaged, intact] = stores.each_ref().map(FaultyStore::block_store);
        for store in [&damaged, &intact] {
            store.put(sealed.name, sealed.bytes.clone()).await.unwrap();
        }
        stores[1].fail("packs/", Fault::WrongBytes, usize::MAX);
        let from = BlockStores::new(Arc::new(own.clone()), vec![Arc::new(damaged.clone()), Arc::new(intact)]);
        assert_eq!(copy_pack(&row.meta(), &from, &own).await.unwrap(), row.meta().stored_len);
        assert_eq!(own.get(sealed.name).await.unwrap(), sealed.bytes);
        // A promoted node ships from its own stores, which are several already, and from the archives behind them.
        let node: Arc<dyn BlockStore> = Arc::new(BlockStores::new(Arc::new(damaged.clone()), Vec::new()));
        let places = BlockStores::new(node, vec![Arc::new(own)]);
        let target = ObjectBlockStore::in_memory();
        assert_eq!(copy_pack(&row.meta(), &places, &target).await.unwrap(), row.meta().stored_len);
        let only = BlockStores::new(Arc::new(ObjectBlockStore::in_memory()), vec![Arc::new(damaged)]);
        let refused = copy_pack(&row.meta(), &only, &ObjectBlockStore::in_memory()).await.unwrap_err();
        assert!(matches!(refused, CopyPackError::Damaged { .. }), "{refused}");
    }
}
