//! How random programs are drawn.
//!
//! Invariants:
//! - Few names and many operations: collisions are the rule, not luck.
//! - Every strategy is boxed: nested by value they need more stack than a test thread has.
//! - Sizes are small most of the time; some lie at the borders of cells and packs, few are huge.

use std::time::Duration;

use murphy_fs::{Kind, OpenFlags, RenameMode, Timespec, XattrMode};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{AttributePick, Length, NamePick, Operation, Pick, Place, Program, Step, TimePick, Who};

/// Programs of up to `steps_max` operations.
pub fn strategy(steps_max: usize) -> impl Strategy<Value = Program> {
    vec(step(), 1..=steps_max).prop_map(|steps| Program { steps })
}

/// The bytes of a name of the pool.
pub(super) fn pool_name(number: u8) -> Vec<u8> {
    match number % NAMES {
        0 => vec![b'n'; 255],
        1 => b"\xff\xfe not utf-8 \x01\n".to_vec(),
        2 => "\u{e4}\u{1f980}".as_bytes().to_vec(),
        3 => b"...".to_vec(),
        other => vec![b'a' + other - 4],
    }
}

/// The bytes of an attribute's name.
pub(super) fn xattr_name(number: u8) -> Vec<u8> {
    let names: [&[u8]; XATTRS as usize] = [
        b"user.a",
        b"user.b",
        b"user.\xff",
        b"trusted.a",
        b"security.a",
        b"security.capability",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
        b"user.",
        b"unknown",
    ];
    names[usize::from(number % XATTRS)].to_vec()
}

fn step() -> impl Strategy<Value = Step> {
    (who(), operation()).prop_map(|(who, operation)| Step { who, operation })
}

fn who() -> impl Strategy<Value = Who> {
    prop_oneof![3 => Just(Who::Root), 2 => Just(Who::Alice), 1 => Just(Who::Bob), 1 => Just(Who::Carol)]
}

fn operation() -> BoxedStrategy<Operation> {
    prop_oneof![10 => on_names(), 8 => on_data(), 5 => on_attributes(), 3 => on_lists(), 1 => on_volume()]
        .boxed()
}

fn on_names() -> BoxedStrategy<Operation> {
    use Operation::{
        Create, InRemoved, Link, LinkOpen, Lookup, Mkdir, MkdirIn, Mknod, Readlink, Rename, Rmdir, Symlink,
        Unlink,
    };
    prop_oneof![
        1 => place().prop_map(|place| Lookup { place }),
        1 => found(None).prop_map(|place| Lookup { place }),
        4 => (place(), mode()).prop_map(|(place, mode)| Mkdir { place, mode }),
        1 => (place(), special(), mode(), any::<u32>())
            .prop_map(|(place, kind, mode, rdev)| Mknod { place, kind, mode, rdev }),
        6 => (place(), mode(), flags()).prop_map(|(place, mode, flags)| Create { place, mode, flags }),
        2 => (place(), target()).prop_map(|(place, target)| Symlink { place, target }),
        1 => pick(Kind::Symlink).prop_map(|node| Readlink { node }),
        3 => (pick(Kind::File), place()).prop_map(|(node, place)| Link { node, place }),
        1 => (any::<u16>(), place()).prop_map(|(handle, place)| LinkOpen { handle, place }),
        5 => found(Some(Kind::File)).prop_map(|place| Unlink { place }),
        3 => found(Some(Kind::Directory)).prop_map(|place| Rmdir { place }),
        8 => (move_of(), rename_mode()).prop_map(|((from, to), mode)| Rename { from, to, mode }),
        1 => (pick(Kind::File), any::<u8>()).prop_map(|(node, name)| MkdirIn { node, name }),
        1 => (any::<u16>(), any::<u8>()).prop_map(|(removed, name)| InRemoved { removed, name }),
    ]
    .boxed()
}

fn on_data() -> BoxedStrategy<Operation> {
    use Operation::{Flush, Fsync, FsyncOpen, Open, Read, ReadAll, ReadWrongFile, Release, Write};
    prop_oneof![
        4 => (pick(Kind::File), flags()).prop_map(|(node, flags)| Open { node, flags }),
        4 => (any::<u16>(), offset(), 0..200_000_u32)
            .prop_map(|(handle, offset, length)| Read { handle, offset, length }),
        2 => any::<u16>().prop_map(|handle| ReadAll { handle }),
        10 => (any::<u16>(), offset(), length(), any::<u8>())
            .prop_map(|(handle, offset, length, seed)| Write { handle, offset, length, seed }),
        1 => any::<u16>().prop_map(|handle| Flush { handle }),
        1 => pick(Kind::File).prop_map(|node| Fsync { node }),
        2 => any::<u16>().prop_map(|handle| FsyncOpen { handle }),
        3 => any::<u16>().prop_map(|handle| Release { handle }),
        1 => (any::<u16>(), pick(Kind::File)).prop_map(|(handle, node)| ReadWrongFile { handle, node }),
    ]
    .boxed()
}

fn on_attributes() -> BoxedStrategy<Operation> {
    use Operation::{Getattr, Getxattr, Listxattr, Removexattr, Setattr, SetattrByHandle, Setxattr};
    prop_oneof![
        1 => pick(Kind::File).prop_map(|node| Getattr { node }),
        8 => (pick(Kind::File), change()).prop_map(|(node, change)| Setattr { node, change }),
        2 => (any::<u16>(), change()).prop_map(|(handle, change)| SetattrByHandle { handle, change }),
        3 => (pick(Kind::File), xattr(), xattr_length(), any::<u8>(), xattr_mode())
            .prop_map(|(node, name, length, seed, mode)| Setxattr { node, name, length, seed, mode }),
        2 => (pick(Kind::File), xattr()).prop_map(|(node, name)| Getxattr { node, name }),
        1 => pick(Kind::File).prop_map(|node| Listxattr { node }),
        2 => (pick(Kind::File), xattr()).prop_map(|(node, name)| Removexattr { node, name }),
    ]
    .boxed()
}

fn on_lists() -> BoxedStrategy<Operation> {
    use Operation::{BeginScan, GoOnScanning, List};
    prop_oneof![
        1 => (pick(Kind::Directory), 1..20_u8).prop_map(|(node, page)| List { node, page }),
        1 => any::<u16>().prop_map(|directory| BeginScan { directory }),
        3 => (any::<u16>(), 1..4_u8).prop_map(|(scan, page)| GoOnScanning { scan, page }),
    ]
    .boxed()
}

fn on_volume() -> BoxedStrategy<Operation> {
    prop_oneof![
        1 => Just(Operation::Statfs),
        1 => Just(Operation::SyncAll),
        2 => (1..20_u64).prop_map(|seconds| Operation::Wait { duration: Duration::from_secs(seconds) }),
    ]
    .boxed()
}

/// Mostly of the wanted kind, sometimes anything.
fn pick(kind: Kind) -> BoxedStrategy<Pick> {
    let kinds = prop_oneof![
        12 => Just(Some(kind)),
        2 => Just(Some(Kind::Directory)),
        1 => Just(None),
    ];
    (any::<u16>(), kinds).prop_map(|(number, kind)| Pick { number, kind }).boxed()
}

/// Any name, there or not.
fn place() -> BoxedStrategy<Place> {
    (directory(), pool()).prop_map(|(directory, name)| Place { directory, name }).boxed()
}

/// Mostly a name that is there, of this kind.
fn found(kind: Option<Kind>) -> BoxedStrategy<Place> {
    let existing = any::<u16>().prop_map(move |number| NamePick::Existing(number, kind));
    let other = any::<u16>().prop_map(|number| NamePick::Existing(number, None));
    let name = prop_oneof![6 => existing, 2 => other, 1 => pool()];
    (directory(), name).prop_map(|(directory, name)| Place { directory, name }).boxed()
}

fn pool() -> BoxedStrategy<NamePick> {
    any::<u8>().prop_map(NamePick::Pool).boxed()
}

/// The first directories are wanted more often, so that names meet.
fn directory() -> BoxedStrategy<u16> {
    prop_oneof![2 => 0..3_u16, 1 => any::<u16>()].boxed()
}

/// A source of a rename, and its destination: names that are there and names that are not, of all kinds.
fn move_of() -> BoxedStrategy<(Place, Place)> {
    let kind = || select(vec![Some(Kind::Directory), Some(Kind::File), None]);
    let from = kind().prop_flat_map(found);
    let to = prop_oneof![place(), kind().prop_flat_map(found)];
    (from, to).boxed()
}

fn mode() -> BoxedStrategy<u16> {
    prop_oneof![
        3 => select(vec![0o644, 0o755, 0o777, 0o1777, 0o2775, 0o6755, 0o6666, 0o4710, 0]),
        1 => 0..=0o7777_u16,
    ]
    .boxed()
}

fn special() -> impl Strategy<Value = Kind> {
    select(vec![
        Kind::File,
        Kind::Fifo,
        Kind::Socket,
        Kind::CharDevice,
        Kind::BlockDevice,
        Kind::Directory,
        Kind::Symlink,
    ])
}

fn target() -> BoxedStrategy<Vec<u8>> {
    prop_oneof![
        6 => vec(1..=255_u8, 1..40),
        1 => select(vec![0, 1, 255, 4095, 4096]).prop_map(|length| vec![b't'; length]),
    ]
    .boxed()
}

fn rename_mode() -> BoxedStrategy<RenameMode> {
    prop_oneof![
        5 => Just(RenameMode::Replace),
        1 => Just(RenameMode::NoReplace),
        2 => Just(RenameMode::Exchange),
        1 => Just(RenameMode::Whiteout),
    ]
    .boxed()
}

fn flags() -> BoxedStrategy<OpenFlags> {
    let access = select(vec![(true, true), (true, true), (true, false), (false, true)]);
    let further = (prop::bool::weighted(0.2), prop::bool::weighted(0.15), prop::bool::weighted(0.05));
    (access, further)
        .prop_map(|((read, write), (append, truncate, sync))| OpenFlags {
            read,
            write,
            append: append && write,
            truncate: truncate && write,
            sync,
        })
        .boxed()
}

fn change() -> BoxedStrategy<AttributePick> {
    let nothing = AttributePick {
        mode: None,
        uid: None,
        gid: None,
        size: None,
        atime: TimePick::Omit,
        mtime: TimePick::Omit,
    };
    let all = (option::of(mode()), option::of(who()), option::of(who()), option::of(size()), time(), time());
    prop_oneof![
        3 => mode().prop_map(move |mode| AttributePick { mode: Some(mode), ..nothing }),
        3 => (option::of(who()), option::of(who())).prop_map(move |(uid, gid)| AttributePick { uid, gid, ..nothing }),
        6 => size().prop_map(move |size| AttributePick { size: Some(size), ..nothing }),
        3 => (time(), time()).prop_map(move |(atime, mtime)| AttributePick { atime, mtime, ..nothing }),
        1 => all.prop_map(|(mode, uid, gid, size, atime, mtime)| AttributePick { mode, uid, gid, size, atime, mtime }),
    ]
    .boxed()
}

fn time() -> BoxedStrategy<TimePick> {
    let at = |seconds, nanos| TimePick::At(Timespec { seconds, nanos });
    prop_oneof![
        2 => Just(TimePick::Omit),
        2 => Just(TimePick::Now),
        3 => (-10_000_000_000..10_000_000_000_i64, 0..1_000_000_000_u32).prop_map(move |(s, n)| at(s, n)),
        1 => select(vec![at(0, 0), at(-1, 999_999_999), at(i64::MIN, 0), at(i64::MAX, 999_999_999)]),
    ]
    .boxed()
}

fn size() -> BoxedStrategy<Length> {
    prop_oneof![
        3 => Just(Length::Bytes(0)),
        8 => offset().prop_map(Length::Bytes),
        4 => (-5000..5000_i32).prop_map(Length::Relative),
        1 => select(vec![1 << 40, (1 << 62) - 1, 1 << 62, (1 << 62) + 1, u64::MAX]).prop_map(Length::Bytes),
    ]
    .boxed()
}

/// Where reads and writes begin: near the start, near borders of cells and packs, and now and then far out.
fn offset() -> BoxedStrategy<u64> {
    let border = select(vec![4096_u64, 65_536, 131_072, 1 << 20, 4 << 20]);
    prop_oneof![
        4 => Just(0),
        12 => 0..10_000_u64,
        6 => 0..300_000_u64,
        4 => (border, 0..64_u64).prop_map(|(border, nearby)| border - 32 + nearby),
        1 => 0..(6_u64 << 20),
        1 => select(vec![1 << 40, (1 << 62) - 1, 1 << 62, u64::MAX - 1]),
    ]
    .boxed()
}

fn length() -> BoxedStrategy<u32> {
    prop_oneof![
        1 => Just(0),
        12 => 1..6000_u32,
        4 => 1..140_000_u32,
        1 => select(vec![65_536, 131_072, 1 << 20]),
    ]
    .boxed()
}

/// Mostly the first names of the list.
fn xattr() -> BoxedStrategy<u8> {
    prop_oneof![3 => 0..2_u8, 2 => 0..XATTRS].boxed()
}

fn xattr_length() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 0..100_u32, 1 => 0..5000_u32, 1 => select(vec![65_535, 65_536, 65_537])]
}

fn xattr_mode() -> impl Strategy<Value = XattrMode> {
    prop_oneof![3 => Just(XattrMode::Set), 1 => Just(XattrMode::Create), 1 => Just(XattrMode::Replace)]
}

/// Names in the pool.
pub(super) const NAMES: u8 = 9;
/// Names of attributes.
const XATTRS: u8 = 10;
