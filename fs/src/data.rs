//! The bytes of files: packs, the stores that they live in, and reading them back verified.
//!
//! [`PackBuilder`] makes a pack, a [`BlockStore`] keeps it, [`PackFetcher`] reads from it; a [`StoreUrl`] says where a store
//! is. The format is `docs/formats/pack.md`.
//!
//! Invariants:
//! - No byte is returned that does not have the hash that the log vouches for.
//! - A pack is never changed, its name never used again.

mod buffers;
mod cache;
mod cell;
mod fetch;
mod flight;
mod intact;
mod location;
mod name;
mod pack;
mod store;
mod stores;

pub use cache::{CellCache, DiskCache, DiskCacheError};
pub use cell::CellFault;
pub use fetch::{FetchStats, PackFetcher, ReadError, SilentStore};
pub use intact::{HeldPack, IntactError, lend_intact, look_for_pack, put_intact, read_intact};
pub use location::{
    ClaimPrefixError, CredentialsError, DurableFolders, FailureDomain, LayeredStore, OpenStoreError,
    OpenedStore, PROBE_FOLDER, ParseStoreUrlError, ProbeError, StoreLayer, StoreUrl, adopt_prefix,
    check_prefix, claim_prefix, probe_put_if_absent, release_prefix, remove_object,
};
pub use name::{PackName, ParsePackNameError, WriterId};
pub use pack::{
    AddPieceError, FooterDigest, MAX_PACK_PLAIN, MAX_PACK_STORED, PackBuilder, PackDamage, PackError,
    PackFooter, PackMeta, PackReader, PlainOffset, SealedPack,
};
pub use store::{BlockStore, BlockStoreError, ObjectBlockStore, Refusal, StoredPack};
pub use stores::BlockStores;
