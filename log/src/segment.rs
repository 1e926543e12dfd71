//! Segment files: runs of frames under one header; `docs/formats/segment.md` is their description.
//!
//! ```text
//!  header | mark frame mark frame | mark frame | mark frame mark frame | zeros, preallocated
//!           one write + sync        the next     ...
//! ```
//!
//! Invariants:
//! - A file named `<first LSN>.seg` has a header that was synced before it got the name, and everything in the segment
//!   before it was durable by then.
//! - A mark is written before every frame. It names what had been synced before the write that it is in: a valid mark proves that all of
//!   that was durable. Nothing else in a file does.

mod fork;
mod header;
mod mark;
mod recover;
mod repair;
mod run;
mod salvage;
mod scan;
mod writer;

use crate::Lsn;

pub use fork::ForkError;
pub use header::{HeaderError, SEGMENT_HEADER_BYTES, SEGMENT_MAGIC, SEGMENT_VERSION, SegmentHeader};
pub use mark::{LOG_SECRET_BYTES, LogSecret};
pub(crate) use mark::{MARK_BYTES, Marks};
pub use recover::{OpenError, Recovery, Scrub};
pub(crate) use recover::{Place, Torn, look, recover};
pub use repair::{FetchFrames, RepairError};
pub(crate) use scan::{Behind, Scan, Step};
pub(crate) use writer::{SegmentWriter, frame_cost, prepare_spare};

/// The name of the segment whose first entry is `first`.
pub(crate) fn segment_name(first: Lsn) -> String {
    format!("{:020}{SEGMENT_SUFFIX}", first.get())
}

/// The first LSN of the segment with this name; `None` if it is not the name of a segment.
pub(crate) fn parse_segment_name(name: &str) -> Option<Lsn> {
    let digits = name.strip_suffix(SEGMENT_SUFFIX)?;
    let all_digits = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = all_digits.then(|| digits.parse().ok())??;
    Some(Lsn::new(number))
}

const SEGMENT_SUFFIX: &str = ".seg";
/// Files with this ending are not finished, and removed at the next open.
pub(crate) const UNFINISHED_SUFFIX: &str = ".tmp";
/// The segment that waits to become the next.
pub(crate) const SPARE_NAME: &str = "spare.tmp";
