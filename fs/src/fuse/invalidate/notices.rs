//! From the changes of an entry to what the kernel must forget.
//!
//! | row | what the kernel may have of it | notice |
//! |---|---|---|
//! | inode | attributes; pages, if the entry is not one that leaves bytes alone | attributes, or data |
//! | extent | pages of the file | data, unless the file goes |
//! | directory | attributes of the directory, its listing | listing |
//! | dentry, written | the name, missing names included | entry, by the name in the row |
//! | dentry, removed or vacated | the name | entry, by that name of the entry which hashes to this place |
//! | others | nothing | none |
//!
//! Invariants:
//! - Too much may be forgotten, never too little. A removed name that the entry does not tell is an error, not silence.
//! - Nothing is read but the entry, so that what was shown long ago can still be told.
//! - An inode is born with its entry: the kernel knows nothing of it, and only its name is told.

use std::collections::HashSet;

use bytes::Bytes;
use murphy_log::{Change, Entry};

use crate::{
    Cookie, DentryRow, Ino, InodeRow, Kind, Name, NameHasher, RowKey, Table, decide::EntryKind,
    fuse::notify::Notice,
};

/// What the kernel must forget, each thing once.
#[derive(Default)]
pub(super) struct Notices {
    pub(super) all: Vec<Notice>,
    seen: HashSet<Notice>,
    /// Places whose name is not known.
    pub(super) unknown: Vec<RowKey>,
}

impl Notices {
    /// Adds what `entry` makes the kernel forget.
    pub(super) fn add(&mut self, entry: &Entry, hasher: &NameHasher) {
        let names: Vec<Name> = entry.names.iter().filter_map(|name| Name::new(name.clone()).ok()).collect();
        let places: Vec<Cookie> = names.iter().map(|name| hasher.place(name)).collect();
        let newborn = Ino::born_at(entry.lsn);
        for change in &entry.changes {
            let key = RowKey::from_parts(change.table, &change.key);
            let Some(ino) = key.number().map(Ino::new).filter(|ino| *ino != newborn) else { continue };
            match Table::from_number(change.table) {
                Some(Table::Inode) => self.push(inode_notice(entry, ino, change.value.as_deref())),
                // Its bytes go with an inode that has lost its last name; whoever has it open may go on with what is cached.
                Some(Table::Extent) if change.value.is_none() && leaves_bytes(entry.kind) => {}
                Some(Table::Extent) => self.push(Notice::Data(ino)),
                Some(Table::Directory) => self.push(Notice::Listing(ino)),
                Some(Table::Dentry) => self.add_names(ino, &key, change, names.iter().zip(&places)),
                _ => {}
            }
        }
    }

    fn add_names<'a>(
        &mut self,
        parent: Ino,
        key: &RowKey,
        change: &Change,
        names: impl Iterator<Item = (&'a Name, &'a Cookie)>,
    ) {
        let place = key.second().map(|cookie| Cookie::new(cookie).in_slot(0));
        let mut known = false;
        for (name, _) in names.filter(|(_, cookie)| Some(**cookie) == place) {
            self.push(Notice::Entry(parent, name.clone()));
            known = true;
        }
        if let Some(name) = change.value.as_ref().and_then(name_in) {
            self.push(Notice::Entry(parent, name));
            known = true;
        }
        if !known {
            self.unknown.push(key.clone());
        }
    }

    fn push(&mut self, notice: Notice) {
        if self.seen.insert(notice.clone()) {
            self.all.push(notice);
        }
    }
}

fn name_in(row: &Bytes) -> Option<Name> {
    DentryRow::decode(row).ok()?.named.map(|(name, _, _)| name)
}

fn inode_notice(entry: &Entry, ino: Ino, row: Option<&[u8]>) -> Notice {
    let may_have_pages =
        row.is_none_or(|row| InodeRow::decode(row).map_or(true, |row| row.kind == Kind::File));
    if may_have_pages && !leaves_bytes(entry.kind) { Notice::Data(ino) } else { Notice::Attributes(ino) }
}

/// Whether entries of this kind change no byte of a file that still has a name.
fn leaves_bytes(kind: u8) -> bool {
    use EntryKind::{
        Genesis, Link, Member, Mkdir, Mknod, Packs, Purge, Removexattr, Rename, Rmdir, Session, Setattr,
        Setting, Setxattr, Symlink, Tick, Truncate, Unlink, Write,
    };
    match EntryKind::from_number(kind) {
        Some(Write | Truncate) | None => false,
        Some(
            Tick | Genesis | Mkdir | Mknod | Symlink | Link | Unlink | Rmdir | Rename | Setattr | Setxattr
            | Removexattr | Purge | Session | Setting | Member | Packs,
        ) => true,
    }
}

#[cfg(test)]
mod tests {
    use murphy_log::{LogTime, Lsn};

    use super::*;
    use crate::{DirectoryRow, ExtentRow, ExtentTarget, PackNumber, SLOTS, Timespec};

    const DIRECTORY: Ino = Ino::new(10);
    const FILE: Ino = Ino::new(11);

    /// Only three hashes: names collide.
    fn hasher() -> NameHasher {
        NameHasher::weak([7; 32], 2)
    }

    fn name(text: &str) -> Name {
        Name::new(text.as_bytes().to_vec()).unwrap()
    }

    fn entry(kind: EntryKind, names: &[&str], changes: &[(RowKey, Option<Bytes>)]) -> Entry {
        let change = |(key, value): &(RowKey, Option<Bytes>)| Change {
            table: key.table(),
            key: key.key_bytes(),
            value: value.clone(),
        };
        Entry {
            kind: kind as u8,
            names: names.iter().map(|name| Bytes::copy_from_slice(name.as_bytes())).collect(),
            changes: changes.iter().map(change).collect(),
            ..Entry::tick(Lsn::new(20), LogTime::default())
        }
    }

    fn notices(entry: &Entry) -> Notices {
        let mut notices = Notices::default();
        notices.add(entry, &hasher());
        notices
    }

    fn file() -> Bytes {
        let empty = InodeRow::empty(Kind::File, Timespec::default());
        InodeRow { mode: 0o644, size: 9, parent: DIRECTORY, cookie: 16, ..empty }.encode()
    }

    fn dentry(text: &str, ino: Ino) -> Option<Bytes> {
        Some(DentryRow { named: Some((name(text), ino, Kind::File)), more: false }.encode())
    }

    /// The new inode is unknown to the kernel; the name may be known as missing, the directory as listed.
    #[test]
    fn a_new_name_ends_its_absence_and_the_listing() {
        let newborn = Ino::born_at(Lsn::new(20));
        let key = RowKey::dentry(DIRECTORY, hasher().place(&name("a")).get());
        let made = notices(&entry(
            EntryKind::Mknod,
            &[],
            &[
                (RowKey::inode(newborn), Some(file())),
                (key, dentry("a", newborn)),
                (RowKey::directory(DIRECTORY), Some(DirectoryRow::default().encode())),
            ],
        ));
        assert_eq!(made.all, [Notice::Entry(DIRECTORY, name("a")), Notice::Listing(DIRECTORY)]);
        assert!(made.unknown.is_empty());
    }

    /// A tombstone has no name, a slot may be taken over by another name of the same hash, and a vacancy is a name that is gone.
    #[test]
    fn removed_names_are_told_in_every_slot_of_their_hash() {
        let place = hasher().place(&name("a"));
        for slot in 0..SLOTS {
            let key = RowKey::dentry(DIRECTORY, place.in_slot(slot).get());
            let vacancy = DentryRow { named: None, more: true }.encode();
            for value in [None, Some(vacancy), dentry("b", FILE)] {
                let gone = notices(&entry(EntryKind::Unlink, &["a"], &[(key.clone(), value)]));
                assert!(gone.all.contains(&Notice::Entry(DIRECTORY, name("a"))), "{:?}", gone.all);
                assert!(gone.unknown.is_empty());
            }
        }
    }

    #[test]
    fn a_removed_name_that_nobody_tells_is_not_passed_over() {
        let other = ["b", "c", "d", "e", "f"]
            .into_iter()
            .find(|other| hasher().place(&name(other)) != hasher().place(&name("a")));
        let key = RowKey::dentry(DIRECTORY, hasher().place(&name("a")).get());
        for names in [&[][..], &[other.unwrap()]] {
            let gone = notices(&entry(EntryKind::Unlink, names, &[(key.clone(), None)]));
            assert_eq!(gone.unknown, std::slice::from_ref(&key));
        }
    }

    /// Refreshed attributes over old pages would show zeros after the old end.
    #[test]
    fn changed_bytes_are_data_and_changed_attributes_are_not() {
        let row = [(RowKey::inode(FILE), Some(file()))];
        for (kind, expected) in [
            (EntryKind::Write, Notice::Data(FILE)),
            (EntryKind::Truncate, Notice::Data(FILE)),
            (EntryKind::Setattr, Notice::Attributes(FILE)),
            (EntryKind::Link, Notice::Attributes(FILE)),
            (EntryKind::Setxattr, Notice::Attributes(FILE)),
        ] {
            assert_eq!(notices(&entry(kind, &[], &row)).all, [expected], "{kind:?}");
        }
        let extent = ExtentRow { length: 5, target: ExtentTarget::Pack { pack: PackNumber(3), offset: 0 } };
        let extents = [0, 5].map(|offset| (RowKey::extent(FILE, offset), Some(extent.encode())));
        assert_eq!(notices(&entry(EntryKind::Setattr, &[], &extents)).all, [Notice::Data(FILE)]);
        let mut unknown = entry(EntryKind::Tick, &[], &row);
        unknown.kind = 200;
        assert_eq!(notices(&unknown).all, [Notice::Data(FILE)]);
    }

    #[test]
    fn hostile_rows_are_survived() {
        let short = Change { table: Table::Dentry.number(), key: Bytes::from_static(&[1; 8]), value: None };
        let empty = Change { table: Table::Inode.number(), key: Bytes::new(), value: Some(Bytes::new()) };
        let changes = vec![short, empty];
        let hostile = Entry { changes, ..Entry::tick(Lsn::new(20), LogTime::default()) };
        assert_eq!(notices(&hostile).unknown.len(), 1);
    }
}
