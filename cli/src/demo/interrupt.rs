//! Ctrl-C and SIGTERM: the demo takes everything away that it has made, and says so.
//!
//! Invariants:
//! - Whatever the demo is doing, it is ended from here: nobody else has to look whether it is to end.
//! - The exit code is that of a program which the signal ended: 128 and its number.

use std::{sync::Arc, thread};

use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{Signal, SignalKind, signal},
};

use super::place::Place;
use crate::{
    error::{CliError, failed},
    output::Output,
};

/// From here on a signal clears `place` and ends this process.
pub(super) fn clear_when_told(place: &Arc<Place>, output: &Output) -> Result<(), CliError> {
    let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let signals = listen(&runtime)?;
    let (place, output) = (Arc::clone(place), *output);
    let wait = move || {
        let (name, number) = runtime.block_on(first_of(signals));
        // Held until this process is gone: who comes to the end of the demo meanwhile, or fails because of this, says nothing any more.
        let (_ending, cleared) = place.end();
        output.note(&format!("Interrupted by {name}: {cleared}."));
        std::process::exit(128 + number);
    };
    thread::Builder::new().name("signals".into()).spawn(wait).map_err(failed)?;
    Ok(())
}

fn listen(runtime: &Runtime) -> Result<[Signal; 2], CliError> {
    let _entered = runtime.enter();
    let [interrupt, terminate] = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
    Ok([interrupt.map_err(failed)?, terminate.map_err(failed)?])
}

async fn first_of([mut interrupt, mut terminate]: [Signal; 2]) -> (&'static str, i32) {
    tokio::select! {
        _ = interrupt.recv() => ("SIGINT", SignalKind::interrupt().as_raw_value()),
        _ = terminate.recv() => ("SIGTERM", SignalKind::terminate().as_raw_value()),
    }
}
