//! Comparing two histories: what a log holds at an LSN, and where two logs part.
//!
//! Invariants:
//! - Two logs that have a frame end with equal hash at one LSN are equal up to it: the chain hash covers everything before.
//! - Frames travel and are stored whole, so the common ancestor of two logs is a frame end of both.
//! - A search asks for at most one point at a time and always ends: every answer narrows the range.

use murphy_log::{ChainHash, Epoch, Log, Lsn, ReadError};

/// A point of a history: the chain hash after one entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Point {
    /// The entry.
    pub lsn: Lsn,
    /// The chain hash after it.
    pub hash: ChainHash,
}

/// What a log holds at an LSN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// A frame ends there, or the log begins behind it.
    End(Point),
    /// The entry is inside a frame, or begins one of several entries.
    Inside {
        /// The frame end before it.
        before: Point,
        /// The end of its frame.
        end: Point,
    },
    /// The log no longer reaches back so far.
    Trimmed {
        /// The oldest LSN that is left.
        first: Lsn,
    },
    /// The log does not reach so far.
    Beyond {
        /// The last durable LSN.
        durable: Lsn,
    },
}

/// Looks at the durable part of a log.
pub fn look_up(log: &dyn Log, lsn: Lsn) -> Result<Lookup, ReadError> {
    let durable = log.durable().state().position;
    if lsn > durable.lsn {
        return Ok(Lookup::Beyond { durable: durable.lsn });
    }
    if lsn == durable.lsn {
        return Ok(Lookup::End(Point { lsn, hash: durable.hash }));
    }
    let first = log.first();
    if lsn.next() < first {
        return Ok(Lookup::Trimmed { first });
    }
    // The frame of the next entry knows the hash before itself.
    let frame = match log.read(lsn.next()).map(|mut reader| reader.next()) {
        Ok(Some(Ok(frame))) => frame,
        Err(ReadError::Trimmed { first, .. }) | Ok(Some(Err(ReadError::Trimmed { first, .. }))) => {
            return Ok(Lookup::Trimmed { first });
        }
        Err(error) | Ok(Some(Err(error))) => return Err(error),
        Ok(None) => return Ok(Lookup::Beyond { durable: lsn }),
    };
    let before = Point { lsn: frame.first().previous(), hash: frame.previous_hash() };
    if before.lsn == lsn {
        return Ok(Lookup::End(before));
    }
    Ok(Lookup::Inside { before, end: Point { lsn: frame.last(), hash: frame.position().hash } })
}

/// Whether frames of `epoch` must be refused once `promised` has been promised, or has begun.
pub(crate) fn is_older(epoch: Epoch, promised: Epoch) -> bool {
    epoch.number < promised.number || (epoch.number == promised.number && epoch.id != promised.id)
}

/// Finds the last frame end that two logs share, by halves.
#[derive(Debug)]
pub struct AncestorSearch {
    /// A point known to be common, if one is.
    common: Option<Point>,
    /// Frame ends up to here need not be looked at.
    low: Lsn,
    /// From here on the histories are known to differ.
    high: Lsn,
    /// The own frame end that the other side is being asked about.
    candidate: Option<Point>,
}

/// What a search wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SearchStep {
    /// Look the LSN up in the own log.
    Own(Lsn),
    /// Ask the other side about the LSN.
    Other(Lsn),
    /// The last common point; `None` if the logs do not reach back to one.
    Found(Option<Point>),
}

impl AncestorSearch {
    /// A search below `differs`, an own frame end that the other side does not have.
    pub fn new(differs: Lsn) -> AncestorSearch {
        AncestorSearch { common: None, low: Lsn::new(0), high: differs, candidate: None }
    }

    /// The first step.
    pub fn start(&self) -> SearchStep {
        SearchStep::Own(self.middle())
    }

    /// Takes what the own log holds at the LSN asked for.
    pub fn own(&mut self, found: Lookup) -> SearchStep {
        let candidate = match found {
            Lookup::End(point) => Some(point),
            Lookup::Inside { before, end } => {
                [before, end].into_iter().find(|point| point.lsn > self.low && point.lsn < self.high)
            }
            Lookup::Trimmed { first } => {
                let base = first.previous();
                // The log's own beginning is the oldest point that can be compared.
                self.low = self.low.max(Lsn::new(base.get().saturating_sub(1)));
                return self.next();
            }
            Lookup::Beyond { .. } => None,
        };
        let Some(candidate) = candidate.filter(|point| point.lsn > self.low && point.lsn < self.high) else {
            return SearchStep::Found(self.common);
        };
        self.candidate = Some(candidate);
        SearchStep::Other(candidate.lsn)
    }

    /// Takes what the other side holds at the LSN asked for; `None` if nobody asked about it.
    pub fn other(&mut self, lsn: Lsn, found: Lookup) -> Option<SearchStep> {
        let candidate = self.candidate.take_if(|candidate| candidate.lsn == lsn)?;
        match found {
            Lookup::End(point) if point == candidate => {
                self.common = Some(candidate);
                self.low = candidate.lsn;
            }
            Lookup::Trimmed { .. } => self.low = candidate.lsn,
            Lookup::End(_) | Lookup::Inside { .. } | Lookup::Beyond { .. } => self.high = candidate.lsn,
        }
        Some(self.next())
    }

    fn next(&self) -> SearchStep {
        if self.high.since(self.low) <= 1 {
            return SearchStep::Found(self.common);
        }
        SearchStep::Own(self.middle())
    }

    fn middle(&self) -> Lsn {
        self.low.advanced(self.high.since(self.low) / 2)
    }
}

#[cfg(test)]
mod tests {
    use murphy_log::{MemoryLog, State};

    use super::*;
    use crate::tests::{base_state, log_of, test_frames};

    /// Two logs that share `common` frames of `size` entries each and then go on apart.
    fn forked(common: usize, size: usize, own: usize, other: usize) -> (MemoryLog, MemoryLog, State) {
        let mut shared = test_frames(base_state(), 0, common, size);
        let fork = shared.last().map_or(base_state(), |frame| frame.state());
        let log = |frames: Vec<murphy_log::Frame>| log_of(base_state(), &frames);
        let with = |seed, count| {
            let mut frames = shared.clone();
            frames.extend(test_frames(fork, seed, count, size));
            frames
        };
        let logs = (log(with(1, own)), log(with(2, other)));
        shared.clear();
        (logs.0, logs.1, fork)
    }

    fn search(own: &MemoryLog, other: &MemoryLog) -> (Option<Point>, u32) {
        let mut search = AncestorSearch::new(own.tail().position.lsn);
        let (mut step, mut asked) = (search.start(), 0);
        loop {
            step = match step {
                SearchStep::Own(lsn) => search.own(look_up(own, lsn).unwrap()),
                SearchStep::Other(lsn) => {
                    asked += 1;
                    search.other(lsn, look_up(other, lsn).unwrap()).unwrap()
                }
                SearchStep::Found(point) => return (point, asked),
            };
        }
    }

    #[test]
    fn the_common_ancestor_is_found_wherever_it_is() {
        for size in [1, 3, 7] {
            for common in [0, 1, 2, 9, 40] {
                for (own, other) in [(1, 1), (5, 1), (1, 12), (30, 0)] {
                    let (mine, theirs, fork) = forked(common, size, own, other);
                    let (found, asked) = search(&mine, &theirs);
                    let expected = Point { lsn: fork.position.lsn, hash: fork.position.hash };
                    assert_eq!(found, Some(expected), "size {size} common {common} own {own} other {other}");
                    assert!(asked <= 10, "{asked} questions");
                }
            }
        }
    }

    #[test]
    fn logs_that_no_longer_reach_back_have_no_known_ancestor() {
        let (mine, theirs, _) = forked(4, 2, 20, 20);
        theirs.trim(Lsn::new(30)).unwrap();
        assert_eq!(search(&mine, &theirs).0, None);
    }

    #[test]
    fn an_answer_nobody_asked_for_is_refused() {
        let mut search = AncestorSearch::new(Lsn::new(100));
        assert_eq!(search.other(Lsn::new(7), Lookup::Beyond { durable: Lsn::new(3) }), None);
    }

    /// An own log that was trimmed in the middle of the search is searched from where it begins now.
    #[test]
    fn a_search_goes_on_where_the_own_log_begins() {
        for first in [2, 11, 20, 27, 28] {
            let (mine, theirs, fork) = forked(10, 3, 5, 5);
            mine.trim(Lsn::new(first)).unwrap();
            let expected = Point { lsn: fork.position.lsn, hash: fork.position.hash };
            assert_eq!(search(&mine, &theirs).0, Some(expected), "begins at {}", mine.first());
        }
        let (mine, theirs, _) = forked(10, 3, 5, 5);
        mine.trim(Lsn::new(40)).unwrap();
        assert_eq!(search(&mine, &theirs).0, None, "what they share is gone here");
    }
}
