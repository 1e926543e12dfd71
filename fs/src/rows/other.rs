//! The smaller rows: packs, links' targets, attributes, orphans, sessions, settings.

use bytes::Bytes;
use murphy_log::Lsn;

use super::codec::{RowError, RowReader, RowWriter};
use crate::data::{FooterDigest, PackMeta, PackName, SealedPack, WriterId};

/// The number of a pack in the tree: the LSN of the entry that first referred to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PackNumber(pub u64);

/// A pack that the tree refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackRow {
    /// The first half of its object's name: the process that wrote it.
    pub writer: u64,
    /// The second half: a counter of that process.
    pub sequence: u64,
    /// BLAKE3 of its footer, which holds the hash of every cell.
    pub footer_digest: [u8; 32],
    /// Bytes of file data in it.
    pub plain_bytes: u32,
    /// Bytes of the object.
    pub stored_bytes: u32,
    /// Bytes that extents refer to. It may be too high after a crash between the entries that share a pack, never too low.
    pub live_bytes: u64,
    /// Whether its object exists, as far as the volume knows.
    pub state: PackState,
}

/// Whether the object of a pack exists anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PackState {
    /// It does, since the pack was named.
    Here,
    /// It was lost with a source: the source after it has asked everybody.
    Missing,
    /// It was lost, and found again.
    Found {
        /// The entry that says so.
        at: Lsn,
    },
}

impl PackRow {
    /// The row of a new pack, every byte of which is referred to.
    pub fn of(pack: &SealedPack) -> PackRow {
        PackRow {
            writer: pack.name.writer.as_u64(),
            sequence: pack.name.number,
            footer_digest: *pack.footer_digest.as_bytes(),
            plain_bytes: pack.plain_len as u32,
            stored_bytes: pack.stored_len as u32,
            live_bytes: pack.plain_len,
            state: PackState::Here,
        }
    }

    /// Whether nobody has the pack.
    pub fn is_missing(&self) -> bool {
        self.state == PackState::Missing
    }

    /// The entry from which on a copy of the tree needs the pack, given the row's number. `None` while it is missing.
    pub fn needed_since(&self, number: PackNumber) -> Option<Lsn> {
        match self.state {
            PackState::Here => Some(Lsn::new(number.0)),
            PackState::Missing => None,
            PackState::Found { at } => Some(at),
        }
    }

    /// The bytes of the row.
    pub fn encode(&self) -> Bytes {
        let mut row = RowWriter::new(VERSION);
        row.fixed(self.writer)
            .varint(self.sequence)
            .bytes(&self.footer_digest)
            .varint(u64::from(self.plain_bytes))
            .varint(u64::from(self.stored_bytes))
            .varint(self.live_bytes);
        match self.state {
            PackState::Here => row.byte(HERE),
            PackState::Missing => row.byte(MISSING),
            PackState::Found { at } => row.byte(FOUND).fixed(at.get()),
        };
        row.finish()
    }

    /// The row that `value` is.
    pub fn decode(value: &[u8]) -> Result<PackRow, RowError> {
        let mut row = RowReader::new(value, VERSION)?;
        let pack = PackRow {
            writer: row.fixed()?,
            sequence: row.varint()?,
            footer_digest: row.array()?,
            plain_bytes: row.varint32("plain length")?,
            stored_bytes: row.varint32("stored length")?,
            live_bytes: row.varint()?,
            state: match row.byte()? {
                HERE => PackState::Here,
                MISSING => PackState::Missing,
                FOUND => PackState::Found { at: Lsn::new(row.fixed()?) },
                _ => return Err(RowError::Field("state")),
            },
        };
        row.finish()?;
        Ok(pack)
    }

    /// What has to be known of the pack to read it.
    pub fn meta(&self) -> PackMeta {
        PackMeta {
            name: PackName::new(WriterId::from_u64(self.writer), self.sequence),
            footer_digest: FooterDigest::from_bytes(self.footer_digest),
            plain_len: u64::from(self.plain_bytes),
            stored_len: u64::from(self.stored_bytes),
        }
    }
}

macro_rules! opaque_row {
    ($(#[$doc:meta])* $name:ident, $field:ident, $field_doc:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub struct $name {
            #[doc = $field_doc]
            pub $field: Bytes,
        }

        impl $name {
            /// The bytes of the row.
            pub fn encode(&self) -> Bytes {
                RowWriter::new(VERSION).bytes(&self.$field).finish()
            }

            /// The row that `value` is.
            pub fn decode(value: &Bytes) -> Result<$name, RowError> {
                let mut row = RowReader::new(value, VERSION)?;
                Ok($name { $field: value.slice_ref(row.rest()) })
            }
        }
    };
}

opaque_row!(
    /// What a symbolic link points at.
    SymlinkRow, target, "The target, as given."
);
opaque_row!(
    /// The value of an extended attribute.
    XattrRow, value, "The value, as given."
);
opaque_row!(
    /// A setting that all nodes of the volume share.
    SettingRow, text, "Its value in text form."
);

/// Marks an inode without a name. Its key says which.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OrphanRow;

impl OrphanRow {
    /// The bytes of the row.
    pub fn encode(self) -> Bytes {
        Bytes::from_static(&[VERSION])
    }

    /// The row that `value` is.
    pub fn decode(value: &[u8]) -> Result<OrphanRow, RowError> {
        RowReader::new(value, VERSION)?.finish().map(|()| OrphanRow)
    }
}

/// A session: one life of a process that decides or asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionRow {
    /// The writer half of the names of its packs.
    pub writer: u64,
    /// Packs of this writer below this sequence are not waiting for an entry any more.
    pub pack_floor: u64,
    /// Whether it is over.
    pub ended: bool,
}

impl SessionRow {
    /// The bytes of the row.
    pub fn encode(&self) -> Bytes {
        RowWriter::new(VERSION).fixed(self.writer).varint(self.pack_floor).byte(u8::from(self.ended)).finish()
    }

    /// The row that `value` is.
    pub fn decode(value: &[u8]) -> Result<SessionRow, RowError> {
        let mut row = RowReader::new(value, VERSION)?;
        let (writer, pack_floor, ended) = (row.fixed()?, row.varint()?, row.byte()?);
        row.finish()?;
        match ended {
            0 | 1 => Ok(SessionRow { writer, pack_floor, ended: ended == 1 }),
            _ => Err(RowError::Field("end")),
        }
    }
}

const VERSION: u8 = 0;
const HERE: u8 = 0;
const MISSING: u8 = 1;
const FOUND: u8 = 2;
