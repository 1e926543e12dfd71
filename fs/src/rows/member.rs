//! The member row: who may follow a volume, and who has been invited to.
//!
//! A member's key is its node id. An open invitation is a row too, whose key is derived from the secret's hash; redeeming it marks that
//! row as redeemed and writes the member's in one entry, so that it can happen only once.

use bytes::Bytes;
use murphy_log::LogTime;

use super::codec::{RowError, RowReader, RowWriter};

/// A member, or an invitation to become one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberRow {
    /// What it may do.
    pub role: MemberRole,
    /// Whether it has joined.
    pub state: MemberState,
    /// What people call it; at most [`MEMBER_NAME_BYTES`] bytes.
    pub name: String,
    /// Where it listens, `host:port`; at most [`MEMBER_ADDRESSES`] of at most [`MEMBER_NAME_BYTES`] bytes.
    pub addresses: Vec<String>,
}

/// What a member may do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum MemberRole {
    /// It follows the log and is counted among the copies.
    Mirror,
    /// A mirror that may also forward writes.
    Writer,
    /// It reads the entries and holds nothing.
    Observer,
}

impl MemberRole {
    /// The number of the role in rows and messages.
    pub const fn code(self) -> u8 {
        match self {
            MemberRole::Mirror => 0,
            MemberRole::Writer => 1,
            MemberRole::Observer => 2,
        }
    }

    /// The role with this number.
    pub const fn from_code(code: u8) -> Option<MemberRole> {
        match code {
            0 => Some(MemberRole::Mirror),
            1 => Some(MemberRole::Writer),
            2 => Some(MemberRole::Observer),
            _ => None,
        }
    }

    /// Whether a member with this role holds a copy.
    pub const fn holds_copy(self) -> bool {
        matches!(self, MemberRole::Mirror | MemberRole::Writer)
    }
}

impl std::fmt::Display for MemberRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            MemberRole::Mirror => "mirror",
            MemberRole::Writer => "writer",
            MemberRole::Observer => "observer",
        })
    }
}

impl std::str::FromStr for MemberRole {
    type Err = UnknownRole;

    fn from_str(text: &str) -> Result<MemberRole, UnknownRole> {
        let roles = [MemberRole::Mirror, MemberRole::Writer, MemberRole::Observer];
        roles.into_iter().find(|role| role.to_string() == text).ok_or(UnknownRole)
    }
}

/// A text that is no role.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a role is mirror, writer or observer")]
pub struct UnknownRole;

/// Whether somebody has joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemberState {
    /// Nobody yet: whoever knows the secret may, until the invitation expires.
    Invited {
        /// The keyed hash of the secret.
        secret_hash: [u8; 32],
        /// Until when it can be redeemed.
        expires: LogTime,
    },
    /// The node with this Ed25519 key has.
    Joined {
        /// The public key that its connections must prove.
        public_key: [u8; 32],
    },
    /// The node with this key had, and may not any more.
    Revoked {
        /// The public key.
        public_key: [u8; 32],
    },
    /// The invitation with this secret was redeemed. Kept, so that a second use is told so.
    Redeemed {
        /// The keyed hash of the secret.
        secret_hash: [u8; 32],
    },
}

impl MemberRow {
    /// The bytes of the row. Names and addresses beyond the limits are a mistake of the caller, and are cut.
    pub fn encode(&self) -> Bytes {
        let mut row = RowWriter::new(VERSION);
        row.byte(self.role.code());
        match &self.state {
            MemberState::Invited { secret_hash, expires } => {
                row.byte(INVITED).bytes(secret_hash).fixed(expires.as_nanos())
            }
            MemberState::Joined { public_key } => row.byte(JOINED).bytes(public_key),
            MemberState::Revoked { public_key } => row.byte(REVOKED).bytes(public_key),
            MemberState::Redeemed { secret_hash } => row.byte(REDEEMED).bytes(secret_hash),
        };
        push_text(&mut row, &self.name);
        let addresses = self.addresses.iter().take(MEMBER_ADDRESSES);
        row.varint(addresses.len() as u64);
        addresses.for_each(|address| push_text(&mut row, address));
        row.finish()
    }

    /// The row that `value` is.
    pub fn decode(value: &[u8]) -> Result<MemberRow, RowError> {
        let mut row = RowReader::new(value, VERSION)?;
        let role = MemberRole::from_code(row.byte()?).ok_or(RowError::Field("role"))?;
        let state = match row.byte()? {
            INVITED => MemberState::Invited {
                secret_hash: key(&mut row)?,
                expires: LogTime::from_nanos(row.fixed()?),
            },
            JOINED => MemberState::Joined { public_key: key(&mut row)? },
            REVOKED => MemberState::Revoked { public_key: key(&mut row)? },
            REDEEMED => MemberState::Redeemed { secret_hash: key(&mut row)? },
            _ => return Err(RowError::Field("member state")),
        };
        let name = text(&mut row)?;
        let count = row.varint()?;
        if count > MEMBER_ADDRESSES as u64 {
            return Err(RowError::Field("number of addresses"));
        }
        let addresses = (0..count).map(|_| text(&mut row)).collect::<Result<_, _>>()?;
        row.finish()?;
        Ok(MemberRow { role, state, name, addresses })
    }
}

fn push_text(row: &mut RowWriter, text: &str) {
    let text = &text[..text.floor_char_boundary(MEMBER_NAME_BYTES)];
    row.varint(text.len() as u64).bytes(text.as_bytes());
}

fn text(row: &mut RowReader<'_>) -> Result<String, RowError> {
    let length = row.varint()?;
    if length > MEMBER_NAME_BYTES as u64 {
        return Err(RowError::Field("text length"));
    }
    let bytes = row.take(length as usize)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| RowError::Field("text"))
}

fn key(row: &mut RowReader<'_>) -> Result<[u8; 32], RowError> {
    row.array()
}

/// Names and addresses of members are at most so long, in bytes.
pub const MEMBER_NAME_BYTES: usize = 255;
/// A member has at most so many addresses.
pub const MEMBER_ADDRESSES: usize = 8;
const VERSION: u8 = 0;
const INVITED: u8 = 0;
const JOINED: u8 = 1;
const REVOKED: u8 = 2;
const REDEEMED: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> [MemberRow; 4] {
        let row = |role, state| MemberRow {
            role,
            state,
            name: "berlin-2".to_owned(),
            addresses: vec!["10.0.0.7:7000".to_owned(), "[::1]:7000".to_owned()],
        };
        let invited = MemberState::Invited { secret_hash: [3; 32], expires: LogTime::from_nanos(1 << 60) };
        [
            row(MemberRole::Mirror, invited),
            row(MemberRole::Writer, MemberState::Joined { public_key: [4; 32] }),
            row(MemberRole::Observer, MemberState::Revoked { public_key: [5; 32] }),
            row(MemberRole::Mirror, MemberState::Redeemed { secret_hash: [6; 32] }),
        ]
    }

    #[test]
    fn every_state_survives_encoding() {
        for row in rows() {
            assert_eq!(MemberRow::decode(&row.encode()), Ok(row));
        }
    }

    #[test]
    fn the_bytes_of_a_member_do_not_change() {
        let row = MemberRow {
            role: MemberRole::Writer,
            state: MemberState::Joined { public_key: [7; 32] },
            name: "b".to_owned(),
            addresses: vec!["h:1".to_owned()],
        };
        let golden = [&[0, 1, 1][..], &[7; 32], b"\x01b", b"\x01\x03h:1"].concat();
        assert_eq!(row.encode(), golden);
    }

    /// A member row decides who may read the volume: no cut or damaged one may pass for another.
    #[test]
    fn a_cut_row_is_refused_and_no_damage_panics() {
        for row in rows() {
            let bytes = row.encode();
            for end in 0..bytes.len() {
                assert!(MemberRow::decode(&bytes[..end]).is_err(), "cut at {end}");
            }
            let mut long = bytes.to_vec();
            long.push(0);
            assert_eq!(MemberRow::decode(&long), Err(RowError::Trailing { at: long.len() - 1, count: 1 }));
            for at in 0..bytes.len() {
                let mut damaged = bytes.to_vec();
                damaged[at] ^= 0xff;
                if let Ok(other) = MemberRow::decode(&damaged) {
                    assert_eq!(other.encode(), damaged, "a row with two forms");
                }
            }
        }
    }
}
