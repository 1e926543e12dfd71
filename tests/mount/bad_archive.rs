//! An archive in which one object is damaged, missing or of a later version, and tokens that are no tokens: one clear error that names the
//! thing, nothing is changed, and nobody is told that everything is there.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use murphy_tests::{PATIENCE, Ran, Random, Scratch, can_mount, free_address, wait_for_ok, wait_until};
use rustix::process::{Pid, Signal, kill_process};

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

/// An archive with two epochs and a seal between them, a snapshot, slots behind it, packs, and a record in its registry.
fn archive(scratch: &Scratch) {
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    let format = ["format", "a", "--name", "vol", "--blocks", &scratch.url("ba"), "--archive", &archive];
    scratch.run(format).expect_code(0);
    let mount = |node: &str, place: &str| {
        scratch.make_dir(place);
        scratch.run(["mount", node, place, "-d", "--listen", &free_address()]).expect_code(0);
    };
    mount("a", "ma");
    let token = scratch.run(["invite", "a"]).expect_code(0).stdout();
    fs::write(scratch.path("token"), token).unwrap();
    let join = ["join", "b", "--token-file", "token", "--blocks", &scratch.url("bb")];
    scratch.run(join).expect_code(0);
    mount("b", "mb");
    let mut random = Random::new(1);
    for number in 0..20 {
        fs::write(scratch.path(&format!("ma/{number}")), random.bytes(10_000)).unwrap();
    }
    archived(scratch, "ma");
    scratch.run(["archive", "snapshot", "a"]).expect_code(0);
    for name in ["behind the snapshot", "and in a slot of its own"] {
        fs::write(scratch.path("ma").join(name), random.bytes(10_000)).unwrap();
        archived(scratch, "ma");
    }
    let lsn = status(scratch, "a")["durable_lsn"].as_u64();
    wait_until("the mirror", PATIENCE, || status(scratch, "b")["data_lsn"].as_u64() >= lsn);
    let pid = status(scratch, "a")["running"]["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    wait_for_ok("the promotion of the mirror", PATIENCE, || {
        let promoted = scratch.run(["promote", "b", "--confirm", "vol"]);
        if promoted.code() == Some(0) { Ok(()) } else { Err(promoted.stderr()) }
    });
    // That the last slot is gone cannot be known: there are two.
    for name in ["in the second epoch", "and the last one"] {
        fs::write(scratch.path("mb").join(name), random.bytes(10_000)).unwrap();
        archived(scratch, "mb");
    }
    scratch.run(["umount", "mb"]).expect_code(0);
    scratch.wait_for_the_end();
    scratch.run(["restore", &archive, "owner"]).expect_code(0);
}

fn status(scratch: &Scratch, source: &str) -> serde_json::Value {
    scratch.run(["status", source, "--json"]).json()
}

fn archived(scratch: &Scratch, mount: &str) {
    scratch.run(["flush", mount]).expect_code(0);
    let durable = status(scratch, mount)["durable_lsn"].as_u64();
    wait_for_ok("the archive", PATIENCE, || {
        let status = status(scratch, mount);
        (status["archives"][0]["lsn"].as_u64() >= durable).then_some(()).ok_or(status)
    });
}

/// What is done to an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Damage {
    Flip,
    Half,
    Missing,
    LaterVersion,
}

impl Damage {
    /// The object as it is then; `None` if it is gone.
    fn of(self, whole: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = whole.to_vec();
        match self {
            Damage::Flip => bytes[whole.len() / 2] ^= 0x10,
            Damage::Half => bytes.truncate(whole.len() / 2),
            Damage::Missing => return None,
            Damage::LaterVersion if bytes.starts_with(b"{") => {
                let text = String::from_utf8(bytes).unwrap();
                let later = text.replacen("\"version\": 0", "\"version\": 9", 1);
                assert_ne!(later, text, "the document has a version");
                bytes = later.into_bytes();
            }
            // Eight bytes that say what it is, then the version.
            Damage::LaterVersion => bytes[8] = 9,
        }
        Some(bytes)
    }
}

/// Every file of the archive but the proofs, which a verification adds to; the registry, which a restore adds to, at the end.
fn contents(scratch: &Scratch) -> Vec<(PathBuf, Vec<u8>)> {
    let files = scratch.bytes_of("archive").into_iter();
    let files = files.filter(|(path, _)| path.is_file() && !path.to_string_lossy().contains("/proofs/"));
    let is_record = |(path, _): &(PathBuf, Vec<u8>)| path.to_string_lossy().contains("/registry/");
    let (records, mut files): (Vec<_>, Vec<_>) = files.partition(is_record);
    files.extend(records);
    files
}

/// The object of each kind: what to call it, and its name below the archive.
fn objects(scratch: &Scratch) -> Vec<(&'static str, String)> {
    let root = scratch.path("archive");
    let named: Vec<(String, u64)> = contents(scratch)
        .into_iter()
        .map(|(path, bytes)| (path.strip_prefix(&root).unwrap().display().to_string(), bytes.len() as u64))
        .collect();
    let below = |folder: &str| {
        let found = named.iter().filter(|(name, _)| name.starts_with(folder));
        found.cloned().collect::<Vec<_>>()
    };
    let slots = below("log/0000000001/");
    let seal = slots.iter().rposition(|(_, bytes)| *bytes == SEAL_BYTES).expect("a seal");
    let largest =
        |objects: Vec<(String, u64)>| objects.into_iter().max_by_key(|(_, bytes)| *bytes).unwrap().0;
    let manifest = named.iter().find(|(name, _)| name.ends_with("/manifest.json")).unwrap();
    let part = named.iter().find(|(name, _)| name.contains("/part-")).unwrap();
    vec![
        ("descriptor", "murphy.json".to_owned()),
        ("slot below the snapshot", slots[0].0.clone()),
        ("slot behind the snapshot", slots[seal - 2].0.clone()),
        ("seal", slots[seal].0.clone()),
        ("slot of the second epoch", below("log/0000000002/")[0].0.clone()),
        ("registry record", below("registry/").last().unwrap().0.clone()),
        ("snapshot manifest", manifest.0.clone()),
        ("snapshot part", part.0.clone()),
        ("pack", largest(below("packs/"))),
    ]
}

/// The rehearsal of every disaster that an archive can have: what is wrong is found by `verify`, and a restore brings everything or says what
/// stood in its way.
#[test]
fn a_damaged_object_of_any_kind_is_named_and_nothing_is_changed() {
    if !can_mount("a_damaged_object_of_any_kind_is_named_and_nothing_is_changed") {
        return;
    }
    let scratch = scratch();
    archive(&scratch);
    let url = format!("{}?domain=elsewhere", scratch.url("archive"));
    let restore = || {
        for left in ["copy", "blocks of the copy"] {
            let path = scratch.path(left);
            if path.exists() {
                fs::remove_dir_all(path).unwrap();
            }
        }
        scratch.run(["restore", &url, "copy", "--blocks", &scratch.url("blocks of the copy"), "--json"])
    };
    let whole = restore().expect_code(0).json();
    scratch.run(["verify", &url, "--data", "100"]).expect_code(0);
    for (kind, name) in objects(&scratch) {
        for damage in [Damage::Flip, Damage::Half, Damage::Missing, Damage::LaterVersion] {
            if is_exempt(kind, damage) {
                continue;
            }
            let (path, what) = (scratch.path("archive").join(&name), format!("{kind} ({name}): {damage:?}"));
            eprintln!("{what}");
            let bytes = fs::read(&path).unwrap();
            match damage.of(&bytes) {
                Some(damaged) => fs::write(&path, damaged).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let before = contents(&scratch);
            assert_found(&scratch.run(["verify", &url, "--data", "100"]), &name, &what);
            assert_told(&restore(), &whole, &name, &what, &scratch.path("copy"));
            assert!(contents(&scratch).starts_with(&before), "{what}: something in the archive was changed");
            fs::write(&path, bytes).unwrap();
        }
    }
    scratch.run(["verify", &url, "--data", "100"]).expect_code(0);
}

/// The names of objects can be told from the name of a pack alone.
fn names_it(said: &str, name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap();
    said.contains(name) || (name.starts_with("packs/") && said.contains(last))
}

/// What no reader can know: the version of a pack is below its footer, whose digest the log has; that the newest record of a registry is gone
/// looks as if it had never been there; and where there is no descriptor there is no archive.
fn is_exempt(kind: &str, damage: Damage) -> bool {
    matches!(
        (kind, damage),
        ("pack", Damage::LaterVersion)
            | ("registry record", Damage::Missing)
            | ("descriptor", Damage::Missing)
    )
}

/// Findings that name it, or a single error that does; never both.
fn assert_found(verified: &Ran, name: &str, what: &str) {
    let (found, said) = (verified.stdout(), verified.stderr());
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("Error: ")).collect();
    assert_eq!(verified.code(), Some(3), "{what}: {verified}");
    match &errors[..] {
        [] => assert!(found.lines().any(|line| names_it(line, name)), "{what}: {verified}"),
        [error] => assert!(names_it(error, name) && found.is_empty(), "{what}: {verified}"),
        _ => panic!("{what}: more than one error: {verified}"),
    }
}

/// The errors that were said as JSON, one a line.
fn errors(ran: &Ran) -> Vec<serde_json::Value> {
    let said = ran.stderr();
    let documents = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    documents.map(|mut document| document["error"].take()).filter(|error| !error.is_null()).collect()
}

/// Everything is there, or the object is named and the exit code says that something is wrong; by a single error if nothing was done.
fn assert_told(restored: &Ran, whole: &serde_json::Value, name: &str, what: &str, copy: &Path) {
    let errors = errors(restored);
    assert_eq!(errors.len(), usize::from(restored.code() == Some(1)), "{what}: {restored}");
    match restored.code() {
        Some(0) => {
            let restored = restored.json();
            for field in ["lsn", "digest", "inodes", "missing_packs"] {
                assert_eq!(restored[field], whole[field], "{what}: {field}");
            }
        }
        Some(3) => {
            assert!(names_it(&restored.stderr(), name), "{what}: {restored}");
            assert!(restored.json()["lsn"].is_u64(), "{what}: {restored}");
        }
        Some(1) => {
            let [error] = &errors[..] else { panic!("{what}: {restored}") };
            assert!(names_it(error["message"].as_str().unwrap(), name), "{what}: {restored}");
            assert!(restored.stdout().is_empty(), "{what}: {restored}");
            assert!(!copy.exists(), "{what}: half a copy is left");
        }
        code => panic!("{what}: {code:?}: {restored}"),
    }
}

/// A token is copied by hand, cut by a terminal, or of another version: nothing is begun with it.
#[test]
fn a_bad_token_is_named_and_nothing_is_begun() {
    let scratch = scratch();
    scratch.format("a", "ba");
    scratch.run(["serve", "a", "-d", "--listen", &free_address()]).expect_code(0);
    let token = scratch.run(["invite", "a"]).expect_code(0).stdout();
    let token = token.trim();
    let place = token.len() / 2;
    let other = if token.as_bytes()[place] == b'A' { "B" } else { "A" };
    let flipped = format!("{}{other}{}", &token[..place], &token[place + 1..]);
    // Six bits of the version come first: this is version 4.
    let later = token.replacen("murphy-invite.A", "murphy-invite.B", 1);
    assert_ne!(later, token, "a token begins with its version");
    let refuse_all = || {
        for (text, part) in [
            (&flipped[..], "damaged"),
            (&token[..place], "damaged"),
            (&later, "has version 4"),
            ("", "not an invitation token"),
            ("what is this", "not an invitation token"),
            (&format!("murphy-invite.{}", "A".repeat(10_000)), "where the longest token ends"),
        ] {
            fs::write(scratch.path("the token"), text).unwrap();
            let join = ["join", "b", "--token-file", "the token", "--blocks", &scratch.url("bb")];
            let refused = scratch.run(join).expect_error(1, part);
            assert!(refused.stderr().contains("the token:"), "the file is not named: {refused}");
            assert!(!scratch.path("b").exists() && !scratch.path("bb").exists(), "{refused}");
        }
        let join = ["join", "b", "--token-file", "no token", "--blocks", &scratch.url("bb")];
        scratch.run(join).expect_error(1, "no token: No such file");
    };
    let bytes = || (scratch.prints_of("a/log"), scratch.prints_of("ba"));
    // A source writes a sign of life every 20 s, and so between some of these, but not between all.
    let is_unchanged = (0..5).any(|_| {
        let before = bytes();
        refuse_all();
        bytes() == before
    });
    assert!(is_unchanged, "the source has written something whenever it was refused");
    // The invitation itself is as good as it was.
    fs::write(scratch.path("the token"), token).unwrap();
    scratch.run(["join", "b", "--token-file", "the token", "--blocks", &scratch.url("bb")]).expect_code(0);
    let mode = fs::metadata(scratch.path("b")).unwrap().permissions().mode();
    assert_eq!(mode & 0o77, 0, "others may enter the new node");
    scratch.signal_all(Signal::TERM);
}

/// The length of a seal, by which it is told from a slot.
const SEAL_BYTES: u64 = 184;
