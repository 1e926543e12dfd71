//! Whether a tree is sound: every name has its inode, every inode its names, every count is right.
//!
//! Invariants:
//! - Nothing is changed, and everything is read from one snapshot.
//! - Whatever the rows hold, the check ends, and says what it found instead of failing. Only a snapshot that cannot be read is an error.
//! - Memory grows with the number of packs and of directories, not with that of files.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    iter::Peekable,
};

use bytes::Bytes;

use crate::{
    Cookie, DentryRow, DirectoryRow, Extent, ExtentRow, ExtentTarget, IndexError, IndexSnapshot, Ino,
    InodeRow, Kind, NameHasher, PackRow, PackState, RowIterator, RowKey, SLOT_BYTES, Table,
};

/// Something that is wrong with a tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding(String);

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What was counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TreeCounts {
    /// Inodes, orphans included.
    pub inodes: u64,
    /// Names in directories.
    pub names: u64,
    /// Bytes in extents.
    pub bytes: u64,
}

/// Checks every row of the tree against the rows that it speaks of, and the totals against the snapshot's state if it has one. Returns
/// what is wrong, as far as [`FINDINGS_MAX`]. Whether each name lies where it is looked for only [`check_tree_with`] can say.
pub fn check_tree(snapshot: &dyn IndexSnapshot) -> Result<Vec<Finding>, IndexError> {
    let mut findings = Vec::new();
    let mut keep = |finding| {
        if findings.len() < FINDINGS_MAX {
            findings.push(finding);
        }
    };
    check(snapshot, None, &mut keep)?;
    Ok(findings)
}

/// As [`check_tree`], and each name has to lie at its hash; hands out each finding as it is found, however many there are.
pub fn check_tree_with(
    snapshot: &dyn IndexSnapshot,
    hasher: &NameHasher,
    found: &mut dyn FnMut(Finding),
) -> Result<TreeCounts, IndexError> {
    check(snapshot, Some(hasher), found)
}

fn check(
    snapshot: &dyn IndexSnapshot,
    hasher: Option<&NameHasher>,
    found: &mut dyn FnMut(Finding),
) -> Result<TreeCounts, IndexError> {
    let mut check = TreeCheck {
        snapshot,
        hasher,
        found,
        counts: TreeCounts::default(),
        live: HashMap::new(),
        rooted: HashSet::from([Ino::ROOT]),
    };
    check.names()?;
    check.inodes()?;
    check.further_links()?;
    check.orphans()?;
    check.live_bytes()?;
    check.totals();
    Ok(check.counts)
}

struct TreeCheck<'a> {
    snapshot: &'a dyn IndexSnapshot,
    /// Where names belong, if that is known.
    hasher: Option<&'a NameHasher>,
    found: &'a mut dyn FnMut(Finding),
    counts: TreeCounts,
    /// Bytes of each pack that extents refer to.
    live: HashMap<u64, u64>,
    /// Directories that are known to lead up to the root.
    rooted: HashSet<Ino>,
}

/// The names of one directory.
struct Listed {
    directory: u64,
    children: u64,
    subdirectories: u32,
    /// The last row, to see that the slots of a hash are in order.
    last: Option<(Cookie, DentryRow)>,
}

impl TreeCheck<'_> {
    fn wrong(&mut self, text: String) {
        (self.found)(Finding(text));
    }

    fn table(&self, table: Table) -> RowIterator {
        self.snapshot.scan(RowKey::range_start(table, 0)..RowKey::from_parts(table.number() + 1, &[]))
    }

    fn rows_of(&self, table: Table, ino: Ino) -> RowIterator {
        let after = RowKey::range_start(table, ino.get().saturating_add(1));
        self.snapshot.scan(RowKey::range_start(table, ino.get())..after)
    }

    fn has(&self, key: &RowKey) -> Result<bool, IndexError> {
        Ok(self.snapshot.get(key)?.is_some())
    }

    /// The inode row of `ino`; one that cannot be read is reported with the inodes.
    fn inode(&self, ino: Ino) -> Result<Option<InodeRow>, IndexError> {
        Ok(self.snapshot.get(&RowKey::inode(ino))?.and_then(|row| InodeRow::decode(&row).ok()))
    }

    fn directory(&self, ino: Ino) -> Result<Option<DirectoryRow>, IndexError> {
        Ok(self.snapshot.get(&RowKey::directory(ino))?.and_then(|row| DirectoryRow::decode(&row).ok()))
    }

    /// Which inode the name at this place stands for.
    fn named(&self, parent: Ino, cookie: u64) -> Result<Option<Ino>, IndexError> {
        let row = self.snapshot.get(&RowKey::dentry(parent, cookie))?;
        let row = row.and_then(|row| DentryRow::decode(&row).ok());
        Ok(row.and_then(|row| row.named).map(|(_, ino, _)| ino))
    }

    /// Every name stands for an inode that knows it, and the counters of every directory with names are right.
    fn names(&mut self) -> Result<(), IndexError> {
        let mut listed: Option<Listed> = None;
        for row in self.table(Table::Dentry) {
            let (key, value) = row?;
            let (Some(parent), Some(cookie)) = (key.number(), key.second()) else {
                self.wrong(format!("{key:?} is not the key of a name"));
                continue;
            };
            let Ok(row) = DentryRow::decode(&value) else {
                self.wrong(format!("{key:?} cannot be read"));
                continue;
            };
            if listed.as_ref().is_some_and(|listed| listed.directory != parent) {
                self.counters(listed.take())?;
            }
            let listed = listed.get_or_insert(Listed {
                directory: parent,
                children: 0,
                subdirectories: 0,
                last: None,
            });
            self.slot(listed, Cookie::new(cookie), &row);
            if let Some((name, ino, kind)) = &row.named {
                self.counts.names += 1;
                listed.children += 1;
                listed.subdirectories += u32::from(*kind == Kind::Directory);
                let place = self.hasher.map(|hasher| hasher.place(name));
                let name = String::from_utf8_lossy(name.as_bytes()).into_owned();
                if place.is_some_and(|place| place != Cookie::new(cookie).in_slot(0)) {
                    self.wrong(format!(
                        "{name:?} in directory {parent} lies at {cookie}, which is not its hash: it is listed and never found"
                    ));
                }
                self.name(Ino::new(parent), cookie, &name, *ino, *kind)?;
            }
            listed.last = Some((Cookie::new(cookie), row));
        }
        self.counters(listed)
    }

    /// The slots of a hash are used from 0 upwards, say so, and end with a name: else a name that is there is not found.
    fn slot(&mut self, listed: &Listed, cookie: Cookie, row: &DentryRow) {
        let place = format!("directory {} at {}", listed.directory, cookie.get());
        let before = listed.last.as_ref().filter(|(last, _)| last.in_slot(0) == cookie.in_slot(0));
        let expected = before.map_or(0, |(last, _)| last.slot() + 1);
        if cookie.slot() != expected {
            self.wrong(format!("{place}: slot {} follows where slot {expected} should", cookie.slot()));
        }
        if before.is_some_and(|(_, last)| !last.more) {
            self.wrong(format!("{place}: the slot below does not say that there is a higher one"));
        }
        if before.is_none() {
            self.last_slot(listed);
        }
        if row.named.is_none() && !row.more {
            self.wrong(format!("{place}: the last slot of its hash is vacant"));
        }
    }

    /// The row before was the highest slot of its hash.
    fn last_slot(&mut self, listed: &Listed) {
        if let Some((last, DentryRow { more: true, .. })) = &listed.last {
            let (directory, cookie) = (listed.directory, last.get());
            self.wrong(format!("directory {directory} at {cookie}: there is no higher slot"));
        }
    }

    fn name(&mut self, parent: Ino, cookie: u64, name: &str, ino: Ino, kind: Kind) -> Result<(), IndexError> {
        let Some(inode) = self.inode(ino)? else {
            self.wrong(format!("{name:?} in directory {parent} stands for inode {ino}, which is missing"));
            return Ok(());
        };
        if inode.kind != kind {
            self.wrong(format!(
                "{name:?} in directory {parent} is a {kind:?}, inode {ino} a {:?}",
                inode.kind
            ));
        }
        let known = (inode.parent, inode.cookie) == (parent, cookie)
            || self.has(&RowKey::link(ino, parent, cookie))?;
        if !known {
            self.wrong(format!("inode {ino} does not know its name {name:?} in directory {parent}"));
        }
        Ok(())
    }

    /// The counters of a directory whose names have been seen.
    fn counters(&mut self, listed: Option<Listed>) -> Result<(), IndexError> {
        let Some(listed) = listed else { return Ok(()) };
        self.last_slot(&listed);
        let ino = Ino::new(listed.directory);
        let Some(row) = self.directory(ino)? else {
            self.wrong(format!("inode {ino} has names in it and is no directory"));
            return Ok(());
        };
        if (row.children, row.subdirectories) != (listed.children, listed.subdirectories) {
            self.wrong(format!(
                "directory {ino} counts {} names and {} directories, there are {} and {}",
                row.children, row.subdirectories, listed.children, listed.subdirectories
            ));
        }
        Ok(())
    }

    /// Every inode has the rows that it needs, and no row belongs to an inode that is not there.
    fn inodes(&mut self) -> Result<(), IndexError> {
        let mut extents = self.table(Table::Extent).peekable();
        let mut others = OWNED.map(|table| self.table(table).peekable());
        for row in self.table(Table::Inode) {
            let (key, value) = row?;
            let (Some(number), Ok(inode)) = (key.number(), InodeRow::decode(&value)) else {
                self.wrong(format!("{key:?} cannot be read"));
                continue;
            };
            self.counts.inodes += 1;
            let ino = Ino::new(number);
            self.own_name(ino, &inode)?;
            self.own_rows(ino, &inode)?;
            for rows in &mut others {
                self.owned(rows, number)?;
            }
            let mut found = ExtentCounts::default();
            while let Some(extent) = next_up_to(&mut extents, number) {
                self.extent(ino, extent?, &mut found)?;
            }
            if (found.extents, found.bytes) != (inode.extents, inode.allocated) {
                self.wrong(format!(
                    "inode {ino} counts {} extents with {} bytes, there are {} with {}",
                    inode.extents, inode.allocated, found.extents, found.bytes
                ));
            }
            if found.end > inode.size {
                self.wrong(format!("inode {ino} ends at {}, its extents at {}", inode.size, found.end));
            }
        }
        for rows in others.iter_mut().chain([&mut extents]) {
            self.owned(rows, u64::MAX)?;
            rows.next().transpose()?.into_iter().for_each(|(key, _)| self.homeless(&key));
        }
        Ok(())
    }

    /// Passes over the rows of inodes up to `number`, of which only `number` itself exists.
    fn owned(&mut self, rows: &mut Peekable<RowIterator>, number: u64) -> Result<(), IndexError> {
        while let Some(row) = next_up_to(rows, number) {
            let (key, _) = row?;
            if key.number() != Some(number) {
                self.homeless(&key);
            }
        }
        Ok(())
    }

    fn homeless(&mut self, key: &RowKey) {
        self.wrong(format!("{key:?} belongs to no inode"));
    }

    /// The name that an inode says it has stands for it, and there are as many as it counts.
    fn own_name(&mut self, ino: Ino, inode: &InodeRow) -> Result<(), IndexError> {
        if ino == Ino::ROOT {
            return Ok(());
        }
        if inode.nlink == 0 {
            if !self.has(&RowKey::orphan(ino))? {
                self.wrong(format!("inode {ino} has no name and is not among the orphans"));
            }
            return Ok(());
        }
        if self.named(inode.parent, inode.cookie)? != Some(ino) {
            self.wrong(format!("inode {ino} has no name at its place in directory {}", inode.parent));
        }
        let mut names = 1;
        for row in self.rows_of(Table::Link, ino) {
            row?;
            names += 1;
        }
        if names != u64::from(inode.nlink) {
            self.wrong(format!("inode {ino} counts {} names, there are {names}", inode.nlink));
        }
        Ok(())
    }

    /// The rows that come with an inode's kind. An orphaned directory has lost its counters with its name.
    fn own_rows(&mut self, ino: Ino, inode: &InodeRow) -> Result<(), IndexError> {
        match inode.kind {
            Kind::Directory if inode.nlink > 0 => match self.directory(ino)? {
                Some(row) => {
                    if row.children > 0 && self.rows_of(Table::Dentry, ino).next().is_none() {
                        self.wrong(format!("directory {ino} counts {} names, there are none", row.children));
                    }
                    self.reaches_root(ino)?;
                }
                None => self.wrong(format!("directory {ino} has no counters")),
            },
            Kind::Symlink if !self.has(&RowKey::symlink(ino))? => {
                self.wrong(format!("symbolic link {ino} has no target"));
            }
            _ => {}
        }
        // The flag stays when the last attribute goes: it says that there may be some.
        if !inode.has_xattrs && self.rows_of(Table::Xattr, ino).next().is_some() {
            self.wrong(format!("inode {ino} does not know that it has extended attributes"));
        }
        Ok(())
    }

    /// A directory below itself is in no listing, and everything in it is lost.
    fn reaches_root(&mut self, ino: Ino) -> Result<(), IndexError> {
        let mut path = HashSet::new();
        let mut at = ino;
        while !self.rooted.contains(&at) {
            if !path.insert(at) {
                self.wrong(format!("directory {ino} is below itself"));
                return Ok(());
            }
            let Some(above) = self.inode(at)? else { return Ok(()) };
            at = above.parent;
        }
        self.rooted.extend(path);
        Ok(())
    }

    fn extent(
        &mut self,
        ino: Ino,
        (key, value): (RowKey, Bytes),
        found: &mut ExtentCounts,
    ) -> Result<(), IndexError> {
        if key.number() != Some(ino.get()) {
            self.homeless(&key);
            return Ok(());
        }
        let (Some(offset), Ok(row)) = (key.second(), ExtentRow::decode(&value)) else {
            self.wrong(format!("{key:?} cannot be read"));
            return Ok(());
        };
        let Some(end) = offset.checked_add(u64::from(row.length)) else {
            self.wrong(format!("{key:?} ends beyond every file"));
            return Ok(());
        };
        let extent = Extent { offset, row };
        if offset < found.end {
            self.wrong(format!("{key:?} begins before the extent before it ends"));
        }
        if offset / SLOT_BYTES != (end - 1) / SLOT_BYTES {
            self.wrong(format!("{key:?} crosses a multiple of {SLOT_BYTES} bytes"));
        }
        found.end = end;
        found.extents += 1;
        found.bytes += u64::from(row.length);
        self.counts.bytes += u64::from(row.length);
        self.target(&key, &extent)
    }

    /// The bytes that an extent refers to are in a pack that the tree knows.
    fn target(&mut self, key: &RowKey, extent: &Extent) -> Result<(), IndexError> {
        let ExtentTarget::Pack { pack, offset } = extent.row.target else { return Ok(()) };
        let length = u64::from(extent.row.length);
        *self.live.entry(pack.0).or_default() += length;
        let row = self.snapshot.get(&RowKey::pack(pack.0))?;
        match row.and_then(|row| PackRow::decode(&row).ok()) {
            None => self.wrong(format!("{key:?} refers to pack {}, which is missing", pack.0)),
            Some(row) if u64::from(offset) + length > u64::from(row.plain_bytes) => {
                self.wrong(format!("{key:?} refers to bytes that pack {} does not have", pack.0));
            }
            Some(_) => {}
        }
        Ok(())
    }

    fn further_links(&mut self) -> Result<(), IndexError> {
        for row in self.table(Table::Link) {
            let (key, _) = row?;
            let word = |at: usize| key.key().get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes);
            let (Some(number), Some(parent), Some(cookie)) = (word(0), word(8), word(16)) else {
                self.wrong(format!("{key:?} is not the key of a further name"));
                continue;
            };
            if self.named(Ino::new(parent), cookie)? != Some(Ino::new(number)) {
                self.wrong(format!(
                    "inode {number} has no name at a place in directory {parent} that it lists"
                ));
            }
        }
        Ok(())
    }

    fn orphans(&mut self) -> Result<(), IndexError> {
        for row in self.table(Table::Orphan) {
            let (key, _) = row?;
            let Some(number) = key.number() else { continue };
            match self.inode(Ino::new(number))? {
                Some(inode) if inode.nlink == 0 => {}
                Some(_) => self.wrong(format!("inode {number} is among the orphans and has a name")),
                None => self.wrong(format!("inode {number} is among the orphans and is missing")),
            }
        }
        Ok(())
    }

    /// A pack that counts fewer live bytes than extents refer to would be collected too early.
    fn live_bytes(&mut self) -> Result<(), IndexError> {
        for (number, bytes) in std::mem::take(&mut self.live) {
            let row = self.snapshot.get(&RowKey::pack(number))?.and_then(|row| PackRow::decode(&row).ok());
            let Some(row) = row else { continue };
            if row.live_bytes < bytes {
                self.wrong(format!(
                    "pack {number} counts {} live bytes, extents refer to {bytes}",
                    row.live_bytes
                ));
            }
            if let PackState::Found { at } = row.state
                && at.get() <= number
            {
                self.wrong(format!("pack {number} was found again at lsn {at}, before it was named"));
            }
        }
        Ok(())
    }

    fn totals(&mut self) {
        let Some(usage) = self.snapshot.state().map(|state| state.usage) else { return };
        let TreeCounts { inodes, bytes, .. } = self.counts;
        if inodes != usage.inodes {
            self.wrong(format!("{inodes} inodes are there, {} are accounted for", usage.inodes));
        }
        if bytes != usage.bytes {
            self.wrong(format!("{bytes} bytes are in extents, {} are accounted for", usage.bytes));
        }
    }
}

/// The extents of one inode so far.
#[derive(Default)]
struct ExtentCounts {
    extents: u64,
    bytes: u64,
    end: u64,
}

/// The next row, if it is one of an inode up to `number`.
fn next_up_to(rows: &mut Peekable<RowIterator>, number: u64) -> Option<Result<(RowKey, Bytes), IndexError>> {
    rows.next_if(|row| match row {
        Ok((key, _)) => key.number().is_none_or(|owner| owner <= number),
        Err(_) => true,
    })
}

/// Tables whose rows belong to an inode, besides extents.
const OWNED: [Table; 5] = [Table::Directory, Table::Symlink, Table::Xattr, Table::Link, Table::Orphan];
/// How many findings [`check_tree`] returns.
pub const FINDINGS_MAX: usize = 10_000;
