//! Waits for answers of a file system from code that is not asynchronous.
//!
//! Invariants:
//! - Nothing is waited for longer than [`ANSWER_SECONDS_MAX`]: a call that hangs is a failure, not a test that never ends.

use std::time::Duration;

use murphy_fs::{Answer, Errno};
use tokio::runtime::{Builder, EnterGuard, Handle, Runtime};

/// A tokio runtime and the right to block on it. To be used from threads that are not workers of a runtime.
#[derive(Debug)]
pub struct Driver {
    handle: Handle,
    /// Kept so that the runtime lives as long as the driver, if it is the driver's own.
    _runtime: Option<Runtime>,
}

impl Driver {
    /// A driver with a runtime of its own.
    ///
    /// # Panics
    /// If the operating system gives no threads.
    pub fn new() -> Driver {
        let runtime = Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .enable_all()
            .build()
            .expect("a test machine has threads to give");
        Driver { handle: runtime.handle().clone(), _runtime: Some(runtime) }
    }

    /// A driver on a runtime that somebody else owns.
    pub fn on(handle: Handle) -> Driver {
        Driver { handle, _runtime: None }
    }

    /// While the guard lives, `tokio::spawn` and timers of this thread belong to the runtime.
    pub fn enter(&self) -> EnterGuard<'_> {
        self.handle.enter()
    }

    /// The runtime.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Waits for an answer.
    ///
    /// # Panics
    /// If it does not come within [`ANSWER_SECONDS_MAX`].
    pub fn wait<T>(&self, answer: Answer<T>) -> Result<T, Errno> {
        match answer {
            Answer::Now(result) => result,
            Answer::Later(future) => self.handle.block_on(async {
                match tokio::time::timeout(Duration::from_secs(ANSWER_SECONDS_MAX), future).await {
                    Ok(result) => result,
                    Err(_) => panic!("no answer within {ANSWER_SECONDS_MAX} s"),
                }
            }),
        }
    }
}

impl Default for Driver {
    fn default() -> Driver {
        Driver::new()
    }
}

/// How long an answer may take, in seconds.
pub const ANSWER_SECONDS_MAX: u64 = 120;

/// Threads of a driver's own runtime.
const WORKERS: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// A judge that awaits nothing would be green over an engine that never answers.
    #[test]
    fn later_answers_are_waited_for_with_the_timers_of_the_runtime() {
        let driver = Driver::new();
        let _runtime = driver.enter();
        let answer = Answer::later(async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Err::<(), Errno>(Errno::EINTR)
        });
        assert_eq!(Driver::on(driver.handle().clone()).wait(answer), Err(Errno::EINTR));
        assert_eq!(driver.wait(Answer::Now(Ok(7))), Ok(7));
    }
}
