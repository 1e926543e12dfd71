//! Programs that are waited for, but not for ever.
//!
//! Invariants:
//! - A program that does not end within the limit is killed, and the test fails with its command and what it has said so far.
//! - What a program prints is read while it runs: it never waits for room in a pipe.

use std::{
    io::Read,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;

use crate::pause;

/// Runs a command to its end and returns what it printed.
///
/// # Panics
/// If it cannot be started, or does not end within [`RUN_MAX`].
#[track_caller]
pub fn output_of(command: &mut Command) -> Output {
    output_within(command, RUN_MAX)
}

/// The same with another limit.
///
/// # Panics
/// If it cannot be started, or does not end within `limit`.
#[track_caller]
pub fn output_within(command: &mut Command, limit: Duration) -> Output {
    let what = format!("{command:?}");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    finish(child.unwrap_or_else(|error| panic!("{what} cannot be started: {error}")), &what, limit)
}

/// Waits for the end of a program that runs, and returns what it printed into its pipes.
///
/// # Panics
/// If it does not end within `limit`. It is killed before.
#[track_caller]
pub fn finish(mut child: Child, what: &str, limit: Duration) -> Output {
    let (done, heard) = channel();
    let stdout = collect(child.stdout.take(), done.clone());
    let stderr = collect(child.stderr.take(), done);
    let said = |said: &Mutex<Vec<u8>>| std::mem::take(&mut *said.lock());
    match ends(&mut child, &heard, limit) {
        Some(status) => Output { status, stdout: said(&stdout), stderr: said(&stderr) },
        None => {
            // One that ends just now needs no signal.
            let _ended = child.kill();
            let (stdout, stderr) = (said(&stdout), said(&stderr));
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            panic!(
                "{what} did not end within {limit:?}\nstdout: {}\nstderr: {}",
                text(&stdout),
                text(&stderr)
            )
        }
    }
}

/// Reads a pipe in a thread of its own, and says by dropping `done` that it has ended.
fn collect(pipe: Option<impl Read + Send + 'static>, done: Sender<()>) -> Arc<Mutex<Vec<u8>>> {
    let said = Arc::new(Mutex::new(Vec::new()));
    let Some(mut pipe) = pipe else { return said };
    let heard = Arc::clone(&said);
    thread::spawn(move || {
        let (mut bytes, _done) = ([0; 4096], done);
        // A pipe that cannot be read any more has ended.
        while let Ok(count @ 1..) = pipe.read(&mut bytes) {
            heard.lock().extend_from_slice(&bytes[..count]);
        }
    });
    said
}

/// Waits until both pipes have ended and then for the program. `None` if that takes too long.
fn ends(child: &mut Child, heard: &Receiver<()>, limit: Duration) -> Option<ExitStatus> {
    // Nobody ever sends: the channel ends with its last sender.
    let closed = matches!(heard.recv_timeout(limit), Err(RecvTimeoutError::Disconnected));
    if !closed {
        return None;
    }
    let mut status = None;
    let polls = limit.as_millis() / POLL.as_millis() + 1;
    for _ in 0..polls {
        match child.try_wait() {
            Ok(None) => pause(POLL),
            Ok(ended) => {
                status = ended;
                break;
            }
            Err(error) => panic!("a program cannot be waited for: {error}"),
        }
    }
    status
}

/// How long a program may run on the slowest machine.
pub const RUN_MAX: Duration = Duration::from_secs(900);
const POLL: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_killed_and_told_with_what_it_has_said() {
        let hangs = || {
            let mut command = Command::new("sh");
            command.args(["-c", "echo begun; exec sleep 1000"]).stdout(Stdio::piped());
            finish(command.spawn().unwrap(), "a program", Duration::from_millis(500))
        };
        let failed = std::panic::catch_unwind(hangs).unwrap_err();
        let said = failed.downcast_ref::<String>().unwrap();
        assert!(said.contains("a program did not end within 500ms") && said.contains("begun"), "{said}");
    }

    #[test]
    fn what_a_program_says_comes_back_whole() {
        let mut command = Command::new("sh");
        let output = output_of(command.args(["-c", "seq 100000; echo wrong >&2; exit 3"]));
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), 100_000);
        assert_eq!(output.stderr, b"wrong\n");
    }
}
