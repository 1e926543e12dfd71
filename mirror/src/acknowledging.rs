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

    /// A source with `--ack mirror=W`: what its log says of members, how much of it each node has, and who counts.
    #[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
    struct World {
        /// The members after each entry.
        log: Vec<u32>,
        /// So many entries of it each node has.
        has: Vec<usize>,
        set: u32,
        removals: u32,
    }

    impl World {
        fn members(&self) -> u32 {
            self.log.last().copied().unwrap_or_default()
        }

        fn informed(&self) -> u32 {
            (0..NODES)
                .filter(|node| self.has[*node as usize] == self.log.len())
                .fold(0, |bits, node| bits | 1 << node)
        }

        /// What can happen next, when `wanted` are waited for.
        fn next(&self, wanted: u32) -> Vec<World> {
            let mut worlds = Vec::new();
            // Something is written, and members stay.
            if self.log.len() < 2 || self.log[self.log.len() - 2] != self.members() {
                let mut next = self.clone();
                next.log.push(self.members());
                worlds.push(next);
            }
            for node in 0..NODES {
                let (bit, members) = (1 << node, self.members());
                let entry = |members: u32, change: &dyn Fn(&mut World)| {
                    let mut next = self.clone();
                    next.log.push(members);
                    change(&mut next);
                    next
                };
                let was = self.log.iter().any(|members| members & bit != 0);
                if !was {
                    // One after the other: they are alike. Whoever joins begins with a snapshot that has its own entry.
                    worlds.push(entry(members | bit, &|next| next.has[node as usize] = next.log.len()));
                    break;
                } else if members & bit != 0 && self.removals < REMOVALS {
                    // Given up: nobody else has to have heard of it.
                    worlds.push(entry(members & !bit, &|next| {
                        next.set &= !bit;
                        next.removals += 1;
                    }));
                }
                if was && members & bit != 0 && self.has[node as usize] < self.log.len() {
                    let mut next = self.clone();
                    next.has[node as usize] += 1;
                    worlds.push(next);
                }
            }
            let step = AcknowledgingSet { members: nodes(self.set), unsettled: None };
            if let SetStep::Grow { asked, of } = step.towards(wanted as usize, &nodes(self.members()))
                && nodes(self.informed()).intersection(&of).count() >= asked
            {
                worlds.push(World { set: self.members(), ..self.clone() });
            }
            worlds
        }

        /// Whether a member that takes over may end without having met anybody who has all of it. Nodes that were removed and do not know it
        /// promise as the others do.
        fn misses(&self, taker: u32, wanted: u32) -> bool {
            let mut known = self.has[taker as usize];
            loop {
                let members = self.log[known - 1] | 1 << taker;
                let needed = (members.count_ones() + 1).saturating_sub(wanted.max(1)).max(1);
                let sealed = |bits: &u32| bits & 1 << taker != 0;
                // Those that answer are the ones that have the least of it.
                let furthest = |bits: u32| {
                    (0..NODES).filter(|node| bits & 1 << node != 0).map(|node| self.has[node as usize]).max()
                };
                let least =
                    of_size(members, needed).filter(sealed).filter_map(furthest).min().unwrap_or(known);
                if least == self.log.len() {
                    return false;
                }
                if least == known || self.log[least - 1] == self.log[known - 1] {
                    return true;
                }
                known = least;
            }
        }
    }

    /// The fear: members are given up, others join and count at once, and one that was away takes over from nobody, because it still asks those
    /// that were given up.
    #[test]
    fn whoever_takes_over_after_members_were_given_up_meets_what_was_acknowledged() {
        let mut judged = 0u32;
        for wanted in 1..=2 {
            let mut seen = BTreeSet::new();
            let mut open = vec![World { log: Vec::new(), has: vec![0; NODES as usize], set: 0, removals: 0 }];
            while let Some(world) = open.pop() {
                if world.log.len() > ENTRIES || !seen.insert(world.clone()) {
                    continue;
                }
                // Something is acknowledged now by W of the set that have everything, and by nobody else.
                let is_acknowledged = (world.set & world.informed()).count_ones() >= wanted;
                for taker in (0..NODES).filter(|node| is_acknowledged && world.members() & 1 << node != 0) {
                    judged += 1;
                    assert!(
                        !world.misses(taker, wanted),
                        "W {wanted}, {taker} takes over: members {:?}, has {:?}, set {:b}",
                        world.log,
                        world.has,
                        world.set
                    );
                }
                open.extend(world.next(wanted));
            }
        }
        assert!(judged > 10_000, "{judged} take-overs");
    }

    const NODES: u32 = 4;
    const ENTRIES: usize = 7;
    const REMOVALS: u32 = 2;
}
