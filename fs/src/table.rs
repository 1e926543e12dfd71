//! Tables and keys: where a row lives.
//!
//! Every key begins with a big-endian `u64`, so that the rows of one inode, and those of one directory, are neighbours in key order.
//!
//! Invariants:
//! - The number of a table never changes its meaning; a retired number is not used again.
//! - [`RowKey`] orders as (table, key bytes), in memory, in the index and in a snapshot.

use std::{
    cmp::Ordering,
    hash::{Hash, Hasher},
};

use bytes::{BufMut, Bytes, BytesMut};

use crate::{Ino, XattrName};

/// A table of the tree or of its bookkeeping.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Table {
    /// inode -> attributes.
    Inode = 1,
    /// directory inode -> counters and times.
    Directory = 2,
    /// (parent, cookie) -> name, inode, kind.
    Dentry = 3,
    /// (inode, file offset) -> where the bytes are.
    Extent = 4,
    /// inode -> target of the link.
    Symlink = 5,
    /// (inode, name) -> value.
    Xattr = 6,
    /// (inode, parent, cookie) -> nothing: the further names of an inode that has several.
    Link = 7,
    /// inode -> nothing: an inode without a name, still open or still to be purged.
    Orphan = 8,
    /// pack number -> object name, sizes, live bytes.
    Pack = 9,
    /// session -> the writer of its packs.
    Session = 10,
    /// member -> its node's key and role.
    Member = 11,
    /// (session, sequence) -> the answer to a forwarded request.
    Reply = 12,
    /// (0, name) -> a setting shared by all nodes.
    Setting = 13,
}

impl Table {
    /// Every table, in key order.
    pub const ALL: [Table; 13] = [
        Table::Inode,
        Table::Directory,
        Table::Dentry,
        Table::Extent,
        Table::Symlink,
        Table::Xattr,
        Table::Link,
        Table::Orphan,
        Table::Pack,
        Table::Session,
        Table::Member,
        Table::Reply,
        Table::Setting,
    ];

    /// The table with this number.
    pub fn from_number(number: u8) -> Option<Table> {
        Table::ALL.into_iter().find(|table| *table as u8 == number)
    }

    /// The number of the table in entries and keys.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Whether the digest counts the rows of table `number`. Sessions, members, replies and settings are not part of the tree; a
    /// table that this version does not know is taken to be.
    pub const fn in_digest(number: u8) -> bool {
        !matches!(number, 10..=13)
    }
}

/// The key of a row, its table included. Nearly all are stored in place: they are copied without an allocation, and compared as three words.
#[derive(Clone)]
pub struct RowKey(Form);

#[derive(Clone)]
enum Form {
    /// Up to [`SHORT`] bytes, zeros behind them, and their number in the last byte: these order as the keys do.
    Short([u8; SHORT + 1]),
    Long(Bytes),
}

impl RowKey {
    /// The key of table `number` with these key bytes.
    pub fn from_parts(number: u8, key: &[u8]) -> RowKey {
        if key.len() < SHORT {
            let mut bytes = [0; SHORT + 1];
            bytes[0] = number;
            bytes[1..=key.len()].copy_from_slice(key);
            bytes[SHORT] = key.len() as u8 + 1;
            return RowKey(Form::Short(bytes));
        }
        let mut bytes = BytesMut::with_capacity(1 + key.len());
        bytes.put_u8(number);
        bytes.put_slice(key);
        RowKey(Form::Long(bytes.freeze()))
    }

    /// The key whose stored form (table number, key bytes) is `bytes`. `None` if it is empty.
    pub fn from_bytes(bytes: Bytes) -> Option<RowKey> {
        let (number, key) = bytes.split_first()?;
        if key.len() < SHORT {
            Some(RowKey::from_parts(*number, key))
        } else {
            Some(RowKey(Form::Long(bytes)))
        }
    }

    fn of_number(table: Table, number: u64) -> RowKey {
        RowKey::from_parts(table.number(), &number.to_be_bytes())
    }

    fn of_pair(table: Table, first: u64, second: u64) -> RowKey {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&first.to_be_bytes());
        key[8..].copy_from_slice(&second.to_be_bytes());
        RowKey::from_parts(table.number(), &key)
    }

    /// The inode row of `ino`.
    pub fn inode(ino: Ino) -> RowKey {
        RowKey::of_number(Table::Inode, ino.get())
    }

    /// The directory row of `ino`.
    pub fn directory(ino: Ino) -> RowKey {
        RowKey::of_number(Table::Directory, ino.get())
    }

    /// The entry of `parent` at `cookie`.
    pub fn dentry(parent: Ino, cookie: u64) -> RowKey {
        RowKey::of_pair(Table::Dentry, parent.get(), cookie)
    }

    /// The extent of `ino` that begins at byte `offset` of the file.
    pub fn extent(ino: Ino, offset: u64) -> RowKey {
        RowKey::of_pair(Table::Extent, ino.get(), offset)
    }

    /// The target of the symlink `ino`.
    pub fn symlink(ino: Ino) -> RowKey {
        RowKey::of_number(Table::Symlink, ino.get())
    }

    /// An extended attribute of `ino`.
    pub fn xattr(ino: Ino, name: &XattrName) -> RowKey {
        let mut key = ino.get().to_be_bytes().to_vec();
        key.extend_from_slice(name.as_bytes());
        RowKey::from_parts(Table::Xattr.number(), &key)
    }

    /// A further name of `ino`: the entry of `parent` at `cookie`.
    pub fn link(ino: Ino, parent: Ino, cookie: u64) -> RowKey {
        let key = [ino.get(), parent.get(), cookie].map(u64::to_be_bytes).concat();
        RowKey::from_parts(Table::Link.number(), &key)
    }

    /// The orphan row of `ino`.
    pub fn orphan(ino: Ino) -> RowKey {
        RowKey::of_number(Table::Orphan, ino.get())
    }

    /// The row of pack `number`.
    pub fn pack(number: u64) -> RowKey {
        RowKey::of_number(Table::Pack, number)
    }

    /// The row of session `id`.
    pub fn session(id: u64) -> RowKey {
        RowKey::of_number(Table::Session, id)
    }

    /// The row of the member `node`.
    pub fn member(node: murphy_log::NodeId) -> RowKey {
        RowKey::from_parts(Table::Member.number(), node.as_bytes())
    }

    /// The setting called `name`.
    pub fn setting(name: &str) -> RowKey {
        let mut key = 0u64.to_be_bytes().to_vec();
        key.extend_from_slice(name.as_bytes());
        RowKey::from_parts(Table::Setting.number(), &key)
    }

    /// The number of the table.
    pub fn table(&self) -> u8 {
        self.as_bytes()[0]
    }

    /// The key within its table.
    pub fn key(&self) -> &[u8] {
        &self.as_bytes()[1..]
    }

    /// The key within its table, in memory of its own or shared.
    pub fn key_bytes(&self) -> Bytes {
        match &self.0 {
            Form::Short(_) => Bytes::copy_from_slice(self.key()),
            Form::Long(bytes) => bytes.slice(1..),
        }
    }

    /// Table number and key bytes together.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Form::Short(bytes) => &bytes[..usize::from(bytes[SHORT])],
            Form::Long(bytes) => bytes,
        }
    }

    /// Table number and key bytes together, in memory of their own or shared.
    pub fn into_bytes(self) -> Bytes {
        match self.0 {
            Form::Short(_) => Bytes::copy_from_slice(self.as_bytes()),
            Form::Long(bytes) => bytes,
        }
    }

    /// The number that the key begins with: an inode, a pack, a session. `None` if the key is too short to have one.
    pub fn number(&self) -> Option<u64> {
        self.as_bytes().get(1..9).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes)
    }

    /// The second number of the key: a cookie, a file offset. `None` if the key is too short to have one.
    pub fn second(&self) -> Option<u64> {
        self.as_bytes().get(9..17).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes)
    }

    /// The smallest key of `table` whose number is `number`; with `number + 1` the end of that range.
    pub fn range_start(table: Table, number: u64) -> RowKey {
        RowKey::of_number(table, number)
    }
}

impl PartialEq for RowKey {
    fn eq(&self, other: &RowKey) -> bool {
        match (&self.0, &other.0) {
            (Form::Short(one), Form::Short(other)) => one == other,
            (Form::Long(one), Form::Long(other)) => one == other,
            // A key of one length has one form.
            _ => false,
        }
    }
}

impl Eq for RowKey {}

impl Ord for RowKey {
    fn cmp(&self, other: &RowKey) -> Ordering {
        match (&self.0, &other.0) {
            (Form::Short(one), Form::Short(other)) => words(one).cmp(&words(other)),
            _ => self.as_bytes().cmp(other.as_bytes()),
        }
    }
}

impl PartialOrd for RowKey {
    fn partial_cmp(&self, other: &RowKey) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for RowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.as_bytes());
    }
}

/// The bytes as numbers that order as they do.
fn words(bytes: &[u8; SHORT + 1]) -> [u64; 3] {
    let (words, _) = bytes.as_chunks();
    [0, 1, 2].map(|word: usize| u64::from_be_bytes(words[word]))
}

impl std::fmt::Debug for RowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Table::from_number(self.table()) {
            Some(table) => write!(f, "{table:?}")?,
            None => write!(f, "table {}", self.table())?,
        }
        match (self.number(), self.second()) {
            (Some(first), Some(second)) if self.as_bytes().len() == 17 => write!(f, "({first}, {second})"),
            (Some(first), _) => write!(f, "({first}, {:?})", String::from_utf8_lossy(&self.as_bytes()[9..])),
            _ => write!(f, "({:?})", self.key()),
        }
    }
}

/// The longest key, its table number included, that is stored in place: all but those of further links and extended attributes.
const SHORT: usize = 23;
const _: () = assert!(size_of::<RowKey>() == size_of::<Bytes>());

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher, RandomState};

    use proptest::prelude::*;

    use super::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![3 => Just(0_u8), 1 => Just(1), 1 => Just(u8::MAX)];
        prop_oneof![proptest::collection::vec(byte, 1..26), proptest::collection::vec(any::<u8>(), 1..40)]
    }

    proptest! {
        /// The fear: rows that are neighbours in the index are not in memory, or a key is found under another one.
        #[test]
        fn keys_compare_as_their_bytes_do(one in bytes(), other in bytes(), cut in 0..26_usize) {
            let prefix = one[..one.len().min(cut + 1)].to_vec();
            for other in [&other, &prefix, &one] {
                let key = |bytes: &[u8]| RowKey::from_bytes(Bytes::copy_from_slice(bytes)).unwrap();
                let (a, b) = (key(&one), key(other));
                prop_assert_eq!(a.cmp(&b), one.cmp(other));
                prop_assert_eq!(a == b, one == *other);
                prop_assert_eq!(&b, &RowKey::from_parts(other[0], &other[1..]));
                prop_assert_eq!((b.as_bytes(), b.key(), b.table()), (&other[..], &other[1..], other[0]));
                prop_assert_eq!((b.key_bytes(), b.clone().into_bytes()), (other[1..].to_vec().into(), other.clone().into()));
                let state = RandomState::new();
                prop_assert!(a != b || state.hash_one(&a) == state.hash_one(&b));
            }
        }
    }
}
