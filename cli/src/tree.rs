//! Files of a volume through the library, where nothing can be mounted: whole files in and out, by path. The demo uses it on machines without
//! FUSE, by the control socket of the process that serves the node.
//!
//! Invariants:
//! - What is asked is a path below the root of the volume; links are not followed.
//! - What was asked to be synced is durable, its directory too, when the answer comes.

use std::{
    fs::{self, File, FileTimes},
    io::{Read, Write},
    path::{Component, Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use murphy_fs::{
    Answer, Attr, Caller, Errno, FileSystem, Ino, Kind, Name, OpenFlags, Opened, RenameMode, SetAttr,
    SetTime, Timespec, Volume,
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::error::{CliError, at};

/// What to do with files of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub(crate) enum TreeRequest {
    /// Makes directories, and those above them.
    MakeDirs {
        /// Which.
        paths: Vec<PathBuf>,
    },
    /// Writes what is in a file of this machine.
    Write {
        /// A file of this machine.
        from: PathBuf,
        /// A file of the volume; it need not be there.
        to: PathBuf,
        /// Behind what is there, or in its place.
        append: bool,
        /// Gives the copy the modification time of the original.
        keep_time: bool,
        /// Whether it is durable when it is done.
        sync: bool,
    },
    /// Moves a name, durably.
    Rename {
        /// From here.
        from: PathBuf,
        /// To here.
        to: PathBuf,
    },
    /// Removes a file, durably.
    Remove {
        /// Which.
        path: PathBuf,
    },
    /// Writes all directories and files into a directory of this machine that is not there yet. A file that cannot be read is left out,
    /// and named in the answer.
    Export {
        /// Where to.
        into: PathBuf,
    },
}

impl TreeRequest {
    /// Does it; returns which files were left out, as paths below the root of the volume.
    pub(crate) fn perform(&self, volume: &Volume, runtime: &Handle) -> Result<Vec<PathBuf>, CliError> {
        let _entered = runtime.enter();
        let caller = Caller {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            pid: 0,
        };
        let tree = Tree { volume, runtime, caller };
        match self {
            TreeRequest::MakeDirs { paths } => paths.iter().try_for_each(|path| tree.make_dirs(path))?,
            TreeRequest::Write { from, to, append, keep_time, sync } => {
                tree.write(from, to, *append, *sync)?;
                if *keep_time {
                    tree.copy_time(from, to)?;
                }
            }
            TreeRequest::Rename { from, to } => {
                let ((old, old_name), (new, new_name)) = (tree.place(from)?, tree.place(to)?);
                let rename = (old, &old_name);
                tree.wait(from, volume.rename(&caller, rename, (new, &new_name), RenameMode::Replace))?;
                tree.wait(to, volume.fsync(new, None))?;
            }
            TreeRequest::Remove { path } => {
                let (parent, name) = tree.place(path)?;
                tree.wait(path, volume.unlink(&caller, parent, &name))?;
                tree.wait(path, volume.fsync(parent, None))?;
            }
            TreeRequest::Export { into } => {
                let mut left_out = Vec::new();
                tree.export((Ino::ROOT, Path::new("")), into, &mut left_out)?;
                return Ok(left_out);
            }
        }
        Ok(Vec::new())
    }
}

/// A volume by paths.
struct Tree<'a> {
    volume: &'a Volume,
    runtime: &'a Handle,
    caller: Caller,
}

impl Tree<'_> {
    fn wait<T>(&self, path: &Path, answer: Answer<T>) -> Result<T, CliError> {
        self.try_wait(answer).map_err(|errno| refused(path, errno))
    }

    fn try_wait<T>(&self, answer: Answer<T>) -> Result<T, Errno> {
        self.runtime.block_on(answer.wait())
    }

    /// The directory of `path`, and its name in there.
    fn place(&self, path: &Path) -> Result<(Ino, Name), CliError> {
        let (Some(parent), Some(last)) = (path.parent(), path.file_name()) else {
            return Err(CliError::new(format!("{} is no path of a file", path.display())));
        };
        let mut directory = Ino::ROOT;
        for part in names(parent)? {
            directory = self.wait(path, self.volume.lookup(&self.caller, directory, &part))?.ino;
        }
        Ok((directory, name(path, last)?))
    }

    fn make_dirs(&self, path: &Path) -> Result<(), CliError> {
        let mut directory = Ino::ROOT;
        for part in names(path)? {
            let made = match self.try_wait(self.volume.mkdir(&self.caller, directory, &part, 0o755)) {
                Err(Errno::EEXIST) => self.try_wait(self.volume.lookup(&self.caller, directory, &part)),
                made => made,
            };
            directory = made.map_err(|errno| refused(path, errno))?.ino;
        }
        Ok(())
    }

    fn write(&self, from: &Path, to: &Path, append: bool, sync: bool) -> Result<(), CliError> {
        let (parent, name) = self.place(to)?;
        let flags = OpenFlags { write: true, append, truncate: !append, ..OpenFlags::default() };
        let (volume, caller) = (self.volume, &self.caller);
        let (ino, opened) = match self.try_wait(volume.lookup(caller, parent, &name)) {
            Ok(attr) => (attr.ino, self.wait(to, volume.open(caller, attr.ino, flags))?),
            Err(Errno::ENOENT) => {
                let (attr, opened) = self.wait(to, volume.create(caller, parent, &name, 0o644, flags))?;
                (attr.ino, opened)
            }
            Err(errno) => return Err(refused(to, errno)),
        };
        let written = self.fill(from, to, (ino, opened)).and_then(|()| {
            self.wait(to, volume.flush(ino, opened.handle))?;
            if sync { self.wait(to, volume.fsync(ino, Some(opened.handle))) } else { Ok(()) }
        });
        volume.release(ino, opened.handle);
        written?;
        if sync { self.wait(to, volume.fsync(parent, None)) } else { Ok(()) }
    }

    fn fill(&self, from: &Path, to: &Path, (ino, opened): (Ino, Opened)) -> Result<(), CliError> {
        let mut file = File::open(from).map_err(at(from))?;
        let mut offset = 0;
        loop {
            let mut bytes = Vec::new();
            Read::by_ref(&mut file).take(CHUNK_BYTES).read_to_end(&mut bytes).map_err(at(from))?;
            if bytes.is_empty() {
                return Ok(());
            }
            let length = bytes.len() as u64;
            let written = self.volume.write(&self.caller, ino, opened.handle, offset, bytes.into());
            self.wait(to, written)?;
            offset += length;
        }
    }

    fn copy_time(&self, from: &Path, to: &Path) -> Result<(), CliError> {
        let modified = fs::metadata(from).and_then(|metadata| metadata.modified()).map_err(at(from))?;
        let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = Timespec { seconds: since.as_secs().cast_signed(), nanos: since.subsec_nanos() };
        let (parent, name) = self.place(to)?;
        let attr = self.wait(to, self.volume.lookup(&self.caller, parent, &name))?;
        let change = SetAttr { mtime: Some(SetTime::At(time)), ..SetAttr::default() };
        self.wait(to, self.volume.setattr(&self.caller, attr.ino, None, change)).map(drop)
    }

    /// Writes what is below a directory of the volume into the same one below `into`; files that cannot be read go to `left_out`.
    fn export(
        &self,
        (directory, below): (Ino, &Path),
        into: &Path,
        left_out: &mut Vec<PathBuf>,
    ) -> Result<(), CliError> {
        fs::create_dir(into.join(below)).map_err(at(into))?;
        let mut cookie = 0;
        loop {
            let entries = self.wait(below, self.volume.readdir_plus(directory, cookie, ENTRIES_AT_ONCE))?;
            let Some(last) = entries.last() else { return Ok(()) };
            cookie = last.entry.cookie;
            for found in &entries {
                let name = std::os::unix::ffi::OsStrExt::from_bytes(found.entry.name.as_bytes());
                let path = below.join::<&std::ffi::OsStr>(name);
                match found.entry.kind {
                    Kind::Directory => self.export((found.entry.ino, &path), into, left_out)?,
                    Kind::File if !self.export_file(&found.attr, &into.join(&path))? => left_out.push(path),
                    _ => {}
                }
            }
        }
    }

    /// Whether the file could be read.
    fn export_file(&self, attr: &Attr, path: &Path) -> Result<bool, CliError> {
        let flags = OpenFlags { read: true, ..OpenFlags::default() };
        let opened = self.wait(path, self.volume.open(&self.caller, attr.ino, flags))?;
        let mut file = File::create_new(path).map_err(at(path))?;
        let (mut offset, mut is_readable) = (0, true);
        while offset < attr.size && is_readable {
            let chunk = u32::try_from(CHUNK_BYTES).unwrap_or(u32::MAX);
            match self.try_wait(self.volume.read(attr.ino, opened.handle, offset, chunk)) {
                Ok(bytes) if bytes.is_empty() => break,
                Ok(bytes) => {
                    file.write_all(&bytes).map_err(at(path))?;
                    offset += bytes.len() as u64;
                }
                Err(errno) => {
                    tracing::warn!(path = %path.display(), ?errno, "a file cannot be read");
                    is_readable = false;
                }
            }
        }
        self.volume.release(attr.ino, opened.handle);
        if !is_readable {
            fs::remove_file(path).map_err(at(path))?;
            return Ok(false);
        }
        let seconds = Duration::from_secs(attr.mtime.seconds.max(0).cast_unsigned());
        let modified = UNIX_EPOCH + seconds + Duration::from_nanos(u64::from(attr.mtime.nanos));
        file.set_times(FileTimes::new().set_modified(modified)).map_err(at(path))?;
        Ok(true)
    }
}

/// The names on the way.
fn names(path: &Path) -> Result<Vec<Name>, CliError> {
    let parts = path.components().filter(|part| !matches!(part, Component::RootDir | Component::CurDir));
    parts.map(|part| name(path, part.as_os_str())).collect()
}

fn name(path: &Path, part: &std::ffi::OsStr) -> Result<Name, CliError> {
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(part).to_vec();
    Name::new(bytes).map_err(|errno| refused(path, errno))
}

fn refused(path: &Path, errno: Errno) -> CliError {
    CliError::new(format!("{}: {errno:?}", path.display()))
}

const CHUNK_BYTES: u64 = 1 << 20;
const ENTRIES_AT_ONCE: usize = 1000;
