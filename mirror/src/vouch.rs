//! Vouchers: how a member proves that it is one to a member that lags behind the entry which admitted it.
//!
//! ```text
//!   source A      signs: C is a mirror of the volume, as of lsn 120 of epoch 1        C keeps it, and asks for a newer one now and then
//!   C  --seal-->  B, which ends at lsn 100 and follows A: knows A's key, and takes A's word for C
//! ```
//!
//! A log's chain is keyed by the volume's id, which is no secret: frames prove nothing of who made them. A signature does.
//!
//! Invariants:
//! - A voucher is taken from the source that the node follows, from a member that holds a copy, or from one that such a one vouches for in
//!   the same proof; never from one whose membership was revoked.
//! - The own log decides wherever it reaches: a voucher as of what the node has itself says nothing to it.
//! - A proof is bounded, and costs one check of a signature for each voucher in it.

use murphy_fs::MemberRole;
use murphy_log::{BranchId, Epoch, Lsn, Position, VolumeId};

use crate::identity::{Identity, PublicKey};

/// What a source signs: that a node is a member that holds a copy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Voucher {
    /// The source that says so.
    pub by: PublicKey,
    /// The member.
    pub member: PublicKey,
    /// What it may do.
    pub role: MemberRole,
    /// The epoch that the source led.
    pub epoch: Epoch,
    /// What was durable at the source: its log up to there admits the member.
    pub lsn: Lsn,
    /// The source's Ed25519 signature.
    pub signature: [u8; 64],
}

/// What one voucher is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vouched {
    /// The volume.
    pub volume: VolumeId,
    /// The branch.
    pub branch: BranchId,
    /// The epoch that the source leads.
    pub epoch: Epoch,
    /// What is durable there.
    pub lsn: Lsn,
    /// The member.
    pub member: PublicKey,
    /// What it may do.
    pub role: MemberRole,
}

impl Vouched {
    fn text(&self, by: PublicKey) -> Vec<u8> {
        [
            PURPOSE,
            self.volume.as_bytes(),
            self.branch.as_bytes(),
            by.as_bytes(),
            self.member.as_bytes(),
            &[self.role.code()],
            &self.epoch.number.to_le_bytes(),
            self.epoch.id.as_bytes(),
            &self.lsn.get().to_le_bytes(),
        ]
        .concat()
    }

    fn signed(&self, identity: &Identity) -> Voucher {
        let by = identity.public_key();
        let Vouched { epoch, lsn, member, role, .. } = *self;
        Voucher { by, member, role, epoch, lsn, signature: identity.sign(&self.text(by)) }
    }
}

/// Vouchers, each for whoever gave the one after it; the last is for the node that shows them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Proof(Vec<Voucher>);

/// What a node thinks of a key by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trust {
    /// It is the source that the node follows, or a member that holds a copy.
    Known,
    /// Nobody that the node knows, or one that only watches.
    Unknown,
    /// It was a member, and is none any more.
    Revoked,
}

impl Proof {
    /// The proof with these vouchers; of too many the newest stay.
    pub fn new(mut vouchers: Vec<Voucher>) -> Proof {
        vouchers.drain(..vouchers.len().saturating_sub(MAX_VOUCHERS));
        Proof(vouchers)
    }

    /// Its vouchers, oldest first.
    pub fn vouchers(&self) -> &[Voucher] {
        &self.0
    }

    /// Whether it shows nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The proof that the source with this identity, which shows this one for itself, gives a member.
    pub fn vouch(&self, identity: &Identity, about: &Vouched) -> Proof {
        Proof::new(self.0.iter().cloned().chain([about.signed(identity)]).collect())
    }

    /// What a node with the key `member` may do, as far as this proof shows it to a node of `place` that holds its log up to `held`.
    pub fn role(
        &self,
        member: PublicKey,
        (volume, branch): (VolumeId, BranchId),
        held: &Position,
        trust: impl Fn(PublicKey) -> Trust,
    ) -> Result<MemberRole, ProofError> {
        let proven = self.0.last().ok_or(ProofError::Empty)?.role;
        let mut member = member;
        for voucher in self.0.iter().rev() {
            let Voucher { by, role, epoch, lsn, .. } = *voucher;
            if voucher.member != member || !role.holds_copy() {
                return Err(ProofError::Other);
            }
            let is_behind = held.epoch.number < epoch.number || (held.epoch == epoch && held.lsn < lsn);
            if !is_behind {
                return Err(ProofError::Known { lsn });
            }
            let about = Vouched { volume, branch, epoch, lsn, member, role };
            if !by.has_signed(&about.text(by), &voucher.signature) {
                return Err(ProofError::Signature);
            }
            match trust(by) {
                Trust::Known => return Ok(proven),
                Trust::Unknown => member = by,
                Trust::Revoked => return Err(ProofError::Revoked),
            }
        }
        Err(ProofError::Stranger)
    }
}

/// Why a proof shows nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProofError {
    /// There is no voucher in it.
    #[error("no source has vouched for it")]
    Empty,
    /// A voucher is about another node, or one that holds no copy.
    #[error("its proof is about another node")]
    Other,
    /// The own log reaches to where the voucher was given, and says otherwise.
    #[error("the log here reaches behind lsn {lsn}, and does not know it")]
    Known {
        /// As of which the voucher was given.
        lsn: Lsn,
    },
    /// A signature is not that of who is said to have given it.
    #[error("a signature in its proof is wrong")]
    Signature,
    /// Who vouches was a member and is none any more.
    #[error("who vouches for it is a member no more")]
    Revoked,
    /// Nobody who vouches is known.
    #[error("nobody who vouches for it is known here")]
    Stranger,
}

const PURPOSE: &[u8] = b"murphy 2026 voucher v0";
/// So many sources in a row, each admitted by the one before it, can be behind the last thing that a node knows.
pub(crate) const MAX_VOUCHERS: usize = 4;
/// The bytes of a voucher in a message.
pub(crate) const VOUCHER_BYTES: usize = 32 + 32 + 1 + 20 + 8 + 64;

#[cfg(test)]
mod tests {
    use murphy_log::ChainHash;

    use super::*;
    use crate::tests::{BRANCH, VOLUME, epoch};

    fn identity(byte: u8) -> Identity {
        Identity::of_seed([byte; 32]).unwrap()
    }

    fn about(member: &Identity, number: u32, lsn: u64) -> Vouched {
        let (epoch, lsn, member) = (epoch(number), Lsn::new(lsn), member.public_key());
        Vouched { volume: VOLUME, branch: BRANCH, epoch, lsn, member, role: MemberRole::Mirror }
    }

    fn held(number: u32, lsn: u64) -> Position {
        Position { epoch: epoch(number), lsn: Lsn::new(lsn), hash: ChainHash::default() }
    }

    /// Judged by one who knows only `knows`, and knows `gone` to be no member any more.
    fn judged(
        proof: &Proof,
        member: &Identity,
        held: Position,
        knows: &Identity,
        gone: &Identity,
    ) -> Result<MemberRole, ProofError> {
        proof.role(member.public_key(), (VOLUME, BRANCH), &held, |key| {
            let of = |identity: &Identity| key == identity.public_key();
            if of(gone) {
                return Trust::Revoked;
            }
            if of(knows) { Trust::Known } else { Trust::Unknown }
        })
    }

    #[test]
    fn the_word_of_a_known_source_counts_for_whom_it_is_about_and_where_the_own_log_ends_before() {
        let [source, member, other] = [1, 2, 3].map(identity);
        let proof = Proof::default().vouch(&source, &about(&member, 2, 120));
        let known = Err(ProofError::Known { lsn: Lsn::new(120) });
        for (number, lsn, expected) in [
            (2, 119, Ok(MemberRole::Mirror)),
            (1, 500, Ok(MemberRole::Mirror)),
            (2, 120, known),
            (2, 121, known),
            (3, 7, known),
        ] {
            let found = judged(&proof, &member, held(number, lsn), &source, &other);
            assert_eq!(found, expected, "epoch {number}, lsn {lsn}");
        }
        let end = held(1, 7);
        assert_eq!(judged(&proof, &other, end, &source, &member), Err(ProofError::Other));
        assert_eq!(judged(&proof, &member, end, &other, &other), Err(ProofError::Stranger));
        assert_eq!(judged(&proof, &member, end, &other, &source), Err(ProofError::Revoked));
        assert_eq!(judged(&Proof::default(), &member, end, &source, &other), Err(ProofError::Empty));
        let same_number = Position { epoch: epoch(9), ..end };
        let same_number = Position { epoch: Epoch { number: 2, ..same_number.epoch }, ..same_number };
        assert!(
            judged(&proof, &member, same_number, &source, &other).is_err(),
            "another epoch of this number"
        );
        let elsewhere = (VolumeId::from_bytes([9; 16]), BRANCH);
        let found = proof.role(member.public_key(), elsewhere, &end, |_| Trust::Known);
        assert_eq!(found, Err(ProofError::Signature), "another volume");
        let watches = Vouched { role: MemberRole::Observer, ..about(&member, 2, 120) };
        let watches = Proof::default().vouch(&source, &watches);
        assert_eq!(judged(&watches, &member, end, &source, &other), Err(ProofError::Other));
    }

    /// A laggard may have missed several sources, each admitted by the one before.
    #[test]
    fn a_source_that_was_vouched_for_vouches_for_others() {
        let [first, second, third, other] = [1, 2, 3, 4].map(identity);
        let of_second = Proof::default().vouch(&first, &about(&second, 1, 50));
        let of_third = of_second.vouch(&second, &about(&third, 2, 90));
        let end = held(1, 20);
        assert_eq!(judged(&of_third, &third, end, &first, &other), Ok(MemberRole::Mirror));
        assert_eq!(judged(&of_third, &third, end, &second, &other), Ok(MemberRole::Mirror));
        assert_eq!(judged(&of_third, &third, end, &first, &second), Err(ProofError::Revoked));
        assert_eq!(judged(&of_third, &second, end, &first, &other), Err(ProofError::Other));
        // Whoever has the entry that admitted the second one, and does not know it, is not told otherwise by the first.
        let found = judged(&of_third, &third, held(1, 60), &first, &other);
        assert_eq!(found, Err(ProofError::Known { lsn: Lsn::new(50) }));
        // Nobody vouches for himself: the chain must begin with one who is known.
        let own = Proof::default().vouch(&third, &about(&third, 2, 90));
        assert_eq!(judged(&own, &third, end, &first, &other), Err(ProofError::Stranger));
        let long = (5..20).fold(of_third, |proof, byte| proof.vouch(&third, &about(&identity(byte), 2, 100)));
        assert_eq!(long.vouchers().len(), MAX_VOUCHERS);
        assert_eq!(Proof::decode(&long.encode()), Ok(long));
    }

    /// Any change of any byte makes it another statement, which nobody has signed.
    #[test]
    fn a_changed_voucher_is_worth_nothing() {
        let [source, member, other] = [1, 2, 3].map(identity);
        let good = Proof::default().vouch(&source, &about(&member, 2, 120));
        let bytes = good.encode();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                let Ok(proof) = Proof::decode(&changed) else { continue };
                let judged = judged(&proof, &member, held(1, 7), &source, &other);
                assert!(judged.is_err(), "byte {at}, bit {bit}");
            }
        }
        for end in 0..bytes.len() {
            assert!(Proof::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        assert!(Proof::decode(&[&bytes[..], &[0; 4000]].concat()).is_err());
    }
}
