//! A real tree, whole: copied in, compared, renamed, half deleted, remounted, compared again.
//!
//! `MURPHY_FILES` says how many files it has; the full measure is 50,000.

use std::{
    fs, io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use murphy_tests::{
    Random, Scratch, TreeRules, can_mount, compare_directories, copy_tree, number_from_env, output_of,
};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};

/// The first promise of a file system: what was put in comes out, whatever else happened to it in between.
#[test]
fn a_real_tree_is_kept_through_copy_rename_delete_and_remount() {
    if !can_mount("a_real_tree_is_kept_through_copy_rename_delete_and_remount") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let original = scratch.make_dir("original");
    let sown = sow(&original, number_from_env("MURPHY_FILES", FILES));
    let mount = prepare_volume(&scratch);
    copy_tree(&original.join("."), &mount);
    eprintln!("{} files from real sources, {} in all", sown.real, sown.files);

    let same = output_of(Command::new("diff").args(["-r", "--no-dereference"]).arg(&original).arg(&mount));
    assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
    assert_equal(&original, &mount);

    // The same edits on both sides; one of them is an ordinary local file system.
    for root in [&original, &mount] {
        edit(root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    }
    assert_equal(&original, &mount);
    scratch.run(["fsck", "node", "--data"]).expect_code(0);
    scratch.umount("mnt");
    assert!(fs::read_dir(&mount).unwrap().next().is_none());
    scratch.mount("node", "mnt");
    assert_equal(&original, &mount);
    scratch.umount("mnt");
    let sound = scratch.run(["fsck", "node", "--data", "--json"]).expect_code(0).json();
    assert_eq!(sound["findings"], 0, "{sound}");
    assert!(sound["verified_bytes"].as_u64().unwrap() > 0, "{sound}");
}

fn prepare_volume(scratch: &Scratch) -> PathBuf {
    scratch.format("node", "blocks");
    scratch.mount("node", "mnt")
}

fn assert_equal(a: &Path, b: &Path) {
    let differences = compare_directories(a, b, TreeRules::COPY).unwrap();
    let told: Vec<_> = differences.iter().take(20).map(ToString::to_string).collect();
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), told.join("\n"));
}

struct Sown {
    real: u64,
    files: u64,
}

/// Makes a tree of `wanted` files: real sources as far as half of them, generated ones for the rest; with hard links, symbolic links,
/// attributes, sparse and empty files, long names, and times that only a nanosecond tells apart.
fn sow(root: &Path, wanted: u64) -> Sown {
    let mut random = Random::new(1);
    let mut sown = Sown { real: 0, files: 0 };
    if let Some(sources) = sources() {
        copy_sources(&sources, &root.join("real"), wanted / 2, &mut sown.real).unwrap();
        assert!(sown.real > 0, "no source in {}", sources.display());
    }
    sown.files = sown.real;
    let generated = root.join("generated");
    while sown.files < wanted {
        let directory = generated.join(format!("d{:02}/e{:02}", random.below(40), random.below(25)));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join(format!("f{:06}", sown.files));
        let length = match random.below(200) {
            0 => 300_000 + random.index(5_000_000),
            1..=10 => 0,
            11..=40 => random.index(200_000),
            _ => random.index(6_000),
        };
        fs::write(&path, random.bytes(length)).unwrap();
        decorate(&path, sown.files, &mut random);
        sown.files += 1;
    }
    fs::create_dir_all(generated.join("empty/below")).unwrap();
    fs::write(generated.join("n".repeat(255)), b"the longest name").unwrap();
    fs::write(generated.join(std::ffi::OsStr::from_bytes(b"not \xff text\n")), b"not text").unwrap();
    let sparse = fs::File::create(generated.join("sparse")).unwrap();
    sparse.set_len(96 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 64 << 20).unwrap();
    stamp(root, &mut 0).unwrap();
    sown
}

/// Gives some files what others do not have.
fn decorate(path: &Path, number: u64, random: &mut Random) {
    let beside = |suffix: &str| path.with_file_name(format!("g{number:06}-{suffix}"));
    match number % 50 {
        0 => fs::hard_link(path, beside("hard")).unwrap(),
        1 => std::os::unix::fs::symlink(path.file_name().unwrap(), beside("soft")).unwrap(),
        2 => std::os::unix::fs::symlink("../nowhere/at all", beside("dangling")).unwrap(),
        3 => fs::set_permissions(path, fs::Permissions::from_mode(0o4711)).unwrap(),
        4 => fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap(),
        5 | 6 => {
            let value = random.bytes(1 + random.clone().index(1_000));
            rustix::fs::setxattr(path, "user.murphy.test", &value, XattrFlags::empty()).unwrap();
            rustix::fs::setxattr(path, "user.empty", b"", XattrFlags::empty()).unwrap();
        }
        7 => {
            let owner = Some(rustix::fs::Uid::from_raw(1234));
            // Only root may give files away.
            let _unless_root = rustix::fs::chown(path, owner, None);
        }
        _ => {}
    }
}

/// The sources of the crates that this program was built from.
fn sources() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))?;
    let registry = fs::read_dir(home.join("registry/src")).ok()?;
    registry.flatten().map(|entry| entry.path()).find(|path| path.is_dir())
}

fn copy_sources(from: &Path, to: &Path, wanted: u64, copied: &mut u64) -> io::Result<()> {
    fs::create_dir_all(to)?;
    let mut entries: Vec<_> = fs::read_dir(from)?.collect::<io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if *copied >= wanted {
            return Ok(());
        } else if kind.is_dir() {
            copy_sources(&entry.path(), &target, wanted, copied)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), &target)?;
            *copied += 1;
        }
    }
    Ok(())
}

/// Gives everything below and at `path` a modification time of its own.
fn stamp(path: &Path, number: &mut i64) -> io::Result<()> {
    for below in list(path)? {
        stamp_one(&below, number)?;
        if fs::symlink_metadata(&below)?.is_dir() {
            stamp(&below, number)?;
            stamp_one(&below, number)?;
        }
    }
    stamp_one(path, number)
}

fn stamp_one(path: &Path, number: &mut i64) -> io::Result<()> {
    *number += 1;
    let time = Timespec { tv_sec: 1_500_000_000 + *number, tv_nsec: *number * 7_919 % 1_000_000_000 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Renames directories and every third file, some over others and into other directories, removes about half, and stamps the directories.
fn edit(root: &Path) -> io::Result<()> {
    fs::rename(root.join("generated"), root.join("moved"))?;
    let moved = root.join("moved");
    for directory in list(&moved)?.into_iter().filter(|path| path.is_dir()).step_by(3) {
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::rename(&directory, moved.join(format!("{name}-renamed")))?;
    }
    let files = files_below(&root.join("real"))?.into_iter().chain(files_below(&moved)?);
    let mut last: Option<PathBuf> = None;
    for (number, path) in files.enumerate() {
        match number % 6 {
            0 | 2 | 4 => fs::remove_file(&path)?,
            1 => fs::rename(&path, path.with_file_name(format!("renamed {number}")))?,
            3 => match last.replace(path.clone()) {
                // Into another directory, and over what is there.
                Some(other) if other.exists() => fs::rename(&path, other)?,
                _ => fs::rename(&path, root.join(format!("up {number}")))?,
            },
            _ => {}
        }
    }
    let doomed: Vec<_> = list(&moved)?.into_iter().filter(|path| path.is_dir()).step_by(5).collect();
    doomed.iter().try_for_each(fs::remove_dir_all)?;
    // Which moment a directory was last changed at is each side's own.
    stamp(root, &mut 0)
}

fn files_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if !directory.exists() {
        return Ok(found);
    }
    for path in list(directory)? {
        if fs::symlink_metadata(&path)?.is_dir() {
            found.extend(files_below(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

/// The paths in a directory, in the order of their names.
fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}

/// What an ordinary test run has time for.
const FILES: u64 = 5_000;
