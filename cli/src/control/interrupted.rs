//! What somebody is told who interrupts a command while a node works on it: the node goes on.
//!
//! Invariants:
//! - It is said only while a node was asked for something that changes more than what is shown.

use std::{
    sync::{
        Once,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};

/// As long as it is there, an interruption says that the node goes on.
pub(super) struct Asked(());

impl Asked {
    pub(super) fn begin() -> Asked {
        static LISTENING: Once = Once::new();
        LISTENING.call_once(|| {
            if let Err(error) = thread::Builder::new().name("interrupt".into()).spawn(listen) {
                tracing::warn!(%error, "an interruption will say nothing");
            }
        });
        IS_ASKED.store(true, Ordering::Relaxed);
        Asked(())
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        IS_ASKED.store(false, Ordering::Relaxed);
    }
}

#[expect(clippy::print_stderr, reason = "it is the last word of the command")]
fn listen() {
    let Ok(runtime) = Builder::new_current_thread().enable_io().build() else { return };
    runtime.block_on(async {
        let Ok(mut interrupt) = signal(SignalKind::interrupt()) else { return };
        interrupt.recv().await;
        if IS_SERVING.load(Ordering::Relaxed) {
            return;
        }
        if IS_ASKED.load(Ordering::Relaxed) {
            eprintln!("{GOES_ON}");
        }
        std::process::exit(128 + SignalKind::interrupt().as_raw_value());
    });
}

/// This process serves a node itself: an interruption ends it in order.
pub(crate) fn leave_to_the_server() {
    IS_SERVING.store(true, Ordering::Relaxed);
}

static IS_ASKED: AtomicBool = AtomicBool::new(false);
static IS_SERVING: AtomicBool = AtomicBool::new(false);
const GOES_ON: &str = "Interrupted: the process that serves the node goes on with what it was asked for; murphy status shows what comes of it";
