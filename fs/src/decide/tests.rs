//! Decisions over a table of rows in memory, with names that collide all the time.

use std::{collections::BTreeMap, ops::Range};

use bytes::Bytes;
use murphy_log::{Entry, LogTime, Lsn, MAX_NAMES, Requester, State, encode_entry};
use proptest::prelude::*;

use super::{draft::RowWrite, *};
use crate::{
    Caller, DentryRow, IndexError, IndexSnapshot, Kind, Name, NameHasher, NewNode, PackNumber, PackRow,
    PackState, RenameMode, RowIterator, SetAttr, Timespec, XattrMode, XattrName, check_tree, check_tree_with,
    table::Table,
};

/// All rows of a small tree, and the entries that made them.
#[derive(Clone)]
struct Tree {
    rows: BTreeMap<RowKey, Bytes>,
    lsn: Lsn,
    entries: Vec<Entry<RowWrite>>,
}

impl Rows for Tree {
    fn newest(&self, key: &RowKey) -> RowState {
        RowState::Known(self.rows.get(key).cloned())
    }

    fn link_hint(&self, ino: Ino) -> Option<RowKey> {
        let start = RowKey::range_start(Table::Link, ino.get());
        self.rows
            .range(start..RowKey::range_start(Table::Link, ino.get() + 1))
            .next()
            .map(|(key, _)| key.clone())
    }
}

impl IndexSnapshot for Tree {
    fn state(&self) -> Option<State> {
        None
    }

    fn get(&self, key: &RowKey) -> Result<Option<Bytes>, IndexError> {
        Ok(self.rows.get(key).cloned())
    }

    fn scan(&self, range: Range<RowKey>) -> RowIterator {
        let rows: Vec<_> = self.rows.range(range).map(|(key, row)| Ok((key.clone(), row.clone()))).collect();
        Box::new(rows.into_iter())
    }
}

impl Tree {
    fn new() -> Tree {
        let mut tree = Tree { rows: BTreeMap::new(), lsn: Lsn::ROOT, entries: Vec::new() };
        tree.decide(&Genesis { settings: Vec::new() }).unwrap();
        tree
    }

    fn decide<O: Operation>(&mut self, operation: &O) -> Result<O::Reply, Refusal> {
        let moment = Moment {
            lsn: self.lsn.next(),
            time: LogTime::from_nanos(1_790_000_000_000_000_000 + self.lsn.get() * 10_007),
            epoch: 1,
        };
        let mut draft = Draft::new(self, moment, Caller::default());
        let reply = operation.decide(&mut draft)?;
        let decided = draft.finish();
        self.lsn = moment.lsn;
        for write in &decided.writes {
            assert_eq!(self.rows.get(&write.key), write.old.as_ref());
            match write.new.clone() {
                Some(row) => self.rows.insert(write.key.clone(), row),
                None => self.rows.remove(&write.key),
            };
        }
        self.entries.push(Entry {
            lsn: moment.lsn,
            time: moment.time,
            kind: O::KIND as u8,
            caller: Some(Requester::default()),
            request: None,
            names: decided.names,
            changes: decided.writes,
        });
        Ok(reply)
    }

    fn find(&self, parent: Ino, name: &PlacedName) -> Option<Ino> {
        let row = |key: &RowKey| self.rows.get(key).map(DentryRow::decode).transpose();
        find(parent, name, row).unwrap().map(|found| found.ino)
    }

    /// Decides, and says which names the entry speaks of.
    fn names_of<O: Operation>(&mut self, operation: &O) -> Vec<String> {
        let decided = self.decide(operation);
        assert!(decided.is_ok(), "refused: {:?}", decided.err());
        let names = self.entries.last().unwrap().names.iter();
        names.map(|name| String::from_utf8(name.to_vec()).unwrap()).collect()
    }

    fn victim(&self, parent: Ino, name: &PlacedName) -> Option<Victim> {
        Some(Victim { ino: self.find(parent, name)?, open: false, extents: Some(Vec::new()) })
    }
}

#[derive(Clone, Debug)]
enum Step {
    File(usize, u8),
    Directory(usize, u8),
    Link((usize, u8), (usize, u8)),
    Unlink(usize, u8),
    Rmdir(usize, u8),
    Rename((usize, u8), (usize, u8), RenameMode),
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..4_usize, 0..9_u8);
    let mode = prop_oneof![
        4 => Just(RenameMode::Replace),
        1 => Just(RenameMode::NoReplace),
        2 => Just(RenameMode::Exchange),
        1 => Just(RenameMode::Whiteout),
    ];
    prop_oneof![
        4 => place().prop_map(|(parent, name)| Step::File(parent, name)),
        2 => place().prop_map(|(parent, name)| Step::Directory(parent, name)),
        2 => (place(), place()).prop_map(|(from, to)| Step::Link(from, to)),
        3 => place().prop_map(|(parent, name)| Step::Unlink(parent, name)),
        1 => place().prop_map(|(parent, name)| Step::Rmdir(parent, name)),
        4 => (place(), place(), mode).prop_map(|(from, to, mode)| Step::Rename(from, to, mode)),
    ]
}

/// What the names stand for, without slots.
type Names = BTreeMap<(Ino, u8), Ino>;

/// Performs a step; a refusal changes nothing.
fn perform(tree: &mut Tree, directories: &[Ino], placed: &dyn Fn(u8) -> PlacedName, step: &Step) {
    let ino = |place: usize| directories[place % directories.len()];
    let refused = match *step {
        Step::File(parent, name) => {
            let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
            tree.decide(&MakeNode { parent: ino(parent), name: placed(name), node }).err()
        }
        Step::Directory(parent, name) => {
            tree.decide(&MakeDirectory { parent: ino(parent), name: placed(name), mode: 0o755 }).err()
        }
        Step::Link((from, old), (parent, name)) => tree.find(ino(from), &placed(old)).and_then(|found| {
            tree.decide(&MakeLink { ino: found, parent: ino(parent), name: placed(name) }).err()
        }),
        Step::Unlink(parent, name) => tree.victim(ino(parent), &placed(name)).and_then(|victim| {
            tree.decide(&Unlink { parent: ino(parent), name: placed(name), victim }).err()
        }),
        Step::Rmdir(parent, name) => {
            tree.decide(&RemoveDirectory { parent: ino(parent), name: placed(name) }).err()
        }
        Step::Rename((from, old), (to, new), mode) => {
            let victim = tree.victim(ino(to), &placed(new));
            let source = victim.as_ref().and_then(|_| tree.find(ino(from), &placed(old)));
            let (from, to) = ((ino(from), placed(old)), (ino(to), placed(new)));
            let target = victim.as_ref().map(|victim| victim.ino);
            tree.decide(&Rename { from, to, mode, source, target, victim }).err()
        }
    };
    assert!(!matches!(refused, Some(Refusal::Stale | Refusal::Damaged(_))), "{step:?}: {refused:?}");
}

/// Every name of the tree, by reading its dentries; each must be found again by its hash.
fn names(tree: &Tree, placed: &dyn Fn(u8) -> PlacedName) -> Names {
    let mut names = Names::new();
    let range = RowKey::range_start(Table::Dentry, 0)..RowKey::range_start(Table::Dentry, u64::MAX);
    for (key, row) in tree.rows.range(range) {
        let Some((name, ino, _)) = DentryRow::decode(row).unwrap().named else { continue };
        let (parent, number) = (Ino::new(key.number().unwrap()), name.as_bytes()[0] - b'a');
        assert_eq!(tree.find(parent, &placed(number)), Some(ino), "{name:?} in {parent}");
        assert_eq!(names.insert((parent, number), ino), None, "{name:?} is twice in {parent}");
    }
    names
}

proptest! {
    /// The fear: a name is lost behind a slot that was freed, or is there twice.
    #[test]
    fn names_that_collide_are_found_whatever_happens_to_their_slots(
        steps in proptest::collection::vec(step(), 1..120)
    ) {
        let hasher = NameHasher::weak([3; 32], 2);
        let placed = |number: u8| PlacedName::new(&hasher, &Name::new(vec![b'a' + number]).unwrap());
        let mut tree = Tree::new();
        for step in steps {
            let directories: Vec<Ino> = std::iter::once(Ino::ROOT)
                .chain(tree.rows.keys().filter(|key| key.table() == Table::Directory.number())
                    .filter_map(RowKey::number).map(Ino::new))
                .collect();
            let before = names(&tree, &placed);
            perform(&mut tree, &directories, &placed, &step);
            let after = names(&tree, &placed);
            let changed = before.iter().filter(|(place, ino)| after.get(place) != Some(ino)).count();
            prop_assert!(changed <= 2, "{step:?} took {changed} names away");
            prop_assert_eq!(check_tree(&tree).unwrap(), Vec::new());
        }
    }
}

/// The canary of the checker: a tree that lacks any of its rows is not sound.
#[test]
fn a_tree_without_one_of_its_rows_is_found_out() {
    let hasher = NameHasher::weak([3; 32], 1);
    let placed = |number: u8| PlacedName::new(&hasher, &Name::new(vec![b'a' + number]).unwrap());
    let mut tree = Tree::new();
    let directory =
        tree.decide(&MakeDirectory { parent: Ino::ROOT, name: placed(0), mode: 0o755 }).unwrap().ino;
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    let file = tree.decide(&MakeNode { parent: directory, name: placed(1), node }).unwrap().ino;
    let target = Bytes::from_static(b"target");
    tree.decide(&MakeSymlink { parent: directory, name: placed(2), target }).unwrap();
    for number in 3..6 {
        tree.decide(&MakeLink { ino: file, parent: directory, name: placed(number) }).unwrap();
    }
    let pack = PackRow {
        writer: 1,
        sequence: 1,
        footer_digest: [0; 32],
        plain_bytes: 10,
        stored_bytes: 10,
        live_bytes: 10,
        state: PackState::Here,
    };
    let pieces = vec![Piece { offset: 0, length: 10, pack_offset: 0 }];
    let time = Timespec::default();
    let store = Store {
        ino: file,
        pack: PackUse::New(pack),
        pieces,
        overlapped: Vec::new(),
        mtime: None,
        ctime: time,
    };
    tree.decide(&store).unwrap();
    let name = XattrName::new("user.a").unwrap();
    tree.decide(&SetXattr { ino: file, name, value: Bytes::new(), mode: XattrMode::Set, open: false })
        .unwrap();
    let orphan = tree.decide(&MakeNode { parent: Ino::ROOT, name: placed(1), node }).unwrap().ino;
    let victim = Victim { ino: orphan, open: true, extents: None };
    tree.decide(&Unlink { parent: Ino::ROOT, name: placed(1), victim }).unwrap();
    assert_eq!(check_tree(&tree).unwrap(), Vec::new());
    for key in tree.rows.keys() {
        let mut torn = tree.clone();
        torn.rows.remove(key);
        // That there may be attributes is all that an inode says.
        let is_found = !check_tree(&torn).unwrap().is_empty();
        assert!(is_found || key.table() == Table::Xattr.number(), "without {key:?}");
    }
}

/// The fear: an attribute comes to an orphan between the look for its attributes and the entry that removes it, and stays for ever.
#[test]
fn an_orphan_that_is_being_purged_takes_no_attribute_and_an_open_one_does() {
    let hasher = NameHasher::new([3; 32]);
    let placed = |name: &'static str| PlacedName::new(&hasher, &Name::new(name).unwrap());
    let name = XattrName::new("user.a").unwrap();
    let mut tree = Tree::new();
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    let ino = tree.decide(&MakeNode { parent: Ino::ROOT, name: placed("file"), node }).unwrap().ino;
    let victim = Victim { ino, open: true, extents: None };
    tree.decide(&Unlink { parent: Ino::ROOT, name: placed("file"), victim }).unwrap();
    let set = SetXattr { ino, name: name.clone(), value: Bytes::new(), mode: XattrMode::Set, open: true };
    tree.decide(&set).unwrap();
    let before = tree.rows.clone();
    let refused = tree.decide(&SetXattr { open: false, ..set.clone() });
    assert!(matches!(refused, Err(Refusal::Errno(Errno::ESTALE))), "{refused:?}");
    assert!(tree.rows == before, "what is refused changes nothing");
    tree.decide(&Purge { ino, extents: Vec::new(), xattrs: Vec::new(), last: false }).unwrap();
    let begun = tree.rows.clone();
    for refused in [
        tree.decide(&SetXattr { open: true, ..set }).map(drop),
        tree.decide(&Truncate { ino, size: 0, beyond: Vec::new(), change: SetAttr::default() }).map(drop),
        tree.decide(&SetAttributes { ino, change: SetAttr { uid: Some(1), ..SetAttr::default() } }).map(drop),
    ] {
        assert!(matches!(refused, Err(Refusal::Errno(Errno::ESTALE))), "{refused:?}");
    }
    assert!(tree.rows == begun, "nothing but its purge changes what is being purged");
    assert_eq!(check_tree(&tree).unwrap(), Vec::new());
    tree.decide(&Purge { ino, extents: Vec::new(), xattrs: vec![name], last: true }).unwrap();
    assert!(!tree.rows.keys().any(|key| key.table() == Table::Xattr.number()), "{:?}", tree.rows);
}

/// The fear: whoever reads the log, or subscribes to it, sees that something was made and not what.
#[test]
fn an_entry_speaks_of_the_names_that_its_request_spoke_of() {
    let hasher = NameHasher::new([3; 32]);
    let placed = |name: &'static str| PlacedName::new(&hasher, &Name::new(name).unwrap());
    let mut tree = Tree::new();
    let (parent, node) = (Ino::ROOT, NewNode { kind: Kind::File, mode: 0o644, rdev: 0 });
    let fifo = NewNode { kind: Kind::Fifo, ..node };
    assert_eq!(tree.names_of(&MakeNode { parent, name: placed("file"), node }), ["file"]);
    let ino = tree.find(parent, &placed("file")).unwrap();
    assert_eq!(tree.names_of(&MakeNode { parent, name: placed("fifo"), node: fifo }), ["fifo"]);
    assert_eq!(tree.names_of(&MakeDirectory { parent, name: placed("dir"), mode: 0o755 }), ["dir"]);
    let target = Bytes::from_static(b"target");
    assert_eq!(tree.names_of(&MakeSymlink { parent, name: placed("sym"), target }), ["sym", "target"]);
    assert_eq!(tree.names_of(&MakeLink { ino, parent, name: placed("link") }), ["link"]);
    let name = XattrName::new("user.note").unwrap();
    let set = SetXattr { ino, name: name.clone(), value: Bytes::new(), mode: XattrMode::Set, open: false };
    assert_eq!(tree.names_of(&set), ["user.note"]);
    assert_eq!(tree.names_of(&RemoveXattr { ino, name }), ["user.note"]);
    let victim = tree.victim(parent, &placed("link")).unwrap();
    assert_eq!(tree.names_of(&Unlink { parent, name: placed("link"), victim }), ["link"]);
    let (from, to) = ((parent, placed("file")), (parent, placed("moved")));
    let rename = Rename { from, to, mode: RenameMode::Replace, source: None, target: None, victim: None };
    assert_eq!(tree.names_of(&rename), ["file", "moved"]);
    assert_eq!(tree.names_of(&RemoveDirectory { parent, name: placed("dir") }), ["dir"]);
}

/// The fear: the bytes of both files are stored before they are exchanged, and meanwhile another file has taken the place of one of them,
/// whose bytes are not.
#[test]
fn an_exchange_is_of_the_files_that_the_caller_has_seen() {
    let mut tree = Tree::new();
    let hasher = NameHasher::new([3; 32]);
    let placed = |name: &'static str| PlacedName::new(&hasher, &Name::new(name).unwrap());
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    let parent = Ino::ROOT;
    let made = ["a", "b", "c"].map(|name| {
        let name = placed(name);
        tree.decide(&MakeNode { parent, name: name.clone(), node }).unwrap();
        tree.find(parent, &name).unwrap()
    });
    let [a, b, c] = made;
    let mode = RenameMode::Exchange;
    let mut exchange = |source, target| {
        let (from, to) = ((parent, placed("a")), (parent, placed("b")));
        tree.decide(&Rename { from, to, mode, source, target, victim: None }).err()
    };
    for (source, target) in [(a, Some(c)), (a, None), (c, Some(b))] {
        assert_eq!(exchange(Some(source), target), Some(Refusal::Stale));
    }
    assert_eq!(exchange(Some(a), Some(b)), None);
    assert_eq!((tree.find(parent, &placed("a")), tree.find(parent, &placed("b"))), (Some(b), Some(a)));
}

/// Names are for people: an operation that speaks of more of them than an entry may have is not refused for it.
#[test]
fn a_change_of_many_settings_is_an_entry() {
    let mut tree = Tree::new();
    let count = MAX_NAMES + 4;
    let settings = (0..count).map(|number| (format!("setting.{number}"), Some("on".to_owned()))).collect();
    assert_eq!(tree.names_of(&ChangeSettings { settings }).len(), MAX_NAMES);
    assert_eq!(tree.entries.last().unwrap().changes.len(), count);
}

/// The fear: names for people double the log. A name that a row holds is a reference into it; only short and removed ones are spelt.
#[test]
fn the_names_of_a_created_file_cost_the_log_three_bytes() {
    let hasher = NameHasher::new([3; 32]);
    let mut tree = Tree::new();
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    for number in 0..100 {
        let name = Name::new(format!("virtual_machine_{number:03}.rs")).unwrap();
        tree.decide(&MakeNode { parent: Ino::ROOT, name: PlacedName::new(&hasher, &name), node }).unwrap();
    }
    let nameless = tree.entries.iter().map(|entry| Entry { names: Vec::new(), ..entry.clone() });
    let bytes = |entry: &Entry<RowWrite>| {
        let mut stored = Vec::new();
        encode_entry(entry, entry.time, &mut stored).unwrap();
        stored.len()
    };
    for (entry, nameless) in tree.entries.iter().zip(nameless).skip(1) {
        assert_eq!(bytes(entry), bytes(&nameless) + 3);
    }
}

/// The fear: a pack that nobody has any more is asked for for ever, or one that was found is copied by nobody.
#[test]
fn a_pack_that_was_lost_and_found_is_needed_from_the_entry_on_that_says_so() {
    let mut tree = Tree::new();
    let hasher = NameHasher::new([3; 32]);
    let name = PlacedName::new(&hasher, &Name::new("file".to_owned()).unwrap());
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    let file = tree.decide(&MakeNode { parent: Ino::ROOT, name, node }).unwrap().ino;
    let row = PackRow {
        writer: 1,
        sequence: 1,
        footer_digest: [0; 32],
        plain_bytes: 10,
        stored_bytes: 10,
        live_bytes: 10,
        state: PackState::Here,
    };
    let store = Store {
        ino: file,
        pack: PackUse::New(row),
        pieces: vec![Piece { offset: 0, length: 10, pack_offset: 0 }],
        overlapped: Vec::new(),
        mtime: None,
        ctime: Timespec::default(),
    };
    let pack = tree.decide(&store).unwrap();
    let record = |news| RecordPacks { packs: vec![pack, PackNumber(1 << 40)], news };
    let state = |tree: &Tree| {
        let row = PackRow::decode(&tree.rows[&RowKey::pack(pack.0)]).unwrap();
        (row.is_missing(), row.needed_since(pack))
    };
    assert_eq!(state(&tree), (false, Some(Lsn::new(pack.0))));
    assert_eq!(tree.decide(&record(PackNews::Missing)), Ok(1), "a pack that nobody knows is passed over");
    assert_eq!(state(&tree), (true, None));
    assert_eq!(tree.decide(&record(PackNews::Missing)), Ok(0), "it is no news");
    assert_eq!(tree.decide(&record(PackNews::Found)), Ok(1));
    let found = tree.entries.last().unwrap().lsn;
    assert_eq!(state(&tree), (false, Some(found)));
    let size = Truncate { ino: file, size: 5, beyond: vec![0], change: SetAttr::default() };
    tree.decide(&size).unwrap();
    assert_eq!(state(&tree), (false, Some(found)), "what is counted moves nothing");
    let none = Truncate { ino: file, size: 0, beyond: vec![0], change: SetAttr::default() };
    tree.decide(&none).unwrap();
    assert_eq!(tree.decide(&record(PackNews::Missing)), Ok(1), "the past refers to it");
}

/// The fear: a name at another hash than its own is listed and never found, and the check calls the tree sound.
#[test]
fn a_name_that_does_not_lie_at_its_hash_is_found() {
    let [hasher, other] = [[3; 32], [4; 32]].map(NameHasher::new);
    let mut tree = Tree::new();
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    let name = PlacedName::new(&hasher, &Name::new("name").unwrap());
    tree.decide(&MakeNode { parent: Ino::ROOT, name, node }).unwrap();
    let findings = |hasher: &NameHasher| {
        let mut found = Vec::new();
        check_tree_with(&tree, hasher, &mut |finding| found.push(finding.to_string())).unwrap();
        found
    };
    assert_eq!(findings(&hasher), Vec::<String>::new());
    let misplaced = findings(&other);
    assert!(misplaced.len() == 1 && misplaced[0].contains("not its hash"), "{misplaced:?}");
}
