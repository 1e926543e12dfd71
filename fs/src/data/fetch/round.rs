//! Asking for stored bytes of one pack: one origin after the other, and the next one already while one is slow.
//!
//! Invariants:
//! - Every origin is asked before it is said that none has the bytes; one whose answer was damaged once more, and only then the next one.
//! - Silent stores are asked last.
//! - Who was slow and is outrun by another one counts as silent.

use std::{collections::VecDeque, ops::Range, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::Instant;

use super::origin::{Origin, Origins};
use crate::data::{
    intact::flattened,
    pack::{PackDamage, PackError, PackMeta},
    store::BlockStoreError,
};

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Question {
    /// The cells, for whoever asks.
    pub(super) cells: Range<usize>,
    /// Where their bytes are stored.
    pub(super) stored: Range<u64>,
}

/// Bytes of the right length, not verified.
pub(super) struct Answer {
    pub(super) origin: Origin,
    pub(super) question: Question,
    pub(super) bytes: Bytes,
}

/// What went wrong with the stores so far.
#[derive(Default)]
pub(super) struct Failures {
    pub(super) damage: Option<PackError>,
    pub(super) store: Option<BlockStoreError>,
}

/// The asking for one read.
pub(super) struct Round<'a> {
    origins: &'a Origins,
    meta: PackMeta,
    rest: Box<dyn Iterator<Item = Origin> + Send + 'a>,
    /// To be asked once more, before all others.
    again: VecDeque<Origin>,
    /// The silent ones.
    last: VecDeque<Origin>,
    asked: FuturesUnordered<BoxFuture<'a, (u64, Origin, Question, Given)>>,
    /// The same, and since when.
    waiting: Vec<Waiting>,
    count: u64,
    pub(super) failures: Failures,
}

struct Waiting {
    number: u64,
    /// The label of a store.
    store: Option<String>,
    since: Instant,
}

/// `None` if there is nothing.
type Given = Result<Option<Bytes>, BlockStoreError>;

impl<'a> Round<'a> {
    /// A source may stand for several stores, and is asked for which only when those before it have not answered.
    pub(super) fn new(origins: &'a Origins, meta: &PackMeta) -> Round<'a> {
        let stores = origins.sources.iter().flat_map(|source| flattened([source]));
        let stores = stores.map(|store| Origin::Store { store, is_second: false });
        Round {
            origins,
            meta: *meta,
            rest: Box::new(origins.disk.iter().cloned().map(Origin::Disk).chain(stores)),
            again: VecDeque::new(),
            last: VecDeque::new(),
            asked: FuturesUnordered::new(),
            waiting: Vec::new(),
            count: 0,
            failures: Failures::default(),
        }
    }

    /// The next answer; `None` when nobody is left to ask. Whoever is asked only now is asked `question`.
    pub(super) async fn next(&mut self, question: &Question) -> Option<Answer> {
        let mut is_over = false;
        loop {
            // Nobody counts on who is slow.
            let mut slow_from = self.waiting.iter().map(|waiting| waiting.since + SLOW).max();
            if !is_over && slow_from.is_none_or(|slow_from| slow_from <= Instant::now()) {
                match self.take() {
                    Some(origin) => self.ask(origin, question),
                    None => is_over = true,
                }
                slow_from = Some(Instant::now() + SLOW);
            }
            let answered = self.asked.next();
            let answered = match slow_from {
                Some(slow_from) if !is_over => match tokio::time::timeout_at(slow_from, answered).await {
                    Ok(answered) => answered,
                    Err(_) => continue,
                },
                _ => answered.await,
            };
            // Nobody was asked, because nobody is left.
            let (number, origin, question, given) = answered?;
            self.waiting.retain(|waiting| waiting.number != number);
            if let Some(bytes) = self.judge(&origin, &question, given) {
                return Some(Answer { origin, question, bytes });
            }
        }
    }

    /// The bytes of an answer were damaged.
    pub(super) fn found_damage(&mut self, origin: Origin, stored: &Range<u64>, error: PackError) {
        self.origins.count_damage();
        match origin {
            Origin::Disk(disk) => {
                tracing::warn!(%error, "the disk cache is damaged; discarded");
                // Removing a file is as short as the log line above.
                disk.discard(self.meta.name, stored);
            }
            Origin::Store { store, is_second } => {
                tracing::warn!(store = %store.label(), %error, "a store gave damaged bytes");
                self.failures.damage = Some(error);
                // A flipped bit may have come from the way, not from the store.
                if !is_second {
                    self.again.push_back(Origin::Store { store, is_second: true });
                }
            }
        }
    }

    /// Somebody has given what was wanted: whoever was asked long before is not waited for by the next one who reads.
    pub(super) fn won(&self) {
        let now = Instant::now();
        for waiting in self.waiting.iter().filter(|waiting| now.duration_since(waiting.since) >= SLOW) {
            if let Some(label) = &waiting.store {
                self.origins.silences.fell_silent(label, &"another one was asked later, and has answered");
            }
        }
    }

    fn take(&mut self) -> Option<Origin> {
        if let Some(origin) = self.again.pop_front() {
            return Some(origin);
        }
        for origin in self.rest.by_ref() {
            match &origin {
                Origin::Store { store, .. } if self.origins.silences.is_last(store, self.meta.name) => {
                    self.last.push_back(origin);
                }
                _ => return Some(origin),
            }
        }
        self.last.pop_front()
    }

    fn ask(&mut self, origin: Origin, question: &Question) {
        let (number, origins, meta, question) = (self.count, self.origins, self.meta, question.clone());
        self.count += 1;
        let store = match &origin {
            Origin::Disk(_) => None,
            Origin::Store { store, .. } => Some(store.label().into_owned()),
        };
        self.waiting.push(Waiting { number, store, since: Instant::now() });
        self.asked.push(Box::pin(async move {
            let given = match &origin {
                Origin::Disk(disk) => Ok(origins.get_from_disk(disk, &meta, &question.stored).await),
                Origin::Store { store, .. } => {
                    origins.count_get();
                    match store.get_range(meta.name, question.stored.clone()).await {
                        Err(BlockStoreError::NotFound { .. }) => Ok(None),
                        given => given.map(Some),
                    }
                }
            };
            (number, origin, question, given)
        }));
    }

    /// The bytes, if there are as many as were asked for.
    fn judge(&mut self, origin: &Origin, question: &Question, given: Given) -> Option<Bytes> {
        let Origin::Store { store, .. } = origin else { return given.ok().flatten() };
        let label = store.label();
        let length = question.stored.end - question.stored.start;
        if !matches!(given, Err(BlockStoreError::Unavailable { .. })) {
            self.origins.silences.answered(&label);
        }
        let (expected, found) = match given {
            Ok(Some(bytes)) if bytes.len() as u64 == length => {
                self.origins.count_bytes(length);
                return Some(bytes);
            }
            Ok(None) => return None,
            Ok(Some(bytes)) => (length, bytes.len() as u64),
            Err(BlockStoreError::Damaged { expected, found, .. }) => (expected, found),
            Err(error) => {
                match &error {
                    // The first time is said there.
                    BlockStoreError::Unavailable { .. } => self.origins.silences.fell_silent(&label, &error),
                    _ => tracing::warn!(store = %label, %error, "a pack could not be read"),
                }
                self.failures.store = Some(error);
                return None;
            }
        };
        let error = PackError { pack: self.meta.name, damage: PackDamage::Length { expected, found } };
        self.found_damage(origin.clone(), &question.stored, error);
        None
    }
}

/// After so long without an answer the next origin is asked as well.
const SLOW: Duration = Duration::from_secs(2);
