//! What is mounted where, and whether a directory can become a mount point.
//!
//! Invariants:
//! - Only a dead mount of the same volume is ever detached to make room; anything else in the way is an error that names it.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::mount::{UnmountFlags, unmount};
use thiserror::Error;

/// Why a volume was not mounted.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the fields are in the messages")]
pub enum MountError {
    /// The directory does not exist.
    #[error("mount point {} does not exist", path.display())]
    Missing { path: PathBuf },
    /// Something else than a directory.
    #[error("mount point {} is not a directory", path.display())]
    NotADirectory { path: PathBuf },
    /// A mount would hide what is in it.
    #[error("mount point {} is not empty", path.display())]
    NotEmpty { path: PathBuf },
    /// Another file system is mounted there, and works.
    #[error("{} is a mount point already: {by} is mounted there", path.display())]
    AlreadyMounted { path: PathBuf, by: String },
    /// The process behind a mount of something else is gone; it is not ours to detach.
    #[error("{} holds a dead mount of {by}; detach it first (umount -l)", path.display())]
    DeadMount { path: PathBuf, by: String },
    /// The name cannot stand in the mount table.
    #[error("volume name {name:?} cannot stand in the mount table: letters, digits, '-', '_' and '.' only")]
    Name { name: String },
    /// No FUSE in this kernel or container.
    #[error("cannot open /dev/fuse: {source}")]
    Device { source: io::Error },
    /// Not root, and nobody to help.
    #[error(
        "this user may not mount by itself, and the program fusermount3, which could mount for it, is not installed \
         (package fuse3)"
    )]
    NoFusermount,
    /// Anything else that the system answered.
    #[error("cannot mount at {}: {step}: {source}", path.display())]
    Io { path: PathBuf, step: &'static str, source: io::Error },
}

/// A line of the mount table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct MountLine {
    /// Major and minor number, as in `0:47`.
    pub(super) device: String,
    path: PathBuf,
    /// What is mounted, as in `murphy:0f3a`.
    pub(super) source: String,
}

/// What is mounted at exactly this path, the topmost if several are.
pub(super) fn mounted_at(path: &Path) -> io::Result<Option<MountLine>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(parse(&table).filter(|line| line.path == path).last())
}

/// Checks that `source` can be mounted at `path` and returns the path without links. Detaches dead mounts of the same `source`.
pub(super) fn prepare(path: &Path, source: &str) -> Result<PathBuf, MountError> {
    let failed = |step, source| MountError::Io { path: path.to_owned(), step, source };
    let resolved = resolve(path)?;
    for _ in 0..DEAD_MOUNTS_MAX {
        if !holds_dead_mount(&resolved, source)? {
            break;
        }
        tracing::warn!(path = %resolved.display(), source, "detaching a dead mount of this volume");
        detach(&resolved).map_err(|error| failed("detaching a dead mount", error))?;
    }
    check_empty(resolved)
}

/// Refuses what [`prepare`] would refuse, and changes nothing. What lies below a dead mount of the same `source` is not seen.
pub(super) fn check(path: &Path, source: &str) -> Result<(), MountError> {
    let resolved = resolve(path)?;
    match holds_dead_mount(&resolved, source)? {
        true => Ok(()),
        false => check_empty(resolved).map(drop),
    }
}

/// Detaches every mount at or below `directory`, which has no links in it, the deepest first: dead ones and those that are in use too.
/// Returns how many there were.
pub fn detach_below(directory: &Path) -> io::Result<usize> {
    let table = fs::read("/proc/self/mountinfo")?;
    let mut found: Vec<_> = parse(&table).map(|line| line.path).collect();
    found.retain(|path| path.starts_with(directory));
    found.sort();
    found.iter().rev().try_for_each(|path| detach(path))?;
    Ok(found.len())
}

/// Takes a mount away from its place; what is open on it goes on until it is closed. One that is gone already is no error.
pub(super) fn detach(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(rustix::io::Errno::PERM) => {
            let helper = fusermount().ok_or_else(no_helper)?;
            let output = Command::new(helper).args(["-u", "-z", "--"]).arg(path).output()?;
            match output.status.success() {
                true => Ok(()),
                false => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// Without root nothing is unmounted but by the program that mounts for other users.
pub(super) fn no_helper() -> io::Error {
    io::Error::other("fusermount3 is needed to unmount without root and is not installed")
}

/// Whether the process behind a mount of `source` at `resolved` is gone; refuses any other mount there.
fn holds_dead_mount(resolved: &Path, source: &str) -> Result<bool, MountError> {
    let path = resolved.to_owned();
    let table = match mounted_at(resolved) {
        Ok(table) => table,
        Err(source) => return Err(MountError::Io { path, step: "reading the mount table", source }),
    };
    let Some(line) = table else { return Ok(false) };
    match answers(resolved) {
        Err(error) if is_dead(&error) && line.source == source => Ok(true),
        Err(error) if is_dead(&error) => Err(MountError::DeadMount { path, by: line.source }),
        Ok(()) | Err(_) => Err(MountError::AlreadyMounted { path, by: line.source }),
    }
}

fn check_empty(resolved: PathBuf) -> Result<PathBuf, MountError> {
    let failed = |step, source| MountError::Io { path: resolved.clone(), step, source };
    let metadata = fs::metadata(&resolved).map_err(|error| failed("reading the mount point", error))?;
    if !metadata.is_dir() {
        return Err(MountError::NotADirectory { path: resolved });
    }
    let mut entries = fs::read_dir(&resolved).map_err(|error| failed("listing the mount point", error))?;
    match entries.next() {
        Some(_) => Err(MountError::NotEmpty { path: resolved }),
        None => Ok(resolved),
    }
}

/// Asks the file system that is mounted at `path`. The kernel may know the attributes of its root long after its process is gone; statfs is
/// always a request.
fn answers(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::statfs(path).map(drop)?)
}

/// The path without links. A dead mount cannot be looked at, so that its last part is taken as it is.
fn resolve(path: &Path) -> Result<PathBuf, MountError> {
    let resolved = match (fs::canonicalize(path), path.parent(), path.file_name()) {
        (Err(error), Some(parent), Some(name)) if is_dead(&error) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            fs::canonicalize(parent).map(|parent| parent.join(name))
        }
        (resolved, _, _) => resolved,
    };
    resolved.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => MountError::Missing { path: path.to_owned() },
        io::ErrorKind::NotADirectory => MountError::NotADirectory { path: path.to_owned() },
        _ => MountError::Io { path: path.to_owned(), step: "resolving the mount point", source },
    })
}

/// The process behind a mount is gone.
fn is_dead(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// The lines of `/proc/self/mountinfo`: `36 35 0:47 / /mnt/x rw shared:1 - fuse.murphy murphy:0f3a rw,...`. A line that does not look
/// like that is left out.
fn parse(table: &[u8]) -> impl Iterator<Item = MountLine> + '_ {
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
        let path = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
        let mut after = fields.skip_while(|field| *field != b"-").skip(2);
        let source = String::from_utf8_lossy(&unescape(after.next()?)).into_owned();
        Some(MountLine { device, path, source })
    })
}

/// Undoes the kernel's `\040` for a blank, and likewise for tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let escaped = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
            }
            _ => None,
        };
        plain.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &rest[4..] } else { tail };
    }
    plain
}

/// The program that mounts for users other than root, if it is installed.
pub(super) fn fusermount() -> Option<PathBuf> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    let fixed = FUSERMOUNT_FOLDERS.iter().map(PathBuf::from);
    std::env::split_paths(&search)
        .filter(|folder| !folder.as_os_str().as_bytes().is_empty())
        .chain(fixed)
        .flat_map(|folder| ["fusermount3", "fusermount"].map(|program| folder.join(program)))
        .find(|program| program.is_file())
}

/// Dead mounts of one volume above each other that are detached at most.
const DEAD_MOUNTS_MAX: usize = 16;

/// Where fusermount is looked for besides `PATH`.
const FUSERMOUNT_FOLDERS: [&str; 3] = ["/usr/bin", "/bin", "/sbin"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_table_with_blanks_and_optional_fields_is_read() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/sda rw\n\
            36 22 0:47 / /mnt/a\\040b rw,nosuid shared:5 master:2 - fuse.murphy murphy:7 rw,user_id=0\n\
            garbage\n\n37 36 0:48 / /mnt/x rw - tmpfs\n";
        let lines: Vec<_> = parse(table).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1].path, Path::new("/mnt/a b"));
        assert_eq!((lines[1].device.as_str(), lines[1].source.as_str()), ("0:47", "murphy:7"));
        assert_eq!(unescape(b"a\\134\\"), b"a\\\\");
    }

    #[test]
    fn a_bad_mount_point_is_named_in_the_error() {
        let root = tempfile::tempdir().unwrap();
        let missing = prepare(&root.path().join("none"), "murphy:t").unwrap_err();
        assert!(matches!(&missing, MountError::Missing { .. }), "{missing}");
        assert!(missing.to_string().contains("none"));
        let file = root.path().join("file");
        fs::write(&file, b"x").unwrap();
        assert!(matches!(prepare(&file, "murphy:t"), Err(MountError::NotADirectory { .. })));
        assert!(matches!(prepare(&file.join("below"), "murphy:t"), Err(MountError::NotADirectory { .. })));
        assert!(matches!(prepare(root.path(), "murphy:t"), Err(MountError::NotEmpty { .. })));
        assert!(matches!(check(root.path(), "murphy:t"), Err(MountError::NotEmpty { .. })));
        assert!(matches!(check(&file, "murphy:t"), Err(MountError::NotADirectory { .. })));
        let empty = tempfile::tempdir().unwrap();
        check(empty.path(), "murphy:t").unwrap();
        let proc = prepare(Path::new("/proc"), "murphy:t").unwrap_err();
        assert!(matches!(&proc, MountError::AlreadyMounted { by, .. } if by == "proc"), "{proc}");
    }
}
