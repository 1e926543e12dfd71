//! What a command's SRC or MNT names: a node's directory, the node behind a mount point, or an archive.
//!
//! Invariants:
//! - A mount whose process is gone is told from a directory that was never one.

use std::{
    fs,
    os::unix::{ffi::OsStringExt, fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use murphy_fs::{NODE_XATTR, StoreUrl};

use super::format::parse_url;
use crate::{
    control::Control,
    error::{CliError, at},
    node::is_unlocked,
};

/// What is behind a mount point.
pub(super) enum MountPoint {
    /// A mount that this node serves; the path is without links.
    Served { path: PathBuf, node: PathBuf },
    /// A mount whose process is gone.
    Dead { path: PathBuf },
}

/// The node behind a mount point.
pub(super) fn mount_point(path: &Path) -> Result<MountPoint, CliError> {
    let resolved = match fs::canonicalize(path) {
        Ok(resolved) => resolved,
        Err(error) if is_dead(&error) => {
            return Ok(MountPoint::Dead { path: std::path::absolute(path).map_err(at(path))? });
        }
        Err(error) => return Err(at(path)(error)),
    };
    let not_ours = || {
        CliError::new(format!("{} is not a mount point of murphy", path.display()))
            .hint("murphy status DIR lists the mounts of a node")
    };
    match fs::metadata(&resolved) {
        Ok(metadata) if metadata.ino() != murphy_fs::Ino::ROOT.get() => return Err(not_ours()),
        Ok(_) => {}
        Err(error) if is_dead(&error) => return Ok(MountPoint::Dead { path: resolved }),
        Err(error) => return Err(at(path)(error)),
    }
    let mut value = vec![0; PATH_BYTES_MAX];
    match rustix::fs::getxattr(&resolved, NODE_XATTR, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            let node = PathBuf::from(std::ffi::OsString::from_vec(value));
            Ok(MountPoint::Served { path: resolved, node })
        }
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Err(not_ours()),
        // The kernel may know the attributes of the root long after the process is gone.
        Err(error) if is_dead(&error.into()) => Ok(MountPoint::Dead { path: resolved }),
        Err(error) => Err(at(path)(error.into())),
    }
}

/// The connection to the process behind a mount point. One that is just starting, and a command that has the node open for a moment, get
/// that moment.
pub(super) fn control_of_mount(node: &Path) -> Result<Control, CliError> {
    for _ in 0..CONNECT_ATTEMPTS {
        if let Some(control) = Control::connect(node)? {
            return Ok(control);
        }
        match is_unlocked(node) {
            Ok(false) => std::thread::sleep(CONNECT_PAUSE),
            Ok(true) => {
                return Err(CliError::new(format!("node {} is not running", node.display()))
                    .hint("murphy mount or murphy serve starts it; what it acknowledged is in its log"));
            }
            // Its directory is not there: the process sees other directories.
            Err(_) => break,
        }
    }
    Err(CliError::new(format!("the process that serves node {} does not answer", node.display()))
        .hint("is it in another container? run the command there"))
}

/// The URL of the archive that SRC names, if it is one.
pub(super) fn archive_of(source: &Path) -> Result<Option<StoreUrl>, CliError> {
    match source.to_str() {
        Some(text) if is_url(source) => parse_url("SRC", text).map(Some),
        _ => Ok(None),
    }
}

/// Whether it is the URL of a store, and no path that looks like one.
fn is_url(source: &Path) -> bool {
    source.to_str().is_some_and(|text| text.contains("://")) && !source.exists()
}

/// The directory of the node that SRC names.
pub(super) fn node_of(source: &Path) -> Result<PathBuf, CliError> {
    if is_url(source) {
        return Err(CliError::new(format!(
            "{} is the URL of a store, and a node is wanted here",
            source.display()
        ))
        .hint("murphy status URL and murphy verify URL look at an archive, murphy restore URL DIR makes a node of it"));
    }
    if source.join("murphy.toml").is_file() || !source.is_dir() {
        return std::path::absolute(source).map_err(at(source));
    }
    match mount_point(source) {
        Ok(MountPoint::Served { node, .. }) => Ok(node),
        Ok(MountPoint::Dead { path }) => {
            Err(CliError::new(format!("the process behind the mount at {} is gone", path.display()))
                .hint("name the directory of the node"))
        }
        // Whoever opens it says what is wrong with it as a node.
        Err(_) => std::path::absolute(source).map_err(at(source)),
    }
}

fn is_dead(error: &std::io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(rustix::io::Errno::NOTCONN.raw_os_error())
        || code == Some(rustix::io::Errno::CONNABORTED.raw_os_error())
}

/// Five seconds in all.
const CONNECT_ATTEMPTS: u32 = 100;
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// What Linux allows a path to have.
const PATH_BYTES_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: on a bad night somebody asks how the archive does, and is told of a path that nobody has heard of.
    #[test]
    fn who_gives_the_url_of_an_archive_where_a_node_is_wanted_is_told_what_takes_it() {
        let refused = node_of(Path::new("s3://bucket/home?region=eu-west-1")).unwrap_err();
        assert!(refused.to_string().starts_with("s3://bucket/home?region=eu-west-1 is the URL of a store"));
        assert!(refused.hint.unwrap().contains("murphy verify URL"));
        assert!(node_of(Path::new("nowhere")).is_ok(), "whoever opens it says what is wrong");
        assert!(archive_of(Path::new("s3://bucket/home")).unwrap().is_some());
        assert!(archive_of(Path::new("/srv/home")).unwrap().is_none());
        assert!(archive_of(Path::new("nothing://bucket")).is_err());
    }
}
