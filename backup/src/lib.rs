//! Murphy's archives: places in object storage that hold the log, snapshots and packs of one branch, and need nothing else to be
//! restored from. The formats are `docs/formats/archive.md`.
//!
//! An [`Archive`] is opened over an [`ArchiveStore`].

mod acknowledge;
mod descriptor;
mod document;
mod fence;
mod fields;
mod layout;
mod pack;
mod registry;
mod seal;
mod ship;
mod slot;
mod store;
#[cfg(test)]
mod testing;
mod walk;

pub use acknowledge::ArchiveAcknowledger;
pub use descriptor::{Archive, ArchiveKind, Descriptor, OpenArchiveError};
pub use document::{DocumentError, PositionText, StateText};
pub use fence::ArchiveFence;
pub use pack::{CopyPackError, NamedPackError};
pub use registry::{Record, Registry, RegistryError, RegistryView, StoredRecord};
pub use seal::{Occupant, OccupantError, SEAL_BYTES, SEAL_MAGIC, Seal, SealError};
pub use ship::{
    ArchiveStatus, CursorError, CursorFile, SaveCursor, ShipEnd, ShipHandle, ShipLimits, Shipper,
    ShipperParts,
};
pub use slot::{
    EncodeSlotError, Lineage, SLOT_BODY_BYTES_MAX, SLOT_BYTES_MAX, SLOT_FRAMES_MAX, SLOT_HEADER_BYTES,
    SLOT_MAGIC, Slot, SlotError, SlotHeader, encode_slot,
};
pub use store::{ArchiveStore, Creation, Listed, StoreError};
pub use walk::{Boundary, Walk, WalkError, walk};
