//! The bytes of a proof, as it stands in messages and in the file that a member keeps it in.
//!
//! Invariants:
//! - What is read is no longer than the longest proof.

use bytes::Bytes;

use super::{
    MessageError,
    fields::{FieldReader, FieldWriter},
};
use crate::{
    identity::PublicKey,
    vouch::{MAX_VOUCHERS, Proof, VOUCHER_BYTES, Voucher},
};

impl Proof {
    /// Reads the bytes of [`Proof::encode`].
    pub fn decode(bytes: &[u8]) -> Result<Proof, MessageError> {
        let bytes = Bytes::copy_from_slice(&bytes[..bytes.len().min(PROOF + 1)]);
        let mut reader = FieldReader::new("proof", &bytes);
        let proof = read_proof(&mut reader)?;
        reader.finish()?;
        Ok(proof)
    }

    /// The proof as it stands in messages.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_proof(self, &mut FieldWriter(&mut bytes));
        bytes
    }
}

pub(super) fn write_proof(proof: &Proof, out: &mut FieldWriter<'_>) {
    let vouchers = proof.vouchers();
    out.byte(vouchers.len() as u8);
    for voucher in vouchers {
        out.bytes(voucher.by.as_bytes()).bytes(voucher.member.as_bytes()).byte(voucher.role.code());
        out.epoch(voucher.epoch).lsn(voucher.lsn).bytes(&voucher.signature);
    }
}

pub(super) fn read_proof(r: &mut FieldReader<'_>) -> Result<Proof, MessageError> {
    let good = |count: &u8| usize::from(*count) <= MAX_VOUCHERS;
    let count = r.checked("number of vouchers", FieldReader::byte, good)?;
    let voucher = |_| {
        let (by, member) = (PublicKey::from_bytes(r.array()?), PublicKey::from_bytes(r.array()?));
        Ok(Voucher { by, member, role: r.role()?, epoch: r.epoch()?, lsn: r.lsn()?, signature: r.array()? })
    };
    Ok(Proof::new((0..count).map(voucher).collect::<Result<_, _>>()?))
}

/// The length of the longest proof, in bytes.
pub(super) const PROOF: usize = 1 + MAX_VOUCHERS * VOUCHER_BYTES;
