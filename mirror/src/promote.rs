//! Taking over: who must be sealed, what would be lost, and the order of the steps.
//!
//! Invariants:
//! - With `mirror=W` of N members at least N-W+1 are sealed, or given up by name, before the next epoch is claimed: the old source can then
//!   no longer find W who acknowledge.
//! - The next epoch begins after the longest history of the latest epoch that any sealed member holds: whatever was acknowledged is in it.
//! - Planning is pure; execution does nothing that the plan does not say.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use murphy_log::{Epoch, Lsn, NodeId, Position, State};

use crate::history::is_older;

/// What the volume's log says about acknowledging.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AckPolicy {
    /// The source alone (`--ack local`), or archives, which have a fence of their own.
    Local,
    /// So many of these members (`--ack mirror=W`).
    Mirrors {
        /// W.
        wanted: usize,
        /// All N.
        members: BTreeSet<NodeId>,
    },
}

impl AckPolicy {
    /// How many members must be sealed.
    pub fn seals_needed(&self) -> usize {
        match self {
            AckPolicy::Local => 0,
            AckPolicy::Mirrors { wanted, members } => (members.len() + 1).saturating_sub((*wanted).max(1)),
        }
    }

    fn members(&self) -> BTreeSet<NodeId> {
        match self {
            AckPolicy::Local => BTreeSet::new(),
            AckPolicy::Mirrors { members, .. } => members.clone(),
        }
    }
}

/// Where a mirror stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Its last durable state.
    pub state: State,
    /// Up to where it has every byte too.
    pub data_lsn: Lsn,
    /// The last LSN that it heard of from the source.
    pub heard_lsn: Lsn,
}

/// What a promotion starts from.
#[derive(Clone, Debug)]
pub struct PromoteRequest {
    /// The mirror that is to take over.
    pub own: NodeId,
    /// The epoch that it would begin: later than every one that it knows of, promises included. A promotion that was cut short is tried
    /// again with the same one.
    pub next: Epoch,
    /// Who may acknowledge.
    pub policy: AckPolicy,
    /// Members that are given up: they count as sealed, and never come back with what only they hold.
    pub assume_lost: BTreeSet<NodeId>,
}

impl PromoteRequest {
    /// The members that must be asked: all that could acknowledge, without this node and those given up.
    pub fn to_seal(&self) -> BTreeSet<NodeId> {
        let mut members = self.policy.members();
        members.retain(|member| *member != self.own && !self.assume_lost.contains(member));
        members
    }

    /// Decides with what is known: this node's standing, and what the members answered.
    pub fn plan(
        &self,
        own: Standing,
        answers: &BTreeMap<NodeId, Result<Option<Standing>, String>>,
    ) -> Result<PromotePlan, PlanError> {
        let members = self.policy.members();
        let lost: BTreeSet<NodeId> = self.assume_lost.intersection(&members).copied().collect();
        let sealed = |node: &&NodeId| **node == self.own || matches!(answers.get(*node), Some(Ok(_)));
        let sealed = members.iter().filter(sealed).count();
        let needed = self.policy.seals_needed();
        if sealed + lost.len() < needed {
            let missing = self.to_seal().into_iter().filter_map(|node| match answers.get(&node) {
                Some(Ok(_)) => None,
                Some(Err(why)) => Some(Unsealed { node, why: why.clone() }),
                None => Some(Unsealed { node, why: "not asked".to_owned() }),
            });
            return Err(PlanError::TooFew { sealed, needed, missing: Missing(missing.collect()) });
        }
        let standings = answers.iter().filter_map(|(node, answer)| Some((*node, (*answer.as_ref().ok()?)?)));
        let standings: Vec<(NodeId, Standing)> = standings.collect();
        // What an older epoch has beyond the start of a later one has lost, however long it is.
        let end = |standing: &Standing| {
            let position = standing.state.position;
            (position.epoch.number, position.lsn)
        };
        let longest = standings.iter().max_by_key(|(_, standing)| end(standing));
        let longest = longest.filter(|(_, standing)| end(standing) > end(&own));
        let fork =
            standings.iter().find(|(_, standing)| is_fork(&own.state.position, &standing.state.position));
        if let Some((node, standing)) = fork {
            return Err(PlanError::Forked { node: *node, position: standing.state.position });
        }
        let base = longest.map_or(own.state, |(_, standing)| standing.state);
        // Bytes that a member has acknowledged may be nowhere else: nobody who lacks them goes on without that member being given up.
        let bytes = |standing: &Standing| standing.data_lsn.min(base.position.lsn);
        let fuller = standings.iter().filter(|(node, _)| members.contains(node) && !lost.contains(node));
        if let Some((node, standing)) = fuller.max_by_key(|(_, standing)| bytes(standing))
            && longest.is_none()
            && bytes(standing) > own.data_lsn
        {
            return Err(PlanError::Bytes { node: *node, held: bytes(standing), own: own.data_lsn });
        }
        let heard = standings.iter().map(|(_, standing)| standing.heard_lsn).fold(own.heard_lsn, Lsn::max);
        Ok(PromotePlan {
            epoch: self.next,
            base,
            data_lsn: own.data_lsn.min(base.position.lsn),
            heard_lsn: heard.max(base.position.lsn),
            catch_up: longest.map(|(node, standing)| (*node, standing.state.position)),
            sealed,
            needed,
            lost,
        })
    }
}

/// Whether what a member holds shows that this node's end lies on another history: the member goes on in a later epoch from before it, or
/// has another entry there.
fn is_fork(own: &Position, held: &Position) -> bool {
    match held.lsn.cmp(&own.lsn) {
        Ordering::Less => is_older(own.epoch, held.epoch),
        Ordering::Equal => held.hash != own.hash,
        Ordering::Greater => false,
    }
}

/// What taking over would do, and cost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PromotePlan {
    /// The epoch that begins.
    pub epoch: Epoch,
    /// The state that it begins after: the metadata position.
    pub base: State,
    /// Up to where this node has every byte of it.
    pub data_lsn: Lsn,
    /// The last LSN that anybody reachable has heard of from the old source.
    pub heard_lsn: Lsn,
    /// The member that holds more than this node, and up to where: fetched first.
    pub catch_up: Option<(NodeId, Position)>,
    /// How many members of the acknowledging set are sealed, this node included.
    pub sealed: usize,
    /// How many must be.
    pub needed: usize,
    /// The members that are given up.
    pub lost: BTreeSet<NodeId>,
}

impl PromotePlan {
    /// How many entries are known to have existed and are in no reachable copy.
    pub fn lost_entries(&self) -> u64 {
        self.heard_lsn.since(self.base.position.lsn)
    }

    /// For how many entries some bytes may be missing here; they may still come from an archive or the old store.
    pub fn entries_without_bytes(&self) -> u64 {
        self.base.position.lsn.since(self.data_lsn)
    }
}

impl fmt::Display for PromotePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let base = &self.base.position;
        writeln!(f, "next epoch         {}", self.epoch.number)?;
        writeln!(f, "metadata position  lsn {}", base.lsn)?;
        writeln!(f, "data position      lsn {}", self.data_lsn)?;
        writeln!(f, "source last known  lsn {}", self.heard_lsn)?;
        if let Some((node, position)) = &self.catch_up {
            writeln!(f, "fetched first      up to lsn {} from member {node}", position.lsn)?;
        }
        writeln!(f, "sealed members     {} of {} needed", self.sealed, self.needed)?;
        for node in &self.lost {
            writeln!(f, "given up           member {node}: what only it has acknowledged is lost")?;
        }
        let (lost, end) = (self.lost_entries(), self.heard_lsn);
        if lost == 0 {
            writeln!(f, "known loss         none; what the source did after its last word is not known")?;
        } else {
            writeln!(f, "known loss         {lost} entries, lsn {} to {end}", base.lsn.next())?;
        }
        match self.entries_without_bytes() {
            0 => write!(f, "missing bytes      none"),
            _ => write!(f, "missing bytes      of entries lsn {} to {}", self.data_lsn.next(), base.lsn),
        }
    }
}

/// Why nobody may take over now.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// Too few members are sealed: the old source could still acknowledge through the others.
    #[error("{sealed} of {needed} members are sealed: {missing} (--assume-lost MEMBER gives one up)")]
    TooFew {
        /// How many are.
        sealed: usize,
        /// How many must be.
        needed: usize,
        /// Those that are not, and why.
        missing: Missing,
    },
    /// A member has bytes that this node lacks, and may have acknowledged them.
    #[error(
        "member {node} has every byte up to lsn {held}, this node up to lsn {own}: promote that one (--assume-lost {node} gives them up)"
    )]
    Bytes {
        /// The member.
        node: NodeId,
        /// Up to where it has every byte.
        held: Lsn,
        /// Up to where this node has.
        own: Lsn,
    },
    /// A member holds another history, of the same length or of a later epoch.
    #[error("member {node} holds another history: {position}")]
    Forked {
        /// The member.
        node: NodeId,
        /// Its position.
        position: Position,
    },
}

/// Members that are not sealed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Missing(pub Vec<Unsealed>);

/// A member that is not sealed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unsealed {
    /// The member.
    pub node: NodeId,
    /// Why not.
    pub why: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> = self.0.iter().map(|m| format!("member {}: {}", m.node, m.why)).collect();
        f.write_str(&list.join("; "))
    }
}

/// The acts of a promotion.
pub trait TakeOver: Send + Sync {
    /// Promises `epoch` on this node, durably, fetches what archives hold beyond it, and says where it stands then.
    fn promise(&self, epoch: Epoch) -> BoxFuture<'_, Result<Standing, String>>;

    /// Has a member promise `epoch`; `None` if it holds nothing.
    fn seal(&self, member: NodeId, epoch: Epoch) -> BoxFuture<'_, Result<Option<Standing>, String>>;

    /// Fetches what `member` holds beyond this node, up to `to`, and the bytes that it has of it. Says where this node stands then; whether it
    /// may go on without the bytes that did not come is decided by a new plan.
    fn catch_up(&self, member: NodeId, to: Position) -> BoxFuture<'_, Result<Standing, String>>;

    /// Seals the archives, if there are any, and claims `epoch` in the own log after `base`. Says after which state it begins: a later
    /// one if an archive had got more entries meanwhile.
    fn claim(&self, epoch: Epoch, base: State) -> BoxFuture<'_, Result<State, String>>;
}

/// Takes over: promise, seal, catch up, claim. What was sealed stays sealed if it fails later; it may be tried again.
pub async fn promote(request: &PromoteRequest, acts: &dyn TakeOver) -> Result<PromotePlan, PromoteError> {
    let epoch = request.next;
    let own = acts.promise(epoch).await.map_err(PromoteError::Promise)?;
    let mut sealing: FuturesUnordered<_> = request
        .to_seal()
        .into_iter()
        .map(|member| async move { (member, acts.seal(member, epoch).await) })
        .collect();
    let mut answers = BTreeMap::new();
    while let Some((member, answer)) = sealing.next().await {
        answers.insert(member, answer);
    }
    let mut plan = request.plan(own, &answers)?;
    if let Some((member, to)) = plan.catch_up {
        let reached = acts.catch_up(member, to).await.map_err(PromoteError::CatchUp)?;
        if reached.state != plan.base {
            let found = format!("stopped at {} instead of {to}", reached.state.position);
            return Err(PromoteError::CatchUp(found));
        }
        // The bytes of what was fetched may still be that member's alone.
        plan = PromotePlan { catch_up: plan.catch_up, ..request.plan(reached, &answers)? };
    }
    plan.base = acts.claim(epoch, plan.base).await.map_err(PromoteError::Claim)?;
    plan.heard_lsn = plan.heard_lsn.max(plan.base.position.lsn);
    Ok(plan)
}

/// Why this node did not take over.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PromoteError {
    /// Its own promise failed.
    #[error("this node cannot promise the next epoch: {0}")]
    Promise(String),
    /// The answers do not allow it.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// It could not get what a sealed member holds beyond it.
    #[error("cannot fetch what a member holds beyond this node: {0}")]
    CatchUp(String),
    /// The epoch could not be claimed.
    #[error("cannot begin the next epoch: {0}")]
    Claim(String),
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::tests::{base_state, epoch, test_frames};

    fn node(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 16])
    }

    /// A standing after `frames` frames of the common history.
    fn standing(frames: usize) -> Standing {
        let state =
            test_frames(base_state(), 1, frames, 2).last().map_or(base_state(), |frame| frame.state());
        Standing { state, data_lsn: state.position.lsn, heard_lsn: state.position.lsn }
    }

    fn request(wanted: usize, members: u8, lost: &[u8]) -> PromoteRequest {
        PromoteRequest {
            own: node(1),
            next: epoch(2),
            policy: AckPolicy::Mirrors { wanted, members: (1..=members).map(node).collect() },
            assume_lost: lost.iter().map(|byte| node(*byte)).collect(),
        }
    }

    type Answers = BTreeMap<NodeId, Result<Option<Standing>, String>>;

    #[test]
    fn enough_members_are_sealed_that_the_old_source_cannot_acknowledge() {
        for (wanted, members, needed) in [(1, 1, 1), (1, 3, 3), (2, 3, 2), (3, 3, 1), (2, 5, 4)] {
            let request = request(wanted, members, &[]);
            assert_eq!(request.policy.seals_needed(), needed);
            let mut answers = Answers::new();
            for sealed in 1..=usize::from(members) {
                let plan = request.plan(standing(3), &answers);
                assert_eq!(plan.is_ok(), sealed >= needed, "mirror={wanted} of {members}, {sealed} sealed");
                answers.insert(node(sealed as u8 + 1), Ok(Some(standing(3))));
            }
        }
        let local = PromoteRequest { policy: AckPolicy::Local, ..request(1, 1, &[]) };
        assert!(local.plan(standing(0), &Answers::new()).is_ok());
    }

    /// While one of N members is removed fsync waits for W of the others, and whoever takes over may or may not know of the removal: it must
    /// meet one of those W either way.
    #[test]
    fn an_acknowledgement_meets_whoever_takes_over_while_a_member_is_removed() {
        for count in 2..=6u32 {
            for wanted in 1..count {
                let policy = |members: u32| AckPolicy::Mirrors {
                    wanted: wanted as usize,
                    members: (0..members as u8).map(node).collect(),
                };
                // Members are bits; the one that is removed is the highest.
                let of = |members: u32, size: u32| {
                    (0..1u32 << members).filter(move |set| set.count_ones() == size)
                };
                for acknowledged in of(count - 1, wanted) {
                    for knows in [count, count - 1] {
                        let needed = policy(knows).seals_needed() as u32;
                        assert!(
                            of(knows, needed).all(|sealed| sealed & acknowledged != 0),
                            "{wanted} of {count}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn an_unreachable_member_is_named_unless_it_is_given_up() {
        let answers = Answers::from([(node(2), Err("no answer".to_owned()))]);
        let refused = request(1, 2, &[]).plan(standing(3), &answers).unwrap_err().to_string();
        assert!(refused.contains(&node(2).to_string()) && refused.contains("no answer"), "{refused}");
        let plan = request(1, 2, &[2]).plan(standing(3), &Answers::new()).unwrap();
        assert_eq!(plan.lost, BTreeSet::from([node(2)]));
        assert!(plan.to_string().contains("given up"), "{plan}");
    }

    /// The fear: with `mirror=1` one mirror has acknowledged bytes, the other one takes over, and they are in no store that it reads.
    #[test]
    fn a_node_does_not_go_on_without_bytes_that_a_member_may_have_acknowledged() {
        let mut own = standing(5);
        own.data_lsn = Lsn::new(7);
        let answers = Answers::from([(node(2), Ok(Some(standing(5))))]);
        let refused = request(1, 2, &[]).plan(own, &answers).unwrap_err();
        let held = standing(5).data_lsn;
        assert_eq!(refused, PlanError::Bytes { node: node(2), held, own: Lsn::new(7) });
        assert!(refused.to_string().contains(&format!("--assume-lost {}", node(2))), "{refused}");
        assert!(request(1, 2, &[2]).plan(own, &answers).is_ok(), "given up by name");
        let local = PromoteRequest { policy: AckPolicy::Local, ..request(1, 2, &[]) };
        assert!(local.plan(own, &answers).is_ok(), "nobody waited for mirrors");
    }

    #[test]
    fn the_plan_tells_what_is_known_to_be_lost() {
        let mut own = standing(5);
        (own.heard_lsn, own.data_lsn) = (Lsn::new(20), Lsn::new(7));
        let plan = request(1, 1, &[]).plan(own, &Answers::new()).unwrap();
        assert_eq!((plan.lost_entries(), plan.entries_without_bytes()), (9, 4));
        let text = plan.to_string();
        assert!(text.contains("9 entries, lsn 12 to 20") && text.contains("lsn 8 to 11"), "{text}");
    }

    #[test]
    fn two_histories_of_one_length_stop_everything() {
        let mut other = standing(3);
        other.state.position.hash = murphy_log::ChainHash::from_bytes([9; 32]);
        let answers = Answers::from([(node(2), Ok(Some(other)))]);
        let refused = request(1, 2, &[]).plan(standing(3), &answers);
        assert!(matches!(refused, Err(PlanError::Forked { .. })));
    }

    /// `standing(frames)` as it would be if these frames were of epoch `number`.
    fn standing_in(number: u32, frames: usize) -> Standing {
        let mut standing = standing(frames);
        standing.state.position.epoch = epoch(number);
        standing
    }

    /// The fear: the source of epoch 2 was acknowledged by this member, and a mirror that was out of reach when that epoch began, and got more
    /// of epoch 1 meanwhile, takes over because its log is longer.
    #[test]
    fn a_longer_tail_of_an_older_epoch_does_not_win_over_the_epoch_that_followed() {
        let request = PromoteRequest { next: epoch(3), ..request(2, 3, &[]) };
        let later = standing_in(2, 4);
        let answers = Answers::from([(node(2), Ok(Some(later)))]);
        let refused = request.plan(standing_in(1, 6), &answers);
        assert_eq!(refused, Err(PlanError::Forked { node: node(2), position: later.state.position }));

        let answers = Answers::from([(node(2), Ok(Some(later))), (node(3), Ok(Some(standing_in(1, 6))))]);
        let plan = request.plan(standing_in(1, 2), &answers).unwrap();
        assert_eq!((plan.base, plan.catch_up), (later.state, Some((node(2), later.state.position))));
        let mut own = later;
        own.data_lsn = standing(6).data_lsn;
        assert_eq!(request.plan(own, &answers).unwrap().base, later.state);
    }

    #[derive(Default)]
    struct Acts {
        members: BTreeMap<NodeId, Standing>,
        done: Mutex<Vec<String>>,
        /// Of what is fetched only the entries come.
        lacks_bytes: bool,
    }

    impl TakeOver for Acts {
        fn promise(&self, epoch: Epoch) -> BoxFuture<'_, Result<Standing, String>> {
            self.done.lock().push(format!("promise {}", epoch.number));
            Box::pin(async { Ok(standing(3)) })
        }

        fn seal(&self, member: NodeId, _: Epoch) -> BoxFuture<'_, Result<Option<Standing>, String>> {
            self.done.lock().push("seal".to_owned());
            let answer = self.members.get(&member).copied();
            Box::pin(async move { answer.map(Some).ok_or_else(|| "gone".to_owned()) })
        }

        fn catch_up(&self, member: NodeId, to: Position) -> BoxFuture<'_, Result<Standing, String>> {
            self.done.lock().push(format!("catch up to {}", to.lsn));
            let mut reached = self.members[&member];
            if self.lacks_bytes {
                reached.data_lsn = standing(3).data_lsn;
            }
            Box::pin(async move { Ok(reached) })
        }

        fn claim(&self, epoch: Epoch, base: State) -> BoxFuture<'_, Result<State, String>> {
            self.done.lock().push(format!("claim {} after {}", epoch.number, base.position.lsn));
            Box::pin(async move { Ok(base) })
        }
    }

    /// What was acknowledged through another mirror must be in the history that goes on.
    #[tokio::test]
    async fn what_another_member_holds_is_fetched_before_the_epoch_begins() {
        let acts = Acts { members: BTreeMap::from([(node(2), standing(9))]), ..Acts::default() };
        let plan = promote(&request(1, 2, &[]), &acts).await.unwrap();
        assert_eq!(plan.base, standing(9).state);
        let expected = ["promise 2", "seal", "catch up to 19", "claim 2 after 19"];
        assert_eq!(*acts.done.lock(), expected);
    }

    /// The entries came from the other one, and the bytes that it has acknowledged did not.
    #[tokio::test]
    async fn nothing_is_claimed_without_the_bytes_of_what_was_fetched() {
        let members = BTreeMap::from([(node(2), standing(9))]);
        let acts = Acts { members, lacks_bytes: true, ..Acts::default() };
        let refused = promote(&request(1, 2, &[]), &acts).await;
        let (held, own) = (standing(9).data_lsn, standing(3).data_lsn);
        assert_eq!(refused, Err(PromoteError::Plan(PlanError::Bytes { node: node(2), held, own })));
        assert_eq!(*acts.done.lock(), ["promise 2", "seal", "catch up to 19"]);
    }

    #[tokio::test]
    async fn without_enough_seals_nothing_is_claimed() {
        let acts = Acts::default();
        let refused = promote(&request(1, 2, &[]), &acts).await;
        assert!(matches!(refused, Err(PromoteError::Plan(PlanError::TooFew { .. }))));
        assert_eq!(*acts.done.lock(), ["promise 2", "seal"]);
    }
}
