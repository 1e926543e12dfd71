//! Waiting for something to become true: the one place of the judges that sleeps.
//!
//! Invariants:
//! - Whoever waits says what for, and gives up with that text: a test never hangs and never passes because it was slow.
//! - A span of time is waited out only where the span itself is what is tested ([`stays`], [`pause`]).

use std::{
    fmt, thread,
    time::{Duration, Instant},
};

/// Tries until it works, often at first.
///
/// # Panics
/// If it does not within `longest`, with the last error.
#[track_caller]
pub fn wait_for_ok<T, E: fmt::Debug>(
    what: &str,
    longest: Duration,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> T {
    let begun = now();
    loop {
        let error = match attempt() {
            Ok(answer) => return answer,
            Err(error) => error,
        };
        let waited = begun.elapsed();
        assert!(waited < longest, "waited {longest:?} for {what}: {error:?}");
        thread::sleep((waited / POLL_SHARE).clamp(POLL_MIN, POLL_MAX));
    }
}

/// Asks until there is an answer.
///
/// # Panics
/// If there is none after `longest`.
#[track_caller]
pub fn wait_for<T>(what: &str, longest: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    wait_for_ok(what, longest, || ask().ok_or("not yet"))
}

/// Waits until `ready` says so.
///
/// # Panics
/// If it has not after `longest`.
#[track_caller]
pub fn wait_until(what: &str, longest: Duration, mut ready: impl FnMut() -> bool) {
    wait_for_ok(what, longest, || if ready() { Ok(()) } else { Err("not yet") });
}

/// The same for those who live on a runtime.
///
/// # Panics
/// If `ready` has not said so after `longest`.
pub async fn until(what: &str, longest: Duration, mut ready: impl FnMut() -> bool) {
    let begun = now();
    while !ready() {
        assert!(begun.elapsed() < longest, "waited {longest:?} for {what}");
        tokio::time::sleep(POLL_TASK).await;
    }
}

/// Looks again and again for as long as `span`: what must not happen does not happen meanwhile.
///
/// # Panics
/// As soon as `holds` is false.
pub async fn stays(what: &str, span: Duration, mut holds: impl FnMut() -> bool) {
    let begun = now();
    loop {
        assert!(holds(), "no longer after {:?}: {what}", begun.elapsed());
        if begun.elapsed() >= span {
            return;
        }
        tokio::time::sleep(POLL_TASK).await;
    }
}

/// Lets time pass, where a writer that rests or a kill that comes late is part of what is tested.
pub fn pause(span: Duration) {
    thread::sleep(span);
}

/// The same for those who live on a runtime.
pub async fn pause_task(span: Duration) {
    tokio::time::sleep(span).await;
}

/// Real time, for patience and for moments of the world outside.
#[expect(clippy::disallowed_methods, reason = "real processes take real time")]
fn now() -> Instant {
    Instant::now()
}

/// How long anything that happens within moments may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// A wait is asked about so often that it ends at most this part of itself late.
const POLL_SHARE: u32 = 16;
const POLL_MIN: Duration = Duration::from_micros(100);
const POLL_MAX: Duration = Duration::from_millis(50);
const POLL_TASK: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    /// Patience that never ends would hang the suite, and one that ends well would hide what did not happen.
    #[test]
    fn waiting_for_what_does_not_come_fails_and_names_it() {
        let waited = std::panic::catch_unwind(|| {
            wait_until("a miracle", Duration::from_millis(20), || false);
        });
        let said = waited.unwrap_err();
        let said = said.downcast_ref::<String>().unwrap();
        assert!(said.contains("a miracle"), "{said}");
        let mut asked = 0;
        let found = wait_for("the third time", PATIENCE, || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(found, 3);
    }
}
