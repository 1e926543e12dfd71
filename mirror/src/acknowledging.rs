//! The set of members through which fsync is acknowledged: how many of it an fsync waits for, and how it follows the members of the log.
//!
//! ```text
//!   the log:   A joins   B joins            a mirror whose log ends here knows only A, and asks nobody else when it takes over:
//!                 |         |               nothing may be acknowledged that it would not find
//!                 +----+----+
//! ```
//!
//! Invariants:
//! - Whoever takes over, however far its log goes, meets a member that has what was acknowledged, or one whose log goes on.
//! - One that the log has removed never counts.

use std::collections::BTreeSet;

use murphy_log::{Lsn, NodeId};

/// The set that acknowledges, as its source remembers it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AcknowledgingSet {
    /// Its members.
    pub members: BTreeSet<NodeId>,
    /// What each of them must have before W of them suffice: where a promotion began whose members may not know each other yet.
    pub unsettled: Option<Lsn>,
}

/// What a source does next for its set to become what the members of the log are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SetStep {
    /// Nothing.
    Stay,
    /// The log has removed the others: only these count, at once.
    Leave(BTreeSet<NodeId>),
    /// Once each of the set has this, it is settled.
    Settle(Lsn),
    /// Once so many of these have the entries that made the members what they are, the members are the set.
    Grow {
        /// How many.
        asked: usize,
        /// Of whom.
        of: BTreeSet<NodeId>,
    },
}

impl AcknowledgingSet {
    /// How many of the set an fsync waits for, of which `wanted` have to acknowledge: all of them, until each has what made the others members.
    /// One that has not could take over and would ask nobody.
    pub fn needed(&self, wanted: usize) -> usize {
        match self.unsettled {
            None => wanted,
            Some(_) => wanted.max(self.members.len()),
        }
    }

    /// The next step towards `members`, while `wanted` of the set acknowledge.
    pub fn towards(&self, wanted: usize, members: &BTreeSet<NodeId>) -> SetStep {
        let kept: BTreeSet<NodeId> = self.members.intersection(members).copied().collect();
        if kept != self.members {
            return SetStep::Leave(kept);
        }
        if let Some(lsn) = self.unsettled {
            return SetStep::Settle(lsn);
        }
        if kept == *members {
            return SetStep::Stay;
        }
        if kept.len() < wanted {
            // Nothing is acknowledged yet, and any of the members may know too few of the others to ask anybody.
            return SetStep::Grow { asked: members.len(), of: members.clone() };
        }
        SetStep::Grow { asked: wanted, of: kept }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(bits: u32) -> BTreeSet<NodeId> {
        (0..8).filter(|bit| bits & (1 << bit) != 0).map(|bit| NodeId::from_bytes([bit; 16])).collect()
    }

    fn set(bits: u32) -> AcknowledgingSet {
        AcknowledgingSet { members: nodes(bits), unsettled: None }
    }

    /// The first `count` members, as bits.
    fn first(count: u32) -> u32 {
        (1 << count) - 1
    }

    fn of_size(within: u32, size: u32) -> impl Iterator<Item = u32> {
        (0..=within).filter(move |bits| bits & !within == 0 && bits.count_ones() == size)
    }

    /// The fear: two mirrors join, one of them acknowledges everything, and the other one, which has never heard of it, takes over alone.
    ///
    /// Members are bits, in the order in which the log has admitted them; those that were asked have all of it. Whoever takes over knows the
    /// first so many, itself included, and seals as many as `promote` asks for.
    #[test]
    fn whoever_takes_over_while_the_set_grows_meets_what_was_acknowledged() {
        let mut cases = 0u32;
        for (all, wanted) in (1..=5).flat_map(|all| (1..=all).map(move |wanted| (all, wanted))) {
            for before in 0..all {
                let step = set(first(before)).towards(wanted as usize, &nodes(first(all)));
                let SetStep::Grow { asked, of } = step else { panic!("{step:?}") };
                for informed in of_size(first(all), asked as u32).filter(|bits| nodes(*bits).is_subset(&of)) {
                    for known in before.max(1)..all {
                        let sealed = (known + 1).saturating_sub(wanted).max(1);
                        for sealed in of_size(first(known), sealed) {
                            for acknowledged in of_size(first(all), wanted) {
                                cases += 1;
                                let met = sealed & (acknowledged | informed);
                                assert!(
                                    met != 0,
                                    "{before} of {all} members, W {wanted}: {informed:b} know all, {acknowledged:b} \
                                     acknowledge, {sealed:b} of {known} are sealed"
                                );
                            }
                        }
                    }
                }
            }
        }
        assert!(cases > 1000, "{cases} cases");
    }

    /// A promotion seals some; those who know fewer members than the new source must not be able to take over from it.
    #[test]
    fn until_it_is_settled_every_member_of_the_set_acknowledges() {
        let base = Lsn::new(40);
        let set = AcknowledgingSet { unsettled: Some(base), ..set(0b111) };
        assert_eq!((set.needed(1), set.needed(4)), (3, 4));
        assert_eq!(set.towards(1, &nodes(0b1111)), SetStep::Settle(base));
        let settled = AcknowledgingSet { unsettled: None, ..set };
        assert_eq!(settled.needed(1), 1);
    }

    #[test]
    fn a_member_that_the_log_has_removed_does_not_count_and_is_not_waited_for() {
        let set = AcknowledgingSet { unsettled: Some(Lsn::new(40)), ..set(0b11) };
        assert_eq!(set.towards(1, &nodes(0b110)), SetStep::Leave(nodes(0b10)));
        let left = AcknowledgingSet { members: nodes(0b10), unsettled: None };
        assert_eq!(left.towards(1, &nodes(0b110)), SetStep::Grow { asked: 1, of: nodes(0b10) });
        assert_eq!(left.towards(1, &nodes(0b10)), SetStep::Stay);
    }
}
