//! The tree: every name has its inode, every inode its names, every count is right.

use std::collections::HashMap;

use bytes::Bytes;
use murphy_fs::{
    DentryRow, DirectoryRow, Extent, ExtentRow, ExtentTarget, Ino, InodeRow, Kind, PackRow, RowKey,
    SLOT_BYTES, Table, View,
};

use super::Findings;
use crate::error::{CliError, failed};

/// What was counted.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) inodes: u64,
    pub(super) names: u64,
    /// Bytes in extents.
    pub(super) bytes: u64,
}

/// Checks every row of the tree tables against the rows that it speaks of.
pub(super) fn check_tree(view: &View, findings: &mut Findings<'_>) -> Result<Counts, CliError> {
    let mut check = TreeCheck { view, findings, counts: Counts::default(), live: HashMap::new() };
    check.names()?;
    check.inodes()?;
    check.further_links()?;
    check.orphans()?;
    check.live_bytes()?;
    Ok(check.counts)
}

struct TreeCheck<'a, 'b> {
    view: &'a View,
    findings: &'a mut Findings<'b>,
    counts: Counts,
    /// Bytes of each pack that extents refer to.
    live: HashMap<u64, u64>,
}

/// The names of one directory.
struct Listed {
    directory: u64,
    children: u64,
    subdirectories: u32,
}

impl TreeCheck<'_, '_> {
    fn rows(&self, table: Table) -> impl Iterator<Item = Result<(RowKey, Bytes), CliError>> + use<> {
        let range = RowKey::range_start(table, 0)..RowKey::from_parts(table.number() + 1, &[]);
        self.view.rows(range).map(|row| row.map_err(failed))
    }

    fn inode(&self, ino: Ino) -> Result<Option<InodeRow>, CliError> {
        self.view.inode(ino).map_err(failed)
    }

    fn has(&self, key: &RowKey) -> Result<bool, CliError> {
        Ok(self.view.row(key).map_err(failed)?.is_some())
    }

    /// Every name stands for an inode that knows it, and the counters of every directory with names are right.
    fn names(&mut self) -> Result<(), CliError> {
        let mut listed: Option<Listed> = None;
        for row in self.rows(Table::Dentry) {
            let (key, value) = row?;
            let (Some(parent), Some(cookie)) = (key.number(), key.second()) else {
                self.findings.add(format!("{key:?} is not the key of a name"));
                continue;
            };
            if listed.as_ref().is_some_and(|listed| listed.directory != parent) {
                self.directory(listed.take())?;
            }
            let listed = listed.get_or_insert(Listed { directory: parent, children: 0, subdirectories: 0 });
            let Ok(row) = DentryRow::decode(&value) else {
                self.findings.add(format!("{key:?} cannot be read"));
                continue;
            };
            if let Some((name, ino, kind)) = row.named {
                self.counts.names += 1;
                listed.children += 1;
                listed.subdirectories += u32::from(kind == Kind::Directory);
                let name = String::from_utf8_lossy(name.as_bytes()).into_owned();
                self.name(Ino::new(parent), cookie, &name, ino, kind)?;
            }
        }
        self.directory(listed)
    }

    fn name(&mut self, parent: Ino, cookie: u64, name: &str, ino: Ino, kind: Kind) -> Result<(), CliError> {
        let Some(inode) = self.inode(ino)? else {
            self.findings
                .add(format!("{name:?} in directory {parent} stands for inode {ino}, which is missing"));
            return Ok(());
        };
        if inode.kind != kind {
            self.findings
                .add(format!("{name:?} in directory {parent} is a {kind:?}, inode {ino} a {:?}", inode.kind));
        }
        let known = (inode.parent, inode.cookie) == (parent, cookie)
            || self.has(&RowKey::link(ino, parent, cookie))?;
        if !known {
            self.findings.add(format!("inode {ino} does not know its name {name:?} in directory {parent}"));
        }
        Ok(())
    }

    /// The counters of a directory whose names have been seen.
    fn directory(&mut self, listed: Option<Listed>) -> Result<(), CliError> {
        let Some(listed) = listed else { return Ok(()) };
        let ino = Ino::new(listed.directory);
        let Some(row) = self.view.directory(ino).map_err(failed)? else {
            self.findings.add(format!("inode {ino} has names in it and is no directory"));
            return Ok(());
        };
        if (row.children, row.subdirectories) != (listed.children, listed.subdirectories) {
            self.findings.add(format!(
                "directory {ino} counts {} names and {} directories, there are {} and {}",
                row.children, row.subdirectories, listed.children, listed.subdirectories
            ));
        }
        Ok(())
    }

    fn inodes(&mut self) -> Result<(), CliError> {
        let mut extents = self.rows(Table::Extent).peekable();
        for row in self.rows(Table::Inode) {
            let (key, value) = row?;
            let (Some(number), Ok(inode)) = (key.number(), InodeRow::decode(&value)) else {
                self.findings.add(format!("{key:?} cannot be read"));
                continue;
            };
            self.counts.inodes += 1;
            let ino = Ino::new(number);
            self.own_name(ino, &inode)?;
            self.own_rows(ino, &inode)?;
            let mut found = ExtentCounts::default();
            while let Some(extent) = extents.next_if(|row| match row {
                Ok((key, _)) => key.number().is_some_and(|owner| owner <= number),
                Err(_) => true,
            }) {
                self.extent(ino, extent?, &mut found)?;
            }
            if (found.extents, found.bytes) != (inode.extents, inode.allocated) {
                self.findings.add(format!(
                    "inode {ino} counts {} extents with {} bytes, there are {} with {}",
                    inode.extents, inode.allocated, found.extents, found.bytes
                ));
            }
        }
        for row in extents {
            let (key, _) = row?;
            self.findings.add(format!("{key:?} belongs to no inode"));
        }
        Ok(())
    }

    /// The name that an inode says it has stands for it, and there are as many as it counts.
    fn own_name(&mut self, ino: Ino, inode: &InodeRow) -> Result<(), CliError> {
        if ino == Ino::ROOT {
            return Ok(());
        }
        if inode.nlink == 0 {
            if !self.has(&RowKey::orphan(ino))? {
                self.findings.add(format!("inode {ino} has no name and is not among the orphans"));
            }
            return Ok(());
        }
        let key = RowKey::dentry(inode.parent, inode.cookie);
        let row = self.view.row(&key).map_err(failed)?.and_then(|row| DentryRow::decode(&row).ok());
        let named = row.and_then(|row| row.named).is_some_and(|(_, named, _)| named == ino);
        if !named {
            self.findings.add(format!("inode {ino} has no name at its place in directory {}", inode.parent));
        }
        let mut names = 1;
        for row in self.view.rows_of(Table::Link, ino.get()) {
            row.map_err(failed)?;
            names += 1;
        }
        if names != inode.nlink {
            self.findings.add(format!("inode {ino} counts {} names, there are {names}", inode.nlink));
        }
        Ok(())
    }

    /// The rows that come with an inode's kind.
    fn own_rows(&mut self, ino: Ino, inode: &InodeRow) -> Result<(), CliError> {
        match inode.kind {
            Kind::Directory => {
                let row: Option<DirectoryRow> = self.view.directory(ino).map_err(failed)?;
                let Some(row) = row else {
                    self.findings.add(format!("directory {ino} has no counters"));
                    return Ok(());
                };
                let mut names = self.view.rows_of(Table::Dentry, ino.get());
                if row.children > 0 && names.next().is_none() {
                    self.findings
                        .add(format!("directory {ino} counts {} names, there are none", row.children));
                }
            }
            Kind::Symlink => {
                if !self.has(&RowKey::symlink(ino))? {
                    self.findings.add(format!("symbolic link {ino} has no target"));
                }
            }
            Kind::File | Kind::Fifo | Kind::Socket | Kind::CharDevice | Kind::BlockDevice => {}
        }
        if inode.has_xattrs != self.view.rows_of(Table::Xattr, ino.get()).next().is_some() {
            self.findings.add(format!("inode {ino} is wrong about having extended attributes"));
        }
        Ok(())
    }

    fn extent(
        &mut self,
        ino: Ino,
        (key, value): (RowKey, Bytes),
        found: &mut ExtentCounts,
    ) -> Result<(), CliError> {
        if key.number() != Some(ino.get()) {
            self.findings.add(format!("{key:?} belongs to no inode"));
            return Ok(());
        }
        let (Some(offset), Ok(row)) = (key.second(), ExtentRow::decode(&value)) else {
            self.findings.add(format!("{key:?} cannot be read"));
            return Ok(());
        };
        let extent = Extent { offset, row };
        if offset < found.end {
            self.findings.add(format!("{key:?} begins before the extent before it ends"));
        }
        if offset / SLOT_BYTES != (extent.end() - 1) / SLOT_BYTES {
            self.findings.add(format!("{key:?} crosses a multiple of {SLOT_BYTES} bytes"));
        }
        found.end = extent.end();
        found.extents += 1;
        found.bytes += u64::from(row.length);
        self.counts.bytes += u64::from(row.length);
        if let ExtentTarget::Pack { pack, offset } = row.target {
            *self.live.entry(pack.0).or_default() += u64::from(row.length);
            let pack_row =
                self.view.decoded(&RowKey::pack(pack.0), |row| PackRow::decode(row)).map_err(failed)?;
            match pack_row {
                None => self.findings.add(format!("{key:?} refers to pack {}, which is missing", pack.0)),
                Some(row_of_pack)
                    if u64::from(offset) + u64::from(row.length) > u64::from(row_of_pack.plain_bytes) =>
                {
                    self.findings.add(format!("{key:?} refers to bytes that pack {} does not have", pack.0));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn further_links(&mut self) -> Result<(), CliError> {
        for row in self.rows(Table::Link) {
            let (key, _) = row?;
            let place = key.key().get(8..24).and_then(|place| {
                let (parent, cookie) = place.split_at(8);
                Some((
                    u64::from_be_bytes(parent.try_into().ok()?),
                    u64::from_be_bytes(cookie.try_into().ok()?),
                ))
            });
            let (Some(number), Some((parent, cookie))) = (key.number(), place) else {
                self.findings.add(format!("{key:?} is not the key of a further name"));
                continue;
            };
            let dentry = self.view.row(&RowKey::dentry(Ino::new(parent), cookie)).map_err(failed)?;
            let named = dentry.and_then(|row| DentryRow::decode(&row).ok()).and_then(|row| row.named);
            if named.is_none_or(|(_, ino, _)| ino.get() != number) {
                self.findings.add(format!(
                    "inode {number} has no name at a place in directory {parent} that it lists"
                ));
            }
        }
        Ok(())
    }

    fn orphans(&mut self) -> Result<(), CliError> {
        for row in self.rows(Table::Orphan) {
            let (key, _) = row?;
            let Some(number) = key.number() else { continue };
            match self.inode(Ino::new(number))? {
                Some(inode) if inode.nlink == 0 => {}
                Some(_) => self.findings.add(format!("inode {number} is among the orphans and has a name")),
                None => self.findings.add(format!("inode {number} is among the orphans and is missing")),
            }
        }
        Ok(())
    }

    /// A pack that counts fewer live bytes than extents refer to would be collected too early.
    fn live_bytes(&mut self) -> Result<(), CliError> {
        let live = std::mem::take(&mut self.live);
        for (number, bytes) in live {
            let row = self.view.decoded(&RowKey::pack(number), |row| PackRow::decode(row)).map_err(failed)?;
            if let Some(row) = row.filter(|row| row.live_bytes < bytes) {
                self.findings.add(format!(
                    "pack {number} counts {} live bytes, extents refer to {bytes}",
                    row.live_bytes
                ));
            }
        }
        Ok(())
    }
}

/// The extents of one inode so far.
#[derive(Default)]
struct ExtentCounts {
    extents: u64,
    bytes: u64,
    end: u64,
}
