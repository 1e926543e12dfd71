//! What every index must do, run against both; and the reference that they are compared with.
//!
//! Invariants:
//! - The reference is one sorted map for each state: nothing is shared with an implementation.

use std::{collections::BTreeMap, ops::Range, path::Path};

use bytes::Bytes;
use murphy_log::{ChainHash, Digest, Epoch, EpochId, Lsn, Position, State, Usage, VolumeId, VolumeKeys};
use proptest::{collection::vec, prelude::*, strategy::ValueTree, test_runner::TestRunner};
use tempfile::TempDir;

use super::*;
use crate::Table;

/// Rows of one generation: small numbers, so that they meet again.
pub(super) type Generation = BTreeMap<RowKey, Option<Bytes>>;

/// What an index should hold after each of a list of generations.
pub(super) struct Reference {
    pub(super) keys: VolumeKeys,
    /// The rows and the state after each generation; before the first one there is nothing.
    pub(super) states: Vec<(BTreeMap<RowKey, Bytes>, State)>,
    pub(super) generations: Vec<Generation>,
}

impl Reference {
    pub(super) fn new(generations: Vec<Generation>) -> Reference {
        let keys = VolumeKeys::derive(VolumeId::from_bytes([7; 16]));
        let (mut rows, mut states) = (BTreeMap::new(), Vec::new());
        for (index, generation) in generations.iter().enumerate() {
            for (key, value) in generation {
                match value {
                    Some(value) => rows.insert(key.clone(), value.clone()),
                    None => rows.remove(key),
                };
            }
            let mut state = state_at(index as u64 + 2);
            state.digest = digest(&rows, &keys);
            states.push((rows.clone(), state));
        }
        Reference { keys, states, generations }
    }

    /// Ingests the generations from number `from` to before `to`.
    pub(super) fn ingest(&self, index: &dyn Index, range: Range<usize>) {
        for at in range {
            ingest(index, &self.generations[at], &self.states[at].1).unwrap();
        }
    }

    /// Compares the whole of a snapshot with generation number `at`.
    pub(super) fn check(&self, snapshot: &dyn IndexSnapshot, at: usize) {
        let (rows, state) = &self.states[at];
        assert_eq!(snapshot.state(), Some(*state));
        let found: BTreeMap<_, _> = snapshot.scan(everything()).map(Result::unwrap).collect();
        assert!(found == *rows, "generation {at} differs");
        for key in rows.keys() {
            let last = |range: Range<&RowKey>| rows.range(range.start..range.end).next_back();
            for range in [&everything().start..key, key..&everything().end] {
                let expected = last(range.clone()).map(|(key, value)| (key.clone(), value.clone()));
                assert_eq!(snapshot.last(range.start.clone()..range.end.clone()).unwrap(), expected);
            }
        }
        let check = check_digest(snapshot, &self.keys).unwrap();
        assert_eq!(check.digest, state.digest);
        assert_eq!(check.rows.values().sum::<u64>(), rows.len() as u64);
    }

    /// Which generation left this state.
    pub(super) fn generation_of(&self, state: &State) -> usize {
        self.states.iter().position(|(_, at)| at == state).expect("the state is one of the reference")
    }
}

fn digest(rows: &BTreeMap<RowKey, Bytes>, keys: &VolumeKeys) -> Digest {
    let counted = rows.iter().filter(|(key, _)| Table::in_digest(key.table()));
    let sum = |sum: Digest, (key, value): (&RowKey, &Bytes)| {
        sum.plus(keys.row_digest(key.table(), key.key(), value))
    };
    counted.fold(Digest::default(), sum)
}

pub(super) fn ingest(index: &dyn Index, rows: &Generation, state: &State) -> Result<(), IndexError> {
    index.ingest(&mut rows.iter().map(|(key, value)| (key.clone(), value.clone())), state)
}

pub(super) fn key(table: u8, number: u64) -> RowKey {
    RowKey::from_parts(table, &number.to_be_bytes())
}

pub(super) fn state_at(lsn: u64) -> State {
    let epoch = Epoch { number: 1, id: EpochId::from_bytes([1; 16]) };
    let position = Position { epoch, lsn: Lsn::new(lsn), hash: ChainHash::from_bytes([lsn as u8; 32]) };
    State { position, digest: Digest::default(), usage: Usage { inodes: lsn, bytes: 0 } }
}

pub(super) fn everything() -> Range<RowKey> {
    RowKey::from_parts(0, &[])..RowKey::from_parts(u8::MAX, &[])
}

pub(super) fn generations(count: Range<usize>, rows: usize) -> impl Strategy<Value = Vec<Generation>> {
    let key = (1u8..15, 0u64..12, vec(0u8..3, 0..3)).prop_map(|(table, number, tail)| {
        let mut key = number.to_be_bytes().to_vec();
        key.extend(tail);
        RowKey::from_parts(table, &key)
    });
    let value = proptest::option::weighted(0.7, vec(any::<u8>(), 0..40).prop_map(Bytes::from));
    vec(proptest::collection::btree_map(key, value, 0..rows), count)
}

/// Generations from a fixed seed, each with rows in both keyspaces.
pub(super) fn some_generations(count: usize, rows: usize) -> Vec<Generation> {
    let mut runner = TestRunner::deterministic();
    let strategy = generations(count..count + 1, rows);
    let mut made = strategy.new_tree(&mut runner).expect("the strategy rejects nothing").current();
    for (index, generation) in made.iter_mut().enumerate() {
        for table in [1, 3] {
            generation.insert(key(table, 100), Some(Bytes::from(index.to_string())));
        }
    }
    made
}

/// Makes indexes of one kind and opens them again.
trait Kind {
    type Made: Index;
    fn make(&self) -> Self::Made;
    /// A clean stop and a start.
    fn reopen(&self, index: Self::Made) -> Self::Made;
}

struct InMemory;

impl Kind for InMemory {
    type Made = MemoryIndex;
    fn make(&self) -> MemoryIndex {
        MemoryIndex::new()
    }
    fn reopen(&self, index: MemoryIndex) -> MemoryIndex {
        index.reopened()
    }
}

struct OnDisk(TempDir);

impl Kind for OnDisk {
    type Made = FjallIndex;
    fn make(&self) -> FjallIndex {
        FjallIndex::reset(self.0.path()).unwrap();
        open(self.0.path())
    }
    fn reopen(&self, index: FjallIndex) -> FjallIndex {
        drop(index);
        open(self.0.path())
    }
}

pub(super) fn open(dir: &Path) -> FjallIndex {
    FjallIndex::open(dir, FjallOptions::default()).unwrap()
}

#[test]
fn the_index_in_memory_conforms() {
    conforms(&InMemory);
}

#[test]
fn the_index_on_disk_conforms() {
    conforms(&OnDisk(tempfile::tempdir().unwrap()));
}

fn conforms(kind: &impl Kind) {
    a_new_index_holds_nothing(kind);
    a_generation_without_rows_moves_the_state(kind);
    bad_input_is_refused_and_ends_the_index(kind);
    scans_cross_tables_and_stop_at_their_ends(kind);
    what_is_not_synced_comes_again(kind);
    snapshots_do_not_move(kind);
    random_generations(kind);
}

fn a_new_index_holds_nothing(kind: &impl Kind) {
    let mut index = kind.make();
    for _ in 0..2 {
        let snapshot = index.snapshot();
        assert_eq!((snapshot.state(), index.reached()), (None, None));
        assert_eq!(snapshot.get(&key(1, 1)).unwrap(), None);
        assert!(snapshot.scan(everything()).next().is_none());
        drop(snapshot);
        index.sync().unwrap();
        index = kind.reopen(index);
    }
}

fn a_generation_without_rows_moves_the_state(kind: &impl Kind) {
    let index = kind.make();
    for lsn in [1, 2, 2, 9] {
        ingest(&index, &Generation::new(), &state_at(lsn)).unwrap();
        assert_eq!(index.snapshot().state(), Some(state_at(lsn)));
        assert_eq!(index.reached(), Some(state_at(lsn)));
    }
    index.sync().unwrap();
    let index = kind.reopen(index);
    assert_eq!(index.snapshot().state(), Some(state_at(9)));
}

fn bad_input_is_refused_and_ends_the_index(kind: &impl Kind) {
    let value = Some(Bytes::from_static(b"v"));
    let refused = |rows: Vec<RowKey>, lsn| {
        let index = kind.make();
        ingest(&index, &Generation::from([(key(1, 1), value.clone())]), &state_at(5)).unwrap();
        index.sync().unwrap();
        let rows = rows.into_iter().map(|key| (key, value.clone()));
        assert!(index.ingest(&mut rows.into_iter(), &state_at(lsn)).is_err());
        let index = kind.reopen(index);
        assert_eq!(index.snapshot().state(), Some(state_at(5)));
        assert_eq!(index.snapshot().get(&key(1, 1)).unwrap(), value);
    };
    refused(vec![key(1, 3), key(1, 2)], 6);
    refused(vec![key(1, 3), key(1, 3)], 6);
    refused(vec![key(4, 3), key(3, 3)], 6);
    refused(vec![key(0, 3)], 6);
    refused(vec![key(u8::MAX, 3)], 6);
    refused(vec![RowKey::from_parts(6, &[1; 70_000])], 6);
    refused(vec![key(1, 2)], 4);
}

fn scans_cross_tables_and_stop_at_their_ends(kind: &impl Kind) {
    let index = kind.make();
    let all: Vec<_> =
        [1, 2, 3, 4, 13, 200].into_iter().flat_map(|table| [key(table, 1), key(table, 2)]).collect();
    let rows = all.iter().map(|key| (key.clone(), Some(Bytes::from_static(b"v")))).collect();
    ingest(&index, &rows, &state_at(2)).unwrap();
    let snapshot = index.snapshot();
    let mut bounds = all.clone();
    bounds.extend((0..=u8::MAX).map(|table| RowKey::from_parts(table, &[])));
    for start in &bounds {
        for end in &bounds {
            let found: Vec<_> = snapshot.scan(start.clone()..end.clone()).map(|row| row.unwrap().0).collect();
            let expected: Vec<_> = all.iter().filter(|key| *key >= start && *key < end).cloned().collect();
            assert_eq!(found, expected, "{start:?}..{end:?}");
        }
    }
}

fn what_is_not_synced_comes_again(kind: &impl Kind) {
    let reference = Reference::new(some_generations(8, 30));
    let index = kind.make();
    reference.ingest(&index, 0..3);
    index.sync().unwrap();
    reference.ingest(&index, 3..6);
    let index = kind.reopen(index);
    assert_eq!(index.snapshot().state(), Some(reference.states[2].1));
    assert_eq!(index.reached(), Some(reference.states[5].1));
    reference.ingest(&index, 3..8);
    reference.check(&*index.snapshot(), 7);
    assert_eq!(index.reached(), Some(reference.states[7].1));
}

fn snapshots_do_not_move(kind: &impl Kind) {
    let reference = Reference::new(some_generations(40, 40));
    let index = kind.make();
    let mut held = Vec::new();
    for at in 0..40 {
        reference.ingest(&index, at..at + 1);
        held.push((at, index.snapshot(), index.snapshot().scan(everything())));
        if at % 7 == 6 {
            for (at, snapshot, scan) in held.drain(..4) {
                reference.check(&*snapshot, at);
                drop(snapshot);
                let found: BTreeMap<_, _> = scan.map(Result::unwrap).collect();
                assert!(found == reference.states[at].0, "a scan of generation {at} has moved");
            }
        }
    }
}

fn random_generations(kind: &impl Kind) {
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() });
    let strategy = (generations(1..8, 60), any::<prop::sample::Index>());
    let run = |(generations, cut): (Vec<Generation>, prop::sample::Index)| {
        let reference = Reference::new(generations);
        let (cut, last) = (cut.index(reference.states.len()), reference.states.len() - 1);
        let mut index = kind.make();
        reference.ingest(&index, 0..cut + 1);
        index.sync().unwrap();
        index = kind.reopen(index);
        reference.check(&*index.snapshot(), cut);
        reference.ingest(&index, cut + 1..last + 1);
        let snapshot = index.snapshot();
        reference.check(&*snapshot, last);
        for key in reference.generations.iter().flat_map(BTreeMap::keys) {
            assert_eq!(snapshot.get(key).unwrap().as_ref(), reference.states[last].0.get(key), "{key:?}");
        }
        Ok(())
    };
    runner.run(&strategy, run).unwrap();
}
