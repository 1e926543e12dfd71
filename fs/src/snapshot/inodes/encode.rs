//! From inodes to columns.
//!
//! Invariants:
//! - What [`super::decode`] reads is exactly what this writes, field by field in the same order.

use std::collections::HashMap;

use super::{
    super::{
        streams::{StreamWriter, zigzag},
        times::TimesWriter,
    },
    *,
};

/// The streams of a block while it is written.
#[derive(Default)]
struct InodeStreams {
    last_ino: u64,
    inos: Vec<u64>,
    shapes: Vec<u8>,
    class_numbers: HashMap<Class, u64>,
    classes: Vec<u64>,
    class_fields: [Vec<u64>; CLASS_FIELDS],
    parents: Vec<u64>,
    cookies: Vec<u64>,
    sizes: Vec<u64>,
    allocated: Vec<u64>,
    extents: Vec<u64>,
    atimes: TimesWriter,
    mtimes: TimesWriter,
    ctimes: TimesWriter,
    children: Vec<u64>,
    subdirectories: Vec<u64>,
    directory_mtimes: TimesWriter,
    directory_ctimes: TimesWriter,
    packs: Vec<u64>,
    offsets: Vec<u64>,
    /// Pack of the extent before, and the offset at its end.
    last_target: (u64, u64),
}

impl InodeBatch {
    pub(in crate::snapshot) fn encode(&self) -> StreamWriter {
        let mut out = InodeStreams::default();
        let mut targets = &self.targets[..];
        for entry in &self.entries {
            let (own, rest) = targets.split_at(entry.extents as usize);
            out.entry(entry);
            for (slot, (pack, offset)) in (0..).zip(own) {
                out.target(*pack, *offset, slot_length(entry.row.size, slot));
            }
            targets = rest;
        }
        out.finish()
    }
}

impl InodeStreams {
    fn entry(&mut self, entry: &InodeEntry) {
        let row = &entry.row;
        self.inos.push(entry.ino.wrapping_sub(self.last_ino));
        self.last_ino = entry.ino;
        let mut shape = self.times(row);
        self.class(row);
        if entry.placed == Placed::Here {
            shape |= HERE;
            self.parents.push(zigzag(entry.ino, row.parent.get()));
            self.cookies.push(row.cookie);
        }
        if matches!(row.kind, Kind::File | Kind::Symlink) {
            self.sizes.push(row.size);
        }
        if row.kind == Kind::File {
            if is_dense(row) {
                shape |= DENSE;
            } else {
                self.allocated.push(row.allocated);
                self.extents.push(row.extents);
            }
        }
        if entry.extents > 0 {
            shape |= ORDINARY;
        }
        if let Some(directory) = &entry.directory {
            shape |= DIRECTORY | self.directory(directory);
        }
        self.shapes.push(shape);
    }

    /// A file's times; the shape says which of them are the same. Directories keep mtime in their own row.
    fn times(&mut self, row: &InodeRow) -> u8 {
        let InodeRow { atime, mtime, ctime, .. } = *row;
        let mut shape = 0;
        self.ctimes.push(ctime);
        if row.kind != Kind::Directory {
            if mtime == ctime {
                shape |= MTIME_IS_CTIME;
            } else {
                self.mtimes.push(mtime);
            }
        }
        if atime == ctime {
            shape |= ATIME_IS_CTIME;
        } else if atime == mtime && row.kind != Kind::Directory {
            shape |= ATIME_IS_MTIME;
        } else {
            self.atimes.push(atime);
        }
        shape
    }

    fn class(&mut self, row: &InodeRow) {
        let class = Class::of(row);
        let next = self.class_numbers.len() as u64;
        let number = *self.class_numbers.entry(class).or_insert(next);
        if number == next {
            self.class_fields.iter_mut().zip(class.numbers()).for_each(|(field, number)| field.push(number));
        }
        self.classes.push(number);
    }

    fn directory(&mut self, row: &DirectoryRow) -> u8 {
        let DirectoryRow { children, subdirectories, mtime, ctime } = *row;
        self.children.push(children);
        self.subdirectories.push(u64::from(subdirectories));
        self.directory_ctimes.push(ctime);
        if mtime == ctime {
            return MTIME_IS_CTIME;
        }
        self.directory_mtimes.push(mtime);
        0
    }

    fn target(&mut self, pack: u64, offset: u32, length: u32) {
        let (last_pack, end) = self.last_target;
        let expected = if pack == last_pack { end } else { 0 };
        self.packs.push(zigzag(last_pack, pack));
        self.offsets.push(zigzag(expected, u64::from(offset)));
        self.last_target = (pack, u64::from(offset) + u64::from(length));
    }

    fn finish(self) -> StreamWriter {
        let mut streams = StreamWriter::default();
        streams.numbers(INOS, &self.inos);
        streams.bytes(SHAPES, self.shapes);
        streams.numbers(CLASSES, &self.classes);
        for (id, field) in (CLASS_FIRST..).zip(&self.class_fields) {
            streams.numbers(id, field);
        }
        streams.numbers(PARENTS, &self.parents);
        streams.numbers(COOKIES, &self.cookies);
        streams.numbers(SIZES, &self.sizes);
        streams.numbers(ALLOCATED, &self.allocated);
        streams.numbers(EXTENTS, &self.extents);
        self.atimes.store(ATIMES, &mut streams);
        self.mtimes.store(MTIMES, &mut streams);
        self.ctimes.store(CTIMES, &mut streams);
        streams.numbers(CHILDREN, &self.children);
        streams.numbers(SUBDIRECTORIES, &self.subdirectories);
        self.directory_mtimes.store(DIRECTORY_MTIMES, &mut streams);
        self.directory_ctimes.store(DIRECTORY_CTIMES, &mut streams);
        streams.numbers(PACKS, &self.packs);
        streams.numbers(OFFSETS, &self.offsets);
        streams
    }
}
