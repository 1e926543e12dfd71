//! `murphy umount`: the clean end of a mount.
//!
//! Invariants:
//! - Everything is durable before the mount goes.
//! - A process that served only this mount is waited for, within a limit: the next one should not meet it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::mount::UnmountFlags;

use super::source::{MountPoint, control_of_mount, mount_point};
use crate::{
    control::{Control, Request},
    error::{CliError, Code, at},
    node,
    output::Output,
};

/// Make everything durable and unmount
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  murphy umount /home")]
pub(crate) struct UmountArgs {
    /// The mount point
    #[arg(value_name = "MNT")]
    mount_point: PathBuf,
}

pub(crate) fn run(args: &UmountArgs, output: &Output) -> Result<Code, CliError> {
    let (path, node) = match mount_point(&args.mount_point)? {
        MountPoint::Served { path, node } => (path, node),
        MountPoint::Dead { path } => {
            rustix::mount::unmount(&path, UnmountFlags::DETACH).map_err(|error| at(&path)(error.into()))?;
            output.note("The process behind the mount was gone; what it had not made durable is lost");
            output.data(&serde_json::json!({ "unmounted": path }), |_| String::new())?;
            return Ok(Code::Done);
        }
    };
    let done = control_of_mount(&node)?.ask(&Request::Unmount { path }, output, |_| Ok(()))?;
    wait_for_the_end(&node)?;
    output.data(&done, |_| String::new())?;
    Ok(Code::Done)
}

/// A process that has no mount left ends: whoever starts the next one should not meet it.
fn wait_for_the_end(directory: &Path) -> Result<(), CliError> {
    for _ in 0..END_STEPS {
        let is_over = match Control::connect(directory)? {
            Some(control) => !control.is_passing(),
            None => node::is_unlocked(directory)?,
        };
        if is_over {
            return Ok(());
        }
        std::thread::sleep(END_PAUSE);
    }
    Ok(())
}

/// Ten seconds in all.
const END_STEPS: u32 = 200;
const END_PAUSE: Duration = Duration::from_millis(50);
