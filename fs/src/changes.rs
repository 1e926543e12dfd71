//! Who hears of entries that were decided elsewhere and have just become visible here.
//!
//! Invariants:
//! - An observer is called after the rows of the entries are visible, from the thread that shows them, in LSN order, under no lock.
//! - Before that it is told what is going to change.
//! - Entries that this node decides itself are not told: whoever asked for them knows. Before the first of them observers are told that
//!   nothing is followed any more, and are waited for.

use std::sync::Arc;

use arc_swap::ArcSwap;
use murphy_log::Entry;

/// Hears of entries that a volume has followed.
pub trait ChangeObserver: Send + Sync {
    /// These entries are going to be visible. Must not wait for anything.
    fn changing(&self, _entries: &[Entry]) {}

    /// These entries, in LSN order and at least one, are visible now. Must not wait for anything: the volume does not go on before this
    /// returns.
    fn changed(&self, entries: &[Entry]);

    /// Nothing is followed any more: this node is about to decide. It decides nothing before this returns, so that what was followed can be
    /// finished with first; it may wait for that, but not for ever.
    fn about_to_lead(&self) {}
}

/// Tells an observer until it is dropped.
#[must_use = "the observer hears nothing once this is dropped"]
pub struct Observation {
    observers: Arc<Observers>,
    observer: Arc<dyn ChangeObserver>,
}

impl std::fmt::Debug for Observation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observation").finish_non_exhaustive()
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        let others = |all: &Arc<Vec<Arc<dyn ChangeObserver>>>| -> Vec<_> {
            all.iter().filter(|one| !Arc::ptr_eq(one, &self.observer)).cloned().collect()
        };
        self.observers.all.rcu(others);
    }
}

/// The observers of a volume.
#[derive(Default)]
pub(crate) struct Observers {
    all: ArcSwap<Vec<Arc<dyn ChangeObserver>>>,
}

impl Observers {
    pub(crate) fn add(self: &Arc<Self>, observer: Arc<dyn ChangeObserver>) -> Observation {
        self.all.rcu(|all| {
            let mut more = Vec::clone(all);
            more.push(Arc::clone(&observer));
            more
        });
        Observation { observers: Arc::clone(self), observer }
    }

    pub(crate) fn announce(&self, entries: &[Entry]) {
        self.all.load_full().iter().for_each(|observer| observer.changing(entries));
    }

    pub(crate) fn tell(&self, entries: &[Entry]) {
        if !entries.is_empty() {
            self.all.load_full().iter().for_each(|observer| observer.changed(entries));
        }
    }

    /// Returns when every observer is through with what was followed.
    pub(crate) fn end(&self) {
        self.all.load_full().iter().for_each(|observer| observer.about_to_lead());
    }
}
