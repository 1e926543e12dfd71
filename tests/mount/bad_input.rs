//! Bad input of every kind: damaged, foreign, missing, full. One clear error that names the thing, and nothing is changed; or, for what is
//! derived, it is made anew and said so.
//!
//! What needs no mount (a used directory or prefix at `format`, `murphy.toml`, usage) is in `suite/cli.rs`, bad mount points in `cli.rs`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use murphy_tests::{PATIENCE, Print, Random, Scratch, can_mount, copy_tree, skip, wait_for_ok};
use rustix::{
    fs::XattrFlags,
    io::Errno,
    mount::{MountFlags, UnmountFlags},
    process::Signal,
};

/// A volume with a tree in it, at rest.
struct Volume {
    scratch: Scratch,
    contents: BTreeMap<PathBuf, Vec<u8>>,
}

impl Volume {
    /// Makes it in node `node`; `None` where nothing can be mounted.
    fn new(test: &str) -> Option<Volume> {
        if !can_mount(test) {
            return None;
        }
        let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
        let contents = fill(&scratch, "node", "blocks", 1);
        Some(Volume { scratch, contents })
    }

    /// The segments of the log, in order.
    fn segments(&self) -> Vec<PathBuf> {
        let mut segments: Vec<PathBuf> = fs::read_dir(self.scratch.path("node/log"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
            .collect();
        segments.sort();
        segments
    }

    /// The packs, the largest last.
    fn packs(&self) -> Vec<PathBuf> {
        let packs = self.scratch.bytes_of("blocks/packs");
        let mut packs: Vec<_> = packs.into_iter().filter(|(path, _)| path.is_file()).collect();
        packs.sort_by_key(|(_, bytes)| bytes.len());
        packs.into_iter().map(|(path, _)| path).collect()
    }

    /// What must not change: configuration, log, store.
    fn ground(&self) -> Vec<BTreeMap<PathBuf, Print>> {
        let mut ground =
            ["node/murphy.toml", "node/log", "blocks"].map(|name| self.scratch.prints_of(name)).to_vec();
        // The lock is made by whoever looks, and empty; the spare file is no part of the log.
        ground[1].retain(|path, _| !path.ends_with("lock") && !path.ends_with("spare.tmp"));
        ground
    }

    /// Every way to open the node ends with one error that has `part` in it, and changes nothing; fsck ends with `fsck`.
    fn assert_refused(&self, part: &str, fsck: i32) {
        let before = self.ground();
        self.scratch.make_dir("mnt");
        for (arguments, code) in [
            (&["mount", "node", "mnt", "-d"][..], 1),
            (&["mount", "node", "mnt"], 1),
            (&["serve", "node"], 1),
            (&["status", "node"], 1),
            (&["fsck", "node"], fsck),
            (&["fsck", "node", "--data"], fsck),
        ] {
            self.scratch.run(arguments).expect_error(code, part);
            self.scratch.wait_for_the_end();
        }
        assert!(self.ground() == before, "something changed after {part:?}");
    }

    /// It can be mounted, and the tree is whole.
    fn assert_whole(&self) {
        let mount = self.scratch.mount("node", "mnt");
        for (path, bytes) in &self.contents {
            assert!(fs::read(mount.join(path)).unwrap() == *bytes, "{}", path.display());
        }
        self.scratch.umount("mnt");
        self.scratch.run(["fsck", "node", "--data"]).expect_code(0);
    }
}

/// Makes a volume, and fills it in three sittings, so that its log has several segments with durable frames in each.
fn fill(scratch: &Scratch, node: &str, blocks: &str, seed: u64) -> BTreeMap<PathBuf, Vec<u8>> {
    scratch.format(node, blocks);
    fill_formatted(scratch, node, seed)
}

fn fill_formatted(scratch: &Scratch, node: &str, seed: u64) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut random, mut contents) = (Random::new(seed), BTreeMap::new());
    for sitting in 0..3 {
        let mount = scratch.mount(node, "mnt");
        fs::create_dir(mount.join(format!("d{sitting}"))).unwrap();
        for number in 0..30 {
            let path = PathBuf::from(format!("d{sitting}/f{number}"));
            let bytes = random.bytes(if number == 7 { 1_500_000 } else { 100 * number });
            let mut file = File::create(mount.join(&path)).unwrap();
            file.write_all(&bytes).unwrap();
            file.sync_all().unwrap();
            contents.insert(path, bytes);
        }
        scratch.umount("mnt");
    }
    contents
}

fn flip(path: &Path, at: usize) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at as u64).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at as u64).unwrap();
}

/// Damages a frame in the first half of what a segment holds. A mark alone is stepped over.
fn flip_in_a_frame(segment: &Path) {
    let bytes = fs::read(segment).unwrap();
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    let mark = bytes[used / 3..].windows(4).position(|window| window == b"MsyX").unwrap();
    flip(segment, used / 3 + mark + 100);
}

/// What was acknowledged and is damaged must be said, and never be cut off as if it had been a torn write.
#[test]
fn a_flipped_bit_in_a_durable_frame_is_refused() {
    let Some(volume) = Volume::new("a_flipped_bit_in_a_durable_frame_is_refused") else { return };
    let segments = volume.segments();
    let [.., before, last] = &segments[..] else { panic!("{segments:?}") };
    for (segment, part) in [(last, 4), (last, 2), (before, 2)] {
        // Behind the frames there are zeros.
        let bytes = fs::read(segment).unwrap();
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        // The mark before a frame is mended without anybody's help.
        let in_mark = |at: &usize| (at - 31..=*at).any(|start| bytes[start..].starts_with(b"MsyX"));
        let at = (end / part..end).find(|at| !in_mark(at)).unwrap();
        flip(segment, at);
        let name = segment.file_stem().unwrap().to_str().unwrap();
        eprintln!("{}: bit flipped at {at} of {end}", segment.display());
        volume.assert_refused("damaged", 3);
        volume.scratch.run(["status", "node"]).expect_error(1, name);
        flip(segment, at);
    }
    volume.assert_whole();
}

/// An older segment is read only when somebody needs it: by then the other copies may be gone. `fsck` is there to find it before.
#[test]
fn fsck_finds_damage_in_an_old_segment() {
    let Some(volume) = Volume::new("fsck_finds_damage_in_an_old_segment") else { return };
    let segments = volume.segments();
    let oldest = &segments[0];
    flip(oldest, 300);
    let damaged = volume.ground();
    let ran = volume.scratch.run(["fsck", "node"]).expect_code(3);
    let said = ran.stdout() + &ran.stderr();
    assert!(
        said.contains("damaged") && said.contains(oldest.file_stem().unwrap().to_str().unwrap()),
        "{ran}"
    );
    assert!(volume.ground() == damaged, "fsck has changed something");
    flip(oldest, 300);
    volume.assert_whole();
}

/// The fear: the index is lost, and before anybody knows that the log can be read, whom it could be mended from is forgotten: the node never starts
/// again, although an archive has everything.
#[test]
fn a_damaged_log_without_its_index_comes_back_from_an_archive() {
    if !can_mount("a_damaged_log_without_its_index_comes_back_from_an_archive") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    scratch.format("node", "blocks");
    scratch.mount("node", "mnt");
    let url = format!("{}?domain=elsewhere", scratch.url("archive"));
    scratch.run(["archive", "add", "node", &url]).expect_code(0);
    scratch.umount("mnt");
    let contents = fill_formatted(&scratch, "node", 1);
    let volume = Volume { scratch, contents };
    let scratch = &volume.scratch;
    scratch.mount("node", "mnt");
    let status = || scratch.run(["status", "node", "--json"]).expect_code(0).json();
    wait_for_ok("the archive", PATIENCE, || {
        let status = status();
        let (archived, durable) = (status["archives"][0]["lsn"].as_u64(), status["durable_lsn"].as_u64());
        (archived >= durable).then_some(()).ok_or(format!("{status}"))
    });
    scratch.umount("mnt");
    let segments = volume.segments();
    let [_, _, older, .., newest] = &segments[..] else { panic!("{segments:?}") };
    for segment in [newest, older] {
        flip_in_a_frame(segment);
        fs::remove_dir_all(scratch.path("node/index")).unwrap();
        volume.assert_whole();
    }
}

/// The fear: the index of a node that was killed is from before its archive was added, and only the index is asked who could mend the log.
#[test]
fn a_damaged_log_whose_index_lags_comes_back_from_an_archive_that_was_added_since() {
    const TEST: &str = "a_damaged_log_whose_index_lags_comes_back_from_an_archive_that_was_added_since";
    if !can_mount(TEST) {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    scratch.format("node", "blocks");
    let mount = scratch.mount("node", "mnt");
    let url = format!("{}?domain=elsewhere", scratch.url("archive"));
    scratch.run(["archive", "add", "node", &url]).expect_code(0);
    for number in 0..40 {
        let file = File::create(mount.join(number.to_string())).unwrap();
        file.sync_all().unwrap();
    }
    let status = || scratch.run(["status", "node", "--json"]).expect_code(0).json();
    wait_for_ok("the archive", PATIENCE, || {
        let status = status();
        let (archived, durable) = (status["archives"][0]["lsn"].as_u64(), status["durable_lsn"].as_u64());
        (archived >= durable).then_some(()).ok_or(format!("{status}"))
    });
    scratch.signal_all(Signal::KILL);
    let segments = fs::read_dir(scratch.path("node/log")).unwrap().map(|entry| entry.unwrap().path());
    let newest = segments.filter(|path| path.extension().is_some_and(|ending| ending == "seg")).max();
    flip_in_a_frame(&newest.unwrap());
    let mount = scratch.mount("node", "mnt");
    assert_eq!(fs::read_dir(&mount).unwrap().count(), 40);
    scratch.umount("mnt");
}

/// The fear: the last copy has a rotten sector in its log, and all its names are lost with that though the index has every row.
#[test]
fn the_tree_of_a_last_copy_whose_log_is_damaged_is_dumped_from_its_index() {
    let Some(volume) = Volume::new("the_tree_of_a_last_copy_whose_log_is_damaged_is_dumped_from_its_index")
    else {
        return;
    };
    let scratch = &volume.scratch;
    // There is no other copy, which is what status ends with 3 for.
    let status = scratch.run(["status", "node", "--json"]).expect_code(3).json();
    let newest = volume.segments().pop().unwrap();
    flip_in_a_frame(&newest);
    volume.assert_refused("murphy dump DIR FILE", 3);
    let before = volume.ground();
    let dumped = scratch.run(["dump", "node", "tree", "--json"]).expect_code(3);
    assert_eq!(dumped.json()["lsn"], status["position"]["lsn"], "{dumped}");
    assert_eq!(dumped.json()["digest"], status["digest"], "{dumped}");
    assert!(
        dumped.stderr().contains("is damaged at lsn") && dumped.stderr().contains("tree of lsn"),
        "{dumped}"
    );
    let piped = scratch.run(["dump", "node", "-"]).expect_code(3);
    assert!(!piped.stdout().is_empty());
    assert!(volume.ground() == before, "a dump has changed something");
    scratch.run(["load", "tree", "copy", "--blocks", &scratch.url("blocks")]).expect_code(0);
    let copy = scratch.mount("copy", "mcopy");
    for (path, bytes) in &volume.contents {
        assert!(fs::read(copy.join(path)).unwrap() == *bytes, "{}", path.display());
    }
    scratch.umount("mcopy");
    fs::remove_dir_all(scratch.path("node/index")).unwrap();
    scratch.run(["dump", "node", "nothing"]).expect_error(1, "is damaged");
    assert!(!scratch.path("nothing").exists());
}

/// Segment headers: damage, a version from the future, an empty file, something else altogether, and one that is missing.
#[test]
fn a_bad_segment_header_is_refused() {
    let Some(volume) = Volume::new("a_bad_segment_header_is_refused") else { return };
    let segments = volume.segments();
    for segment in [&segments[0], &segments[1], segments.last().unwrap()] {
        let whole = fs::read(segment).unwrap();
        let name = segment.file_name().unwrap().to_str().unwrap();
        let mut version = whole.clone();
        version[8] = 9;
        let mut damaged = whole.clone();
        damaged[100] ^= 1;
        let garbage = b"This is not a segment. ".repeat(40);
        for (bytes, part) in [
            (&version[..], "format version 9"),
            (&damaged, name),
            (&garbage, "not a segment"),
            (&whole[..100], name),
            (b"", name),
        ] {
            // What the frames that are there say of it is enough to make it anew: nobody is needed for that.
            if bytes == damaged {
                continue;
            }
            fs::write(segment, bytes).unwrap();
            volume.assert_refused(part, 3);
        }
        fs::write(segment, &whole).unwrap();
    }
    for segment in [&segments[0], &segments[1], segments.last().unwrap()] {
        flip(segment, 100);
        volume.scratch.run(["fsck", "node"]).expect_error(3, segment.to_str().unwrap());
        volume.assert_whole();
    }
}

/// A gap would be met only by who needs those entries, too late; and an end that is gone must never pass for a torn write: the index
/// proves that there was more.
#[test]
fn a_missing_segment_is_refused() {
    let Some(volume) = Volume::new("a_missing_segment_is_refused") else { return };
    let (segments, elsewhere) = (volume.segments(), volume.scratch.path("elsewhere"));
    let [_, middle, .., last] = &segments[..] else { panic!("{segments:?}") };
    fs::rename(middle, &elsewhere).unwrap();
    volume.assert_refused("the segment is missing", 3);
    fs::rename(&elsewhere, middle).unwrap();
    fs::rename(last, &elsewhere).unwrap();
    volume.assert_refused("missing from the log", 3);
    fs::rename(&elsewhere, last).unwrap();
    volume.assert_whole();
}

/// The files of one volume under the configuration of another.
#[test]
fn the_log_of_another_volume_is_refused() {
    let Some(volume) = Volume::new("the_log_of_another_volume_is_refused") else { return };
    fill(&volume.scratch, "other", "other-blocks", 2);
    let (own, elsewhere) = (volume.scratch.path("node/log"), volume.scratch.path("elsewhere"));
    fs::rename(&own, &elsewhere).unwrap();
    fs::rename(volume.scratch.path("other/log"), &own).unwrap();
    volume.assert_refused("a segment of volume", 3);
    fs::rename(&own, volume.scratch.path("other/log")).unwrap();
    fs::create_dir(&own).unwrap();
    volume.assert_refused("no log", 3);
    fs::remove_dir_all(&own).unwrap();
    fs::rename(&elsewhere, &own).unwrap();
    // One foreign segment among its own.
    let foreign = volume.scratch.path("other/log");
    let foreign = fs::read_dir(foreign).unwrap().map(|entry| entry.unwrap().path());
    let foreign = foreign.filter(|path| path.extension().is_some_and(|found| found == "seg")).max().unwrap();
    let place = own.join("00000000000000900000.seg");
    fs::copy(foreign, &place).unwrap();
    volume.assert_refused("00000000000000900000.seg", 3);
    fs::remove_file(place).unwrap();
    // The block store of the other one under the URL of its own.
    let (own, elsewhere) = (volume.scratch.path("blocks"), volume.scratch.path("elsewhere"));
    fs::rename(&own, &elsewhere).unwrap();
    fs::rename(volume.scratch.path("other-blocks"), &own).unwrap();
    volume.assert_refused("holds the packs of volume", 3);
    fs::rename(&own, volume.scratch.path("other-blocks")).unwrap();
    fs::rename(&elsewhere, &own).unwrap();
    volume.assert_whole();
}

/// The index is derived: whatever happens to it costs time, and is said.
#[test]
fn a_bad_index_is_made_anew_and_said_so() {
    let Some(volume) = Volume::new("a_bad_index_is_made_anew_and_said_so") else { return };
    fill(&volume.scratch, "other", "other-blocks", 2);
    let (index, node) = (volume.scratch.path("node/index"), volume.scratch.path("node"));
    let largest = || {
        let files = volume.scratch.bytes_of("node/index/tables");
        // Its journals are larger, and hold nothing that a table lacks.
        let tables = files.into_iter().filter(|(path, _)| path.iter().any(|part| part == "keyspaces"));
        tables.max_by_key(|(_, bytes)| bytes.len()).unwrap().0
    };
    let damages: [(&str, &dyn Fn()); 6] = [
        ("missing", &|| fs::remove_dir_all(&index).unwrap()),
        ("empty", &|| {
            fs::remove_dir_all(&index).unwrap();
            fs::create_dir(&index).unwrap();
        }),
        ("foreign", &|| {
            fs::remove_dir_all(&index).unwrap();
            copy_tree(&volume.scratch.path("other/index"), &index);
        }),
        ("tables truncated", &|| {
            for path in volume.scratch.bytes_of("node/index/tables").into_keys().filter(|path| path.is_file())
            {
                File::options().write(true).open(path).unwrap().set_len(10).unwrap();
            }
        }),
        ("position damaged", &|| flip(&index.join("synced"), 60)),
        ("rows damaged", &|| {
            let path = largest();
            let length = fs::metadata(&path).unwrap().len() as usize;
            (0..length).step_by(200).for_each(|at| flip(&path, at));
        }),
    ];
    for (what, damage) in damages {
        damage();
        let log = node.join("murphy.log");
        let ground = volume.ground();
        fs::write(&log, b"").unwrap();
        eprintln!("index: {what}");
        let mount = volume.scratch.mount("node", "mnt");
        let said = fs::read_to_string(&log).unwrap();
        for (path, bytes) in &volume.contents {
            let found = fs::read(mount.join(path)).unwrap_or_else(|error| panic!("{what}: {error}; {said}"));
            assert!(found == *bytes, "{what}: {}", path.display());
        }
        assert_eq!(volume.ground()[2], ground[2], "{what}: the store");
        volume.scratch.umount("mnt");
        volume.scratch.run(["fsck", "node", "--data"]).expect_code(0);
        if what != "missing" && what != "empty" {
            assert!(said.contains("index"), "{what}: {said:?}");
        }
    }
}

/// A store that loses or changes bytes is found out at the first read, which fails; it never gives other bytes.
#[test]
fn a_store_that_lies_is_an_error_and_never_other_bytes() {
    let Some(volume) = Volume::new("a_store_that_lies_is_an_error_and_never_other_bytes") else { return };
    let packs = volume.packs();
    let [.., other, victim] = &packs[..] else { panic!("{packs:?}") };
    let whole = fs::read(victim).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] ^= 1;
    let mut footer = whole.clone();
    *footer.last_mut().unwrap() ^= 1;
    let lies: [(&str, Option<Vec<u8>>); 6] = [
        ("flipped", Some(flipped)),
        ("footer", Some(footer)),
        ("truncated", Some(whole[..whole.len() / 2].to_vec())),
        ("zeros", Some(vec![0; whole.len()])),
        ("replaced", Some(fs::read(other).unwrap())),
        ("missing", None),
    ];
    for (what, bytes) in lies {
        match &bytes {
            Some(bytes) => fs::write(victim, bytes).unwrap(),
            None => fs::remove_file(victim).unwrap(),
        }
        let before = volume.ground();
        let mount = volume.scratch.mount("node", "mnt");
        let mut failed = 0;
        for (path, expected) in &volume.contents {
            match fs::read(mount.join(path)) {
                Ok(bytes) => assert!(bytes == *expected, "{what}: {} has other bytes", path.display()),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()), "{what}: {error}");
                    failed += 1;
                }
            }
        }
        // A flipped bit may lie in a cell that is read for nobody but the check.
        assert!((1..20).contains(&failed), "{what}: {failed} files cannot be read");
        volume.scratch.umount("mnt");
        let found = volume.scratch.run(["fsck", "node", "--data"]).expect_code(3);
        let name = victim.file_name().unwrap().to_str().unwrap();
        assert!(found.stdout().contains(name), "{what}: {name} is not named: {found}");
        assert_eq!(volume.ground()[2], before[2], "{what}: the store was changed");
    }
    fs::write(victim, whole).unwrap();
    volume.assert_whole();
}

/// Two processes with one log would be two histories.
#[test]
fn a_second_process_is_kept_out_of_a_mounted_node() {
    let Some(volume) = Volume::new("a_second_process_is_kept_out_of_a_mounted_node") else { return };
    volume.scratch.mount("node", "mnt");
    volume.scratch.run(["serve", "node"]).expect_error(1, "served already");
    let again = ["format", "node", "--blocks", &volume.scratch.url("more")];
    volume.scratch.run(again).expect_error(1, "not empty");
    fs::remove_file(volume.scratch.path("node/control.sock")).unwrap();
    volume.scratch.make_dir("second");
    for arguments in
        [&["mount", "node", "second"][..], &["serve", "node"], &["status", "node"], &["fsck", "node"]]
    {
        volume.scratch.run(arguments).expect_error(1, "in use by another process");
    }
    volume.scratch.signal_all(Signal::TERM);
    volume.assert_whole();
}

/// A node on a full disk answers ENOSPC, loses nothing that it acknowledged, and goes on when there is room again.
#[test]
fn a_full_disk_loses_nothing_and_is_left_behind() {
    const TEST: &str = "a_full_disk_loses_nothing_and_is_left_behind";
    if !can_mount(TEST) {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let disk = scratch.make_dir("disk");
    if let Err(error) = mount_small(&disk) {
        return skip(TEST, &format!("a small tmpfs cannot be mounted: {error}"));
    }
    scratch.format("disk/node", "blocks");
    let mount = scratch.mount("disk/node", "mnt");
    let filler = Filler { path: disk.join("filler") };
    filler.fill();
    let mut acknowledged = Vec::new();
    let refused = write_until_refused(&mount, "a", &mut acknowledged);
    eprintln!("{} files acknowledged before {refused}", acknowledged.len());
    assert_eq!(refused.raw_os_error(), Some(Errno::NOSPC.raw_os_error()), "{refused}");
    assert_there(&mount, &acknowledged);
    // Reading, and going on once there is room.
    filler.free();
    write_after_a_while(&mount, "after room was made", &mut acknowledged);

    // A kill on a full disk: the next start may fail, with an error that says why, and not for good.
    filler.fill();
    let refused = write_until_refused(&mount, "b", &mut acknowledged);
    assert_eq!(refused.raw_os_error(), Some(Errno::NOSPC.raw_os_error()), "{refused}");
    scratch.signal_all(Signal::KILL);
    filler.fill();
    let started = scratch.run(["mount", "disk/node", "mnt", "-d"]);
    filler.free();
    if started.code() != Some(0) {
        started.expect_error(1, "No space left");
        scratch.mount("disk/node", "mnt");
    }
    assert_there(&mount, &acknowledged);
    write_after_a_while(&mount, "after the kill", &mut acknowledged);
    scratch.umount("mnt");
    scratch.run(["fsck", "disk/node", "--data"]).expect_code(0);
    scratch.mount("disk/node", "mnt");
    assert_there(&mount, &acknowledged);
    scratch.umount("mnt");
    rustix::mount::unmount(&disk, UnmountFlags::DETACH).unwrap();
}

fn mount_small(path: &Path) -> io::Result<()> {
    let size = std::ffi::CString::new("size=300m").map_err(io::Error::other)?;
    Ok(rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(size.as_c_str()))?)
}

/// A file that takes what is left of a disk.
struct Filler {
    path: PathBuf,
}

impl Filler {
    fn fill(&self) {
        let mut file = File::options().create(true).append(true).open(&self.path).unwrap();
        for size in [1 << 20, 4096] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(&self.path).unwrap();
    }
}

/// Large attributes fill the log: an entry holds the whole value.
fn write_until_refused(mount: &Path, round: &str, acknowledged: &mut Vec<(PathBuf, Vec<u8>)>) -> io::Error {
    for number in 0..10_000 {
        let name = PathBuf::from(format!("{round}{number}"));
        match write_one(mount, &name) {
            Ok(value) => acknowledged.push((name, value)),
            Err(error) => return error,
        }
    }
    panic!("the disk is not full");
}

fn write_one(mount: &Path, name: &Path) -> io::Result<Vec<u8>> {
    let path = mount.join(name);
    let file = File::create(&path)?;
    let value = name.to_string_lossy().repeat(65_000 / name.as_os_str().len()).into_bytes();
    rustix::fs::setxattr(&path, "user.large", &value, XattrFlags::empty())?;
    file.sync_all()?;
    Ok(value)
}

fn write_after_a_while(mount: &Path, name: &str, acknowledged: &mut Vec<(PathBuf, Vec<u8>)>) {
    let value = wait_for_ok("room that was made", PATIENCE, || write_one(mount, Path::new(name)));
    acknowledged.push((PathBuf::from(name), value));
}

fn assert_there(mount: &Path, acknowledged: &[(PathBuf, Vec<u8>)]) {
    let mut buffer = vec![0; 65_536];
    for (name, value) in acknowledged {
        let found = rustix::fs::getxattr(mount.join(name), "user.large", &mut buffer[..]);
        let length = found.unwrap_or_else(|error| panic!("{}: {error}", name.display()));
        assert!(buffer[..length] == value[..], "{}", name.display());
    }
}
