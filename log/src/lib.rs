//! Murphy's log: the append-only, hash-chained ground that everything else is derived from.
//!
//! [`Entry`] is one mutation, [`Position`] names a history, [`Clock`] is where time comes from. An [`Appender`] makes
//! [`Frame`]s of sequenced entries, a [`Log`] makes them durable ([`DiskLog`] in segment files, [`MemoryLog`] in memory) and
//! a [`FrameReader`] follows it.

mod admit;
mod append;
mod aside;
mod chain;
mod clock;
pub mod conformance;
mod disk;
mod entry;
pub mod faulty;
mod files;
mod frame;
mod log;
mod lsn;
mod memory;
mod position;
mod segment;
mod watch;

pub use append::{Appender, PushError};
pub use aside::{InPlace, aside, spawn_blocking, works_in_place};
pub use chain::VolumeKeys;
pub use clock::{Clock, LogTime, ManualClock, SystemClock};
pub use disk::{Access, DiskLog, DiskOptions, Drive};
pub use entry::{
    Change, DecodeError, EncodeError, Entry, ForwardedRequest, KIND_TICK, MAX_CHANGES, MAX_ENTRY_BYTES,
    MAX_NAMES, Requester, WrittenRow, decode_entry, encode_entry,
};
pub use files::{
    DirectoryLock, FileReader, FileWriter, Files, OsFiles, SegmentFile, UNFINISHED, rename_durably,
    replace_file, replace_private_file, unfinished,
};
pub use frame::{
    Entries, FEATURE_LEVEL, FRAME_BYTES, FRAME_HEADER_BYTES, FRAME_MAGIC, Frame, FrameError, FrameHeader,
    MAX_FRAME_BYTES, UnverifiedFrame,
};
pub use log::{
    AppendCopyError, AppendError, ClaimError, FrameReader, FrameSource, Log, ReadError, TrimError,
    append_copy,
};
pub use lsn::Lsn;
pub use memory::MemoryLog;
pub use position::{
    BranchId, ChainHash, Digest, Epoch, EpochId, NodeId, ParseIdError, Position, State, Usage, VolumeId,
};
pub use segment::{
    FetchFrames, ForkError, HeaderError, LOG_SECRET_BYTES, LogSecret, OpenError, Recovery, RepairError,
    SEGMENT_HEADER_BYTES, SEGMENT_MAGIC, SEGMENT_VERSION, Scrub, SegmentHeader,
};
pub use watch::{Durable, DurableWatch, Terminal, WaitError};
