//! Murphy's file system: the tree, decided entry by entry, and the bytes that it names.
//!
//! [`FileSystem`] is the way in; [`Name`], [`Ino`], [`Attr`] and [`Errno`] are its words. Rows ([`InodeRow`], [`DentryRow`], ...) are
//! what entries write, by [`RowKey`], into an [`Index`].

mod acknowledge;
mod applier;
mod attr;
mod changes;
mod check;
mod data;
mod decide;
mod errno;
mod file_system;
mod fuse;
mod index;
mod ino;
mod log_time;
mod name;
mod overlay;
mod rows;
mod sequencer;
mod snapshot;
mod sync;
mod table;
mod view;
mod volume;

pub use acknowledge::{
    AcknowledgeError, Acknowledgement, Acknowledger, Fence, FenceError, FenceFuture, Held, Mandate, Sealed,
};
pub use attr::{Attr, DIRECTORY_BYTES, Kind, SetAttr, SetTime, StatFs, Timespec};
pub use changes::{ChangeObserver, Observation};
pub use check::{FINDINGS_MAX, Finding, TreeCounts, check_tree, check_tree_with};
pub use data::{
    AddPieceError, BlockStore, BlockStoreError, BlockStores, CellCache, CellFault, ClaimPrefixError,
    CredentialsError, DiskCache, DiskCacheError, DurableFolders, FailureDomain, FetchStats, FooterDigest,
    HeldPack, IntactError, LayeredStore, MAX_PACK_PLAIN, MAX_PACK_STORED, ObjectBlockStore, OpenStoreError,
    OpenedStore, PROBE_FOLDER, PackBuilder, PackDamage, PackError, PackFetcher, PackFooter, PackMeta,
    PackName, PackReader, ParsePackNameError, ParseStoreUrlError, PlainOffset, ProbeError, ReadError,
    Refusal, SealedPack, SilentStore, StoreLayer, StoreUrl, StoredPack, WriterId, adopt_prefix, check_prefix,
    claim_prefix, lend_intact, look_for_pack, probe_put_if_absent, put_intact, read_intact, release_prefix,
    remove_object,
};
pub use decide::{EntryKind, PACKS_PER_ENTRY, PackNews};
pub use errno::Errno;
pub use file_system::{
    Answer, Caller, DirEntry, DirEntryPlus, FileSystem, Handle, NewNode, OpenFlags, Opened, RenameMode,
    XattrMode,
};
pub use fuse::{
    InvalidationStats, Invalidator, Lifetimes, Mount, MountError, MountOptions, NODE_XATTR, Notifier,
    RequestCounts, RequestKind, UnmountError, detach_below, try_mount,
};
#[doc(hidden)]
pub use fuse::{RequestCounters, Session, kernel_config};
pub use index::{
    DigestCheck, FjallIndex, FjallOptions, Fold, FoldError, FoldedRows, Index, IndexError, IndexSnapshot,
    MemoryIndex, OpenIndexError, ReplayBudget, ReplayError, RowIterator, check_digest, check_digest_while,
    replay,
};
pub use ino::Ino;
pub use name::{NAME_MAX, Name, XattrName};
pub use rows::{
    Cookie, DentryRow, DirectoryRow, Extent, ExtentRow, ExtentTarget, InodeRow, MEMBER_ADDRESSES,
    MEMBER_NAME_BYTES, MemberRole, MemberRow, MemberState, NameHasher, OrphanRow, PackNumber, PackRow,
    PackState, RowError, SLOT_BYTES, SLOTS, SessionRow, SettingRow, SymlinkRow, UnknownRole, XattrRow,
};
pub use snapshot::{
    BlockFault, Disagreement, ReadSnapshotError, RowBatch, SectionBytes, SnapshotHeader, SnapshotOrigin,
    SnapshotProgress, SnapshotReader, SnapshotSummary, WriteSnapshotError, verify_snapshot, write_snapshot,
};
pub use table::{RowKey, Table};
pub use view::{View, ViewError};
pub use volume::{OpenVolumeError, Volume, VolumeOptions, VolumeParts};
