//! The threads of a volume: one closes frames and appends ticks, one applies generations.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use murphy_log::Lsn;

use crate::{Index, applier::Applier, sequencer::Sequencer};

/// Running threads; dropping this stops them.
pub(super) struct Workers {
    stop: Arc<AtomicBool>,
    sequencer: Arc<Sequencer>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn start(sequencer: &Arc<Sequencer>, index: &Arc<dyn Index>) -> io::Result<Workers> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut workers =
            Workers { stop: Arc::clone(&stop), sequencer: Arc::clone(sequencer), threads: Vec::new() };
        let (closer, closing) = (Arc::clone(sequencer), Arc::clone(&stop));
        workers.spawn("murphy-frames", move || {
            while !closing.load(Ordering::Relaxed) {
                let idle = closer.step();
                closer.wait_for_work(idle);
            }
        })?;
        let applier = Applier::new(Arc::clone(sequencer), Arc::clone(index));
        workers.spawn("murphy-applier", move || applier.run(&stop))?;
        Ok(workers)
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(thread::Builder::new().name(name.to_owned()).spawn(body)?);
        Ok(())
    }

    /// Returns when the index has everything up to `lsn`, which must be sealed.
    pub(super) fn wait_indexed(&self, lsn: Lsn) -> Result<(), String> {
        while self.sequencer.view().indexed() < lsn && self.sequencer.oldest_sealed().is_some() {
            if let Some(reason) = self.sequencer.ended() {
                return Err(reason);
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so; there is nobody left to tell.
            let _panicked = thread.join();
        }
    }
}

const POLL: Duration = Duration::from_millis(2);
