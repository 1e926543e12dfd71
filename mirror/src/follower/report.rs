//! What a follower has to say to people.

use std::time::Duration;

use murphy_log::{BranchId, Epoch, FrameError, Lsn, Position, VolumeId};

use crate::{
    history::Point,
    message::{Refusal, SeedReason},
};

/// What a follower has to say.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FollowerReport {
    /// The source refused it.
    #[error("the source refuses: {reason}: {detail}")]
    Refused {
        /// Why.
        reason: Refusal,
        /// What it said.
        detail: String,
    },
    /// The source sent something else than it may.
    #[error("the source breaks the protocol: {0}")]
    Protocol(String),
    /// The source serves another volume or branch than this mirror holds.
    #[error("the source serves volume {volume}, branch {branch}")]
    Foreign {
        /// Its volume.
        volume: VolumeId,
        /// Its branch.
        branch: BranchId,
    },
    /// A frame was damaged or does not continue the own history. Nothing of it was kept.
    #[error("refused what the source sent: {0}")]
    BadFrame(FrameError),
    /// A frame is of an epoch that has been sealed.
    #[error("refused lsn {lsn} of epoch {found}: epoch {promised} has been promised")]
    OldEpoch {
        /// The first entry.
        lsn: Lsn,
        /// Its epoch.
        found: Epoch,
        /// The promise.
        promised: Epoch,
    },
    /// The own log could not take a frame.
    #[error("cannot append lsn {lsn}: {message}")]
    Append {
        /// The first entry.
        lsn: Lsn,
        /// What the log said.
        message: String,
    },
    /// The own log cannot be read where it is compared with the source's.
    #[error("the own log cannot be read at lsn {lsn}: {message}")]
    Unreadable {
        /// Where.
        lsn: Lsn,
        /// What the log said.
        message: String,
    },
    /// The own log ends elsewhere than the source's history.
    #[error("this mirror and its source differ after lsn {}: kept lsn {} to {} as a branch", ancestor.lsn, ancestor.lsn.next(), tail.lsn)]
    Diverged {
        /// The last common point.
        ancestor: Point,
        /// The end of the own branch.
        tail: Position,
    },
    /// The own log ends elsewhere than the source's history, and begins behind where they part, or the source's does.
    #[error(
        "this mirror and its source differ, and what is left of their logs does not reach back to where: what is held up to lsn {} of epoch {} stays until a \
         snapshot can take its place, and is kept as a branch then",
        tail.lsn, tail.epoch.number
    )]
    Unrelated {
        /// The end of the own log.
        tail: Position,
    },
    /// A source offers a snapshot in the place of what may be given up for a later epoch than it leads only.
    #[error("what is held up to lsn {} of epoch {} is not given up for a source of epoch {}", tail.lsn, tail.epoch, leads)]
    NotReplaced {
        /// The end of the own log.
        tail: Position,
        /// The epoch that the source leads.
        leads: Epoch,
    },
    /// The own log ends elsewhere than the source's history, and could not be kept as a branch: nothing is given up.
    #[error("this mirror and its source differ, and the own branch could not be set aside: {0}")]
    NotSetAside(String),
    /// The source holds less than this mirror, and nothing else: it has lost entries.
    #[error(
        "the source is durable up to lsn {source_lsn}, this mirror holds its history up to {own_lsn}: the source has lost entries; started again it asks for them"
    )]
    Ahead {
        /// Where the source ends.
        source_lsn: Lsn,
        /// Where the mirror ends.
        own_lsn: Lsn,
    },
    /// The source goes on without frames of its own epoch, or a later one, that this mirror holds: it has lost entries.
    #[error(
        "this mirror and its source differ after lsn {}, and the source still leads the epoch: it has lost entries up to lsn {own_lsn}, which are kept here; murphy promote here goes on with them, murphy member remove with --assume-lost at the source gives them up",
        lsn_of(ancestor)
    )]
    Forked {
        /// The last common point.
        ancestor: Option<Point>,
        /// Where the mirror ends.
        own_lsn: Lsn,
    },
    /// A snapshot is coming.
    #[error("receiving a snapshot at lsn {lsn} ({reason:?})")]
    Seeding {
        /// Its position.
        lsn: Lsn,
        /// Why.
        reason: SeedReason,
    },
    /// The snapshot could not be installed.
    #[error("the snapshot was refused: {0}")]
    SeedFailed(String),
    /// The source has been silent.
    #[error("nothing heard from the source for {0:?}")]
    Silent(Duration),
}

fn lsn_of(ancestor: &Option<Point>) -> Lsn {
    ancestor.map_or(Lsn::new(0), |point| point.lsn)
}
