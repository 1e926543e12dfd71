//! Which stores have not answered lately: they are asked last until they answer again.
//!
//! Invariants:
//! - No store is left out: who has nobody else to ask asks it.
//! - Whether a silent store answers again is asked by one at a time, in the background; the pauses grow up to a limit.
//! - That a store fell silent, and that it answers again, is said once each.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::data::{
    name::PackName,
    store::{BlockStore, BlockStoreError},
};

/// The silent stores, by label.
#[derive(Debug, Default)]
pub(super) struct Silences(Mutex<BTreeMap<String, Silence>>);

#[derive(Debug)]
struct Silence {
    state: State,
    /// How long it is left alone, or was when it answered.
    pause: Duration,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Silent { since: Instant, ask_from: Instant, is_asked: bool },
    Answers { since: Instant },
}

/// A store that does not answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SilentStore {
    /// Its label.
    pub label: String,
    /// For how long it has not answered.
    pub silent_for: Duration,
}

impl Silences {
    /// The stores that are asked last.
    pub(super) fn stores(&self) -> Vec<SilentStore> {
        let now = Instant::now();
        let known = self.0.lock();
        let silent = known.iter().filter_map(|(label, known)| match known.state {
            State::Silent { since, .. } => {
                Some(SilentStore { label: label.clone(), silent_for: now.saturating_duration_since(since) })
            }
            State::Answers { .. } => None,
        });
        silent.collect()
    }

    /// Whether a store is to be asked after all others. Now and then it is asked for `name` in the background. Must run on a tokio runtime.
    pub(super) fn is_last(self: &Arc<Self>, store: &Arc<dyn BlockStore>, name: PackName) -> bool {
        let label = store.label();
        let mut known = self.0.lock();
        let Some(Silence { state: State::Silent { ask_from, is_asked, .. }, .. }) = known.get_mut(&*label)
        else {
            return false;
        };
        if !*is_asked && *ask_from <= Instant::now() {
            *is_asked = true;
            let (silences, store) = (Arc::clone(self), Arc::clone(store));
            tokio::spawn(async move {
                match store.size(name).await {
                    Err(error @ BlockStoreError::Unavailable { .. }) => {
                        silences.fell_silent(&store.label(), &error);
                    }
                    _ => silences.answered(&store.label()),
                }
            });
        }
        true
    }

    /// A store did not answer, and why, or not before somebody else who was asked later.
    pub(super) fn fell_silent(&self, label: &str, why: &dyn std::fmt::Display) {
        let now = Instant::now();
        let mut all = self.0.lock();
        let (since, pause, is_new) = match all.get(label) {
            // What came of a request that was made before, or beside the one that finds out.
            Some(Silence { state: State::Silent { is_asked: false, .. }, .. }) => return,
            Some(Silence { state: State::Silent { since, .. }, pause }) => (*since, *pause * 2, false),
            Some(Silence { state: State::Answers { since }, pause }) if now.duration_since(*since) < CALM => {
                (now, *pause * 2, true)
            }
            _ => (now, PAUSE_FIRST, true),
        };
        let pause = pause.min(PAUSE_MAX);
        let state = State::Silent { since, ask_from: now + pause, is_asked: false };
        if is_new {
            tracing::warn!(store = label, %why, "a store does not answer; it is asked last until it does");
        }
        if all.len() < STORES_MAX || all.contains_key(label) {
            all.insert(label.to_owned(), Silence { state, pause });
        }
    }

    /// A store has answered, whatever it said.
    pub(super) fn answered(&self, label: &str) {
        let mut all = self.0.lock();
        let Some(known) = all.get_mut(label) else { return };
        if let State::Silent { .. } = known.state {
            known.state = State::Answers { since: Instant::now() };
            tracing::info!(store = label, "a store answers again");
        }
    }
}

/// A silent store is left alone for so long at first,
const PAUSE_FIRST: Duration = Duration::from_secs(5);
/// and for so long at most.
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// One that falls silent again so soon is left alone for longer than before.
const CALM: Duration = Duration::from_secs(600);
/// A node reads from a handful of stores.
const STORES_MAX: usize = 256;
