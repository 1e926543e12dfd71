//! What is at rest in a node of the real program rots: one bit of any file, or a file of the index that is an earlier copy of itself.
//!
//! Invariants:
//! - The program refuses with one error, finds it, or is not touched by it: whenever fsck says that all is well, digest and bytes are
//!   those of before. `MURPHY_FLIPS` sets how many bits are flipped in each kind of file.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use murphy_tests::{Random, Scratch, can_mount, number_from_env, report};

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// A node with a small tree, an archive, and copies of its index from before.
struct Rot {
    scratch: Scratch,
    digest: String,
    earlier: Vec<Files>,
    seen: BTreeMap<&'static str, usize>,
}

impl Rot {
    fn new(test: &str) -> Option<Rot> {
        if !can_mount(test) {
            return None;
        }
        let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
        scratch.format("node", "blocks");
        scratch.run(["archive", "add", "node", &scratch.url("archive")]).expect_code(0);
        let mut random = Random::new(1);
        let mut earlier = Vec::new();
        for sitting in 0..3 {
            let mount = scratch.mount("node", "mnt");
            fs::create_dir(mount.join(format!("d{sitting}"))).unwrap();
            for number in 0..20 {
                let path = mount.join(format!("d{sitting}/f{number}"));
                let mut file = File::create(path).unwrap();
                file.write_all(&random.bytes(300 * number)).unwrap();
                file.sync_all().unwrap();
            }
            if sitting > 0 {
                fs::rename(
                    mount.join(format!("d{}/f3", sitting - 1)),
                    mount.join(format!("d{sitting}/moved")),
                )
                .unwrap();
            }
            scratch.umount("mnt");
            earlier.push(files(&scratch, "node/index"));
        }
        let mut rot = Rot { scratch, digest: String::new(), earlier, seen: BTreeMap::new() };
        rot.digest = rot.fsck("nothing").expect("an intact node is intact");
        Some(rot)
    }

    /// The digest that fsck gives when it finds nothing wrong.
    fn fsck(&self, what: &str) -> Option<String> {
        let ran = self.scratch.run(["fsck", "node", "--data", "--json"]);
        let code = ran.code();
        assert!(matches!(code, Some(0 | 1 | 3)), "{what}: {ran}");
        assert!(!ran.stderr().contains("panicked"), "{what}: {ran}");
        if code == Some(0) {
            assert_eq!(ran.json()["findings"], 0, "{what}: {ran}");
            return Some(ran.json()["digest"].as_str().unwrap().to_owned());
        }
        let errors = ran.stderr().lines().filter(|line| line.starts_with("{\"error\":")).count();
        assert!(errors == 1 || (code == Some(3) && errors == 0), "{what}: {ran}");
        None
    }

    /// Runs fsck, and says whether it refused or all is as before.
    fn judge(&mut self, what: &str) {
        let became = match self.fsck(what) {
            Some(digest) => {
                assert_eq!(digest, self.digest, "{what}: fsck takes another tree for right");
                "harmless or repaired"
            }
            None => "refused or found",
        };
        *self.seen.entry(became).or_default() += 1;
    }

    fn report(&self, kind: &str) {
        let told: Vec<String> = self.seen.iter().map(|(name, count)| format!("{count} {name}")).collect();
        report(&format!("rot, {kind}: {}, none wrong", told.join(", ")));
    }
}

/// The files below `folder`, without the zeros that are reserved at their ends.
fn files(scratch: &Scratch, folder: &str) -> Files {
    let mut found = scratch.bytes_of(folder);
    found.retain(|path, _| path.is_file());
    found
}

fn put_back(folder: &Path, files: &Files) {
    fs::remove_dir_all(folder).unwrap();
    for (path, bytes) in files {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// How much of a file is in use; segments and journals end with reserved space.
fn used(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

#[test]
fn no_flipped_bit_in_any_kind_of_file_passes_for_another_tree() {
    let Some(mut rot) = Rot::new("rot::no_flipped_bit_in_any_kind_of_file_passes_for_another_tree") else {
        return;
    };
    let flips = number_from_env("MURPHY_FLIPS", 4);
    let mut random = Random::new(2);
    let kinds = [
        ("node/murphy.toml", ""),
        ("node/identity", "key.der"),
        ("node/identity", "cert.der"),
        ("node/archives", ".json"),
        ("node/log", ".seg"),
        ("node/index", "synced"),
        ("node/index/tables", ""),
        ("blocks/packs", ""),
        ("blocks", "blocks.json"),
    ];
    for (folder, ending) in kinds {
        let mut kind = files(&rot.scratch, folder);
        kind.retain(|path, bytes| path.to_string_lossy().ends_with(ending) && used(bytes) > 0);
        assert!(!kind.is_empty(), "no {folder}/*{ending}");
        let kind: Vec<(PathBuf, Vec<u8>)> = kind.into_iter().collect();
        let index = files(&rot.scratch, "node/index");
        for number in 0..flips {
            let (path, bytes) = &kind[random.index(kind.len())];
            let at = random.index(used(bytes));
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (number % 8);
            fs::write(path, flipped).unwrap();
            rot.judge(&format!("{} at byte {at}", path.display()));
            fs::write(path, bytes).unwrap();
            if folder.starts_with("node/index") {
                put_back(&rot.scratch.path("node/index"), &index);
            }
        }
    }
    rot.report("one bit of any file");
}

/// fjall has no disk layer of ours below it: its files are put back, one by one, to what they were before.
#[test]
fn an_index_put_back_file_by_file_is_made_anew_or_right() {
    let Some(mut rot) = Rot::new("rot::an_index_put_back_file_by_file_is_made_anew_or_right") else {
        return;
    };
    let newest = rot.earlier.pop().unwrap();
    let folder = rot.scratch.path("node/index");
    let mut mixes = Vec::new();
    for (age, earlier) in std::mem::take(&mut rot.earlier).iter().enumerate() {
        for path in newest.keys().chain(earlier.keys()) {
            let mut mixed = newest.clone();
            match earlier.get(path) {
                old if old == newest.get(path) => continue,
                Some(old) => mixed.insert(path.clone(), old.clone()),
                None => mixed.remove(path),
            };
            mixes.push((format!("{} of sitting {age}", path.display()), mixed));
        }
        mixes.push((format!("everything of sitting {age}"), earlier.clone()));
    }
    let most = number_from_env("MURPHY_FLIPS", 4) as usize * 6;
    let every = mixes.len().div_ceil(most).max(1);
    let mut tried = 0;
    for (what, mixed) in mixes.iter().step_by(every) {
        put_back(&folder, mixed);
        rot.judge(what);
        tried += 1;
    }
    assert!(tried > 5 && rot.seen.contains_key("harmless or repaired"), "{tried} tried: {:?}", rot.seen);
    rot.report(&format!("files of the index put back ({tried} of {})", mixes.len()));
}

/// The fear: the block store has lost a pack, and a file is EIO although an archive of the very node has every byte of it; or nobody ever hears
/// that the store lacks something, because reads go well.
#[test]
fn packs_that_the_store_has_lost_are_read_from_an_archive_and_fsck_finds_them() {
    if !can_mount("packs_that_the_store_has_lost_are_read_from_an_archive_and_fsck_finds_them") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    scratch.format("node", "blocks");
    let archives = ["rotten", "archive"].map(|name| scratch.url(name));
    for url in &archives {
        scratch.run(["archive", "add", "node", url]).expect_code(0);
    }
    let mount = scratch.mount("node", "mnt");
    let bytes = [1, 2].map(|seed| Random::new(seed).bytes(600_000));
    for (name, bytes) in ["lost", "damaged"].into_iter().zip(&bytes) {
        let mut file = File::create(mount.join(name)).unwrap();
        file.write_all(bytes).unwrap();
        file.sync_all().unwrap();
    }
    scratch.umount("mnt");
    // Of each file the store has nothing any more, or a pack with a flipped bit; so has one of the archives.
    let packs: Vec<_> =
        scratch.bytes_of("blocks/packs").into_iter().filter(|(path, _)| path.is_file()).collect();
    assert!(packs.len() > 1, "{}", packs.len());
    let flip = |path: &Path, bytes: &[u8]| {
        let mut flipped = bytes.to_vec();
        flipped[bytes.len() / 2] ^= 4;
        fs::write(path, flipped).unwrap();
    };
    for (at, (path, pack)) in packs.iter().enumerate() {
        match at % 2 {
            0 => fs::remove_file(path).unwrap(),
            _ => flip(path, pack),
        }
        let below = path.strip_prefix(scratch.path("blocks")).unwrap();
        flip(&scratch.path("rotten").join(below), pack);
    }
    let mount = scratch.mount("node", "mnt");
    for (name, bytes) in ["lost", "damaged"].into_iter().zip(&bytes) {
        assert!(fs::read(mount.join(name)).unwrap() == *bytes, "{name}");
    }
    let status = scratch.run(["status", "node", "--json"]).json();
    assert_eq!(status["packs_from_archives"], packs.len(), "{status}");
    let log = fs::read_to_string(scratch.path("node/murphy.log")).unwrap();
    let (path, _) = &packs[0];
    let name = path.file_name().unwrap().to_str().unwrap();
    let told = log.lines().filter(|line| line.contains(name) && line.contains("is read from an archive"));
    assert!(told.count() == 1, "{log}");
    let found = scratch.run(["fsck", "node", "--data"]).expect_code(3).stdout();
    assert!(found.contains(name) && found.contains(&format!("{} findings", packs.len())), "{found}");
    scratch.umount("mnt");
    // By hand they are put back: an object has the same name everywhere.
    for (path, pack) in &packs {
        fs::write(path, pack).unwrap();
    }
    scratch.run(["fsck", "node", "--data"]).expect_code(0);
}
