//! How far copies are, in the form that `status` shows.
//!
//! Invariants:
//! - A lag is 0 only while the copy has everything that its source is known to have, and the word of the source is fresh.
//! - The lag of a copy that gets nothing grows with time; it is never an average of the past.

use std::{collections::VecDeque, time::Duration};

use murphy_log::{Lsn, NodeId};
use serde::Serialize;

/// A mirror, as the source sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct MirrorStatus {
    /// The mirror.
    #[serde(serialize_with = "as_text")]
    pub node: NodeId,
    /// Up to where it has the log durably.
    #[serde(serialize_with = "as_number")]
    pub metadata_lsn: Lsn,
    /// Up to where it has every byte too.
    #[serde(serialize_with = "as_number")]
    pub data_lsn: Lsn,
    /// For how long the oldest durable entry that it has not acknowledged has been durable, in milliseconds.
    pub lag_ms: u64,
    /// Whether it is connected.
    pub connected: bool,
    /// What its copy dies with, as it says; empty as long as it has not said.
    pub domains: Vec<String>,
    /// Why it does not follow, as it said when it was told who leads.
    pub refuses: Option<String>,
}

/// A mirror, as it sees itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FollowerStatus {
    /// Where the source was last reached or tried.
    pub address: String,
    /// Whether the source is connected and has accepted this mirror.
    pub connected: bool,
    /// The last LSN known to be durable at the source.
    #[serde(rename = "lsn", serialize_with = "as_number")]
    pub source_lsn: Lsn,
    /// Up to where the log is durable here.
    #[serde(serialize_with = "as_number")]
    pub metadata_lsn: Lsn,
    /// Up to where every byte is here too.
    #[serde(serialize_with = "as_number")]
    pub data_lsn: Lsn,
    /// For how long this mirror has been behind what it heard of, or has heard nothing, in milliseconds.
    pub lag_ms: u64,
    /// What went wrong last, until it goes right.
    pub error: Option<String>,
    /// The source has said that this mirror is no member any more.
    pub revoked: bool,
}

/// Measures for how long a copy has been behind.
#[derive(Debug, Default)]
pub(crate) struct LagMeter {
    reached: Lsn,
    /// What is to be reached, and when it was heard of; LSNs ascend, and are above `reached`.
    marks: VecDeque<(Lsn, Duration)>,
}

impl LagMeter {
    /// Hears that `lsn` is to be reached.
    pub(crate) fn heard(&mut self, now: Duration, lsn: Lsn) {
        let full = self.marks.len() >= MAX_MARKS;
        match self.marks.back_mut() {
            _ if lsn <= self.reached => {}
            Some((last, _)) if lsn <= *last => {}
            // A mark that also stands for later LSNs makes their lag a little too large, never too small.
            Some((last, at)) if full || now.saturating_sub(*at) < MARK_SPACING => *last = lsn,
            _ => self.marks.push_back((lsn, now)),
        }
    }

    /// Notes that everything up to `lsn` is there.
    pub(crate) fn reached(&mut self, lsn: Lsn) {
        self.reached = self.reached.max(lsn);
        while self.marks.pop_front_if(|(mark, _)| *mark <= lsn).is_some() {}
    }

    /// Starts again from what a new connection proves; what was to be reached stays so.
    pub(crate) fn restart(&mut self, lsn: Lsn) {
        self.reached = lsn;
        while self.marks.pop_front_if(|(mark, _)| *mark <= lsn).is_some() {}
    }

    /// For how long the copy has been behind; zero if it is not.
    pub(crate) fn lag(&self, now: Duration) -> Duration {
        self.marks.front().map_or(Duration::ZERO, |(_, at)| now.saturating_sub(*at))
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn as_number<S: serde::Serializer>(lsn: &Lsn, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(lsn.get())
}

fn as_text<S: serde::Serializer>(text: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(text)
}

/// At most so many moments are remembered.
const MAX_MARKS: usize = 256;
/// Moments closer together than this are one.
const MARK_SPACING: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_gets_nothing_falls_further_behind() {
        let mut meter = LagMeter::default();
        let ms = Duration::from_millis;
        meter.heard(ms(10), Lsn::new(5));
        meter.heard(ms(20), Lsn::new(9));
        assert_eq!(meter.lag(ms(110)), ms(100));
        meter.reached(Lsn::new(5));
        assert_eq!(meter.lag(ms(110)), ms(90));
        meter.reached(Lsn::new(9));
        assert_eq!(meter.lag(ms(999)), Duration::ZERO);
    }

    #[test]
    fn a_burst_longer_than_the_memory_is_not_made_younger() {
        let mut meter = LagMeter::default();
        for n in 0..10_000u64 {
            meter.heard(Duration::from_millis(2 * n), Lsn::new(2 + n));
        }
        assert!(meter.marks.len() <= MAX_MARKS);
        assert_eq!(meter.lag(Duration::from_secs(20)), Duration::from_secs(20));
        meter.reached(Lsn::new(10_001));
        assert_eq!(meter.lag(Duration::from_secs(20)), Duration::ZERO);
    }

    /// Programs read these: positions are numbers, and a node is what `members` calls it.
    #[test]
    fn the_status_in_json_has_numbers_and_the_nodes_own_text() {
        let node = NodeId::from_bytes([0xab; 16]);
        let mirror = MirrorStatus {
            node,
            metadata_lsn: Lsn::new(7),
            data_lsn: Lsn::new(6),
            lag_ms: 5,
            connected: true,
            domains: Vec::new(),
            refuses: None,
        };
        let json = serde_json::to_value(&mirror).unwrap();
        assert_eq!(json["node"], node.to_string());
        assert_eq!((&json["metadata_lsn"], &json["data_lsn"]), (&7.into(), &6.into()));
    }
}
