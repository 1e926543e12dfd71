//! Murphy's archives: places in object storage that hold the log, snapshots and packs of one branch, and need nothing else to be
//! restored from. The formats are `docs/formats/archive.md`.
//!
//! An [`Archive`] is opened over an [`ArchiveStore`].

mod acknowledge;
mod base;
mod descriptor;
mod document;
mod fence;
mod fields;
mod holdings;
mod layout;
mod pack;
mod plan;
mod proof;
mod registry;
mod rejoin;
mod restore;
mod seal;
mod sealing;
mod ship;
mod slot;
mod store;
mod strays;
mod survey;
mod surveyed;
mod take_over;
mod target;
#[cfg(test)]
mod testing;
mod verify;
mod walk;

pub use acknowledge::ArchiveAcknowledger;
pub use base::{
    BaseManifest, BasePart, BaseReader, NewBase, PackRowError, ReadBaseError, WriteBaseError, bases,
    read_base, snapshot_due, write_base,
};
pub use descriptor::{Archive, ArchiveKind, Descriptor, OpenArchiveError};
pub use document::{DocumentError, PositionText, StateText};
pub use fence::{ArchiveFence, Supplies};
pub use holdings::{HeldSnapshot, Holdings, HoldingsError, Moment, SealedBy, Verified, holdings};
pub use pack::{CopyPackError, NamedPackError};
pub use plan::{PlanError, PlannedSlot, PlannedSnapshot, RestorePlan, Route, Window, plan_restore};
pub use proof::{Proof, ProofError, RESTORE, VERIFY};
pub use registry::{Pin, Record, Registry, RegistryError, RegistryView, StoredRecord};
pub use rejoin::{NotContinued, check_continued_by};
pub use restore::{
    OnProgress, PackReport, RestoreError, RestoreProgress, count_packs, planned_rows, planned_usage,
    restore_packs, restore_tree,
};
pub use seal::{Occupant, OccupantError, SEAL_BYTES, SEAL_MAGIC, Seal, SealError};
pub use ship::{
    ArchiveStatus, CursorError, CursorFile, KnownLosses, Losses, LostPacks, NoCursor, SaveCursor, ShipEnd,
    ShipHandle, ShipLimits, Shipper, ShipperParts,
};
pub use slot::{
    EncodeSlotError, Lineage, SLOT_BODY_BYTES_MAX, SLOT_BYTES_MAX, SLOT_FRAMES_MAX, SLOT_HEADER_BYTES,
    SLOT_MAGIC, Slot, SlotError, SlotHeader, encode_slot,
};
pub use store::{ArchiveStore, Creation, Listed, StoreError};
pub use strays::{Reach, Stray, StrayKind, StraysError, reach, strays, strays_behind};
pub use survey::{ReadSlotError, SurveyError};
pub use surveyed::{FrameEnd, SlotKey, Step, Survey, next_step};
pub use take_over::{
    Newest, PlaceStanding, SILENCE, Silence, Successor, TakeOverError, TakeOverLog, Watch, take_over_at,
};
pub use target::{Target, TargetError, show_time};
pub use verify::{Finding, FindingKind, VerifyReport, verify};
pub use walk::{Boundary, Objection, Walk, WalkError, walk};
