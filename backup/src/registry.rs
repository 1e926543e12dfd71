//! The registry of an archive: dense, numbered records that say what may be gone and who still needs something.
//!
//! ```text
//! registry/0..1   Owner        registry/0..2   Floor        registry/0..3   (the next one: put-if-absent)
//! ```
//!
//! Invariants:
//! - Records are created with put-if-absent and never changed; the next one is found with a get, never with a list.
//! - Every record carries a random nonce, so that a writer knows its own again after an ambiguous put.
//! - The name of a record that was lost is not given to another one: whoever would be next looks some names ahead, marks the lost one, and
//!   goes on behind what is there. A reader looks one name ahead. Only that the last records were lost cannot be seen.
//! - A floor never goes down.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt;
use murphy_log::{LogTime, Lsn, NodeId};
use serde::{Deserialize, Serialize};

use crate::{
    descriptor::Archive,
    document::{self, DOCUMENT_BYTES_MAX, DocumentError, LSN_LIMIT},
    layout,
    store::{Creation, StoreError},
};

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    /// Slots that begin below `first` may be deleted from now on; the slot of epoch `epoch` that begins there stays.
    Floor {
        /// The number of the epoch.
        epoch: u32,
        /// The first LSN that stays.
        first: u64,
    },
    /// Somebody reads from `lsn` on: nothing that a restore from there needs may be deleted.
    Pin {
        /// A random id, hexadecimal.
        id: String,
        /// The oldest position that is needed.
        lsn: u64,
        /// Who, and why, for people.
        holder: String,
    },
    /// The pin is not needed any more.
    Unpin {
        /// Its id.
        id: String,
    },
    /// A branch refers to packs of this store.
    Owner {
        /// The branch, hexadecimal.
        branch: String,
    },
    /// A branch does not refer to packs of this store any more.
    Leave {
        /// The branch, hexadecimal.
        branch: String,
    },
    /// Packs that no state from `lsn` of the branch on refers to may be deleted from now on.
    Horizon {
        /// The branch, hexadecimal.
        branch: String,
        /// The oldest LSN whose packs stay.
        lsn: u64,
    },
    /// A snapshot is complete: what lists would show late.
    Snapshot {
        /// The number of its epoch.
        epoch: u32,
        /// Its position.
        lsn: u64,
    },
    /// People have given up what this slot holds: nothing leads to it, and who goes on passes it over.
    Abandoned {
        /// The number of its epoch.
        epoch: u32,
        /// Its first LSN.
        first: u64,
        /// Its turn.
        turn: u32,
    },
    /// The record that had this number was lost, and nobody knows what it said.
    Lost {},
}

/// A record as it is stored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredRecord {
    /// Its number, from 1.
    pub number: u64,
    /// The node that wrote it, hexadecimal.
    pub node: String,
    /// Drawn by the writer, hexadecimal.
    pub nonce: String,
    /// The writer's wall clock, in nanoseconds since 1970.
    pub time: u64,
    /// What it says.
    pub record: Record,
}

impl StoredRecord {
    /// Reads a record.
    pub fn parse(bytes: &[u8]) -> Result<StoredRecord, DocumentError> {
        let stored: StoredRecord = document::decode(REGISTRY_KIND, bytes)?;
        let lsn = match &stored.record {
            Record::Floor { first: lsn, .. }
            | Record::Abandoned { first: lsn, .. }
            | Record::Pin { lsn, .. }
            | Record::Horizon { lsn, .. }
            | Record::Snapshot { lsn, .. } => *lsn,
            Record::Unpin { .. } | Record::Owner { .. } | Record::Leave { .. } | Record::Lost {} => 0,
        };
        if lsn > LSN_LIMIT { Err(DocumentError::Field("lsn")) } else { Ok(stored) }
    }
}

/// Somebody reads.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Pin {
    /// The oldest position that is needed.
    pub lsn: u64,
    /// Who, and why, for people.
    pub holder: String,
    /// Since when, by the holder's wall clock, in nanoseconds since 1970.
    pub since: u64,
}

/// What the records up to some number come to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RegistryView {
    /// Slots that begin below this LSN may be gone; the number is that of the epoch of the slot there.
    pub floor: Option<(u32, Lsn)>,
    /// Pins that were not taken back, by id.
    pub pins: BTreeMap<String, Pin>,
    /// Branches that refer to packs here.
    pub owners: BTreeSet<String>,
    /// The horizon of each branch that has one.
    pub horizons: BTreeMap<String, Lsn>,
    /// Complete snapshots, by LSN, with the number of the epoch.
    pub snapshots: BTreeMap<Lsn, u32>,
    /// Slots that were given up: number of the epoch, first LSN, turn.
    pub abandoned: BTreeSet<(u32, Lsn, u32)>,
    /// Records that were lost: a floor, a pin, an owner may be missing above. Nothing may be deleted while there are any. The value is the
    /// number of one behind it; 0 for one that was marked.
    pub lost: BTreeMap<u64, u64>,
    /// How many records there are, those that were lost included.
    pub records: u64,
}

impl RegistryView {
    /// Whether the slot that begins with `first` may have been deleted.
    pub fn is_below_floor(&self, first: Lsn) -> bool {
        self.floor.is_some_and(|(_, floor)| first < floor)
    }

    fn add(&mut self, record: &Record, time: u64) {
        match record {
            Record::Floor { epoch, first } => {
                let floor = (*epoch, Lsn::new(*first));
                let lowest = self.floor.is_none_or(|(_, now)| now < floor.1);
                self.floor = if lowest { Some(floor) } else { self.floor };
            }
            Record::Pin { id, lsn, holder } => {
                self.pins.insert(id.clone(), Pin { lsn: *lsn, holder: holder.clone(), since: time });
            }
            Record::Unpin { id } => {
                self.pins.remove(id);
            }
            Record::Owner { branch } => {
                self.owners.insert(branch.clone());
            }
            Record::Leave { branch } => {
                self.owners.remove(branch);
            }
            Record::Horizon { branch, lsn } => {
                let horizon = self.horizons.entry(branch.clone()).or_default();
                *horizon = (*horizon).max(Lsn::new(*lsn));
            }
            Record::Snapshot { epoch, lsn } => {
                self.snapshots.insert(Lsn::new(*lsn), *epoch);
            }
            Record::Abandoned { epoch, first, turn } => {
                self.abandoned.insert((*epoch, Lsn::new(*first), *turn));
            }
            Record::Lost {} => {
                self.lost.insert(self.records + 1, 0);
            }
        }
        self.records += 1;
    }

    fn pass_over(&mut self, behind: u64) {
        self.records += 1;
        self.lost.insert(self.records, behind);
    }
}

/// Reads the registry of an archive, and appends to it.
#[derive(Debug)]
pub struct Registry {
    archive: Archive,
    view: RegistryView,
    /// Whether it was seen that nothing lies behind the end.
    knows_end: bool,
}

impl Registry {
    /// A reader that has read nothing yet.
    pub fn new(archive: Archive) -> Registry {
        Registry { archive, view: RegistryView::default(), knows_end: false }
    }

    /// What the records read so far come to.
    pub fn view(&self) -> &RegistryView {
        &self.view
    }

    /// Reads on to the end; what was written before the call is then in the view. One get if nothing is new; the first time another one, for
    /// what may lie behind a record that was lost.
    pub async fn refresh(&mut self) -> Result<&RegistryView, RegistryError> {
        self.read_on(READ_AHEAD).await
    }

    async fn read_on(&mut self, ahead: u64) -> Result<&RegistryView, RegistryError> {
        loop {
            let number = self.view.records + 1;
            match self.read(number).await? {
                Some(stored) => self.view.add(&stored.record, stored.time),
                None if self.knows_end => return Ok(&self.view),
                None => match self.behind(number, ahead).await? {
                    None => {
                        self.knows_end = true;
                        return Ok(&self.view);
                    }
                    // It may have been written since it was asked for: before the one behind it, then.
                    Some(behind) => match self.read(number).await? {
                        Some(stored) => self.view.add(&stored.record, stored.time),
                        None => self.view.pass_over(behind),
                    },
                },
            }
        }
    }

    async fn read(&self, number: u64) -> Result<Option<StoredRecord>, RegistryError> {
        match self.archive.store().get(&layout::registry(number), DOCUMENT_BYTES_MAX).await {
            Ok(bytes) => self.decode(number, &bytes).map(Some),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The first record that is there behind `number`, at most so many names ahead.
    async fn behind(&self, number: u64, ahead: u64) -> Result<Option<u64>, StoreError> {
        let looks = (number + 1..=number + ahead).map(|ahead| async move {
            let size = self.archive.store().size(&layout::registry(ahead)).await?;
            Ok::<_, StoreError>(size.map(|_| ahead))
        });
        Ok(futures::future::try_join_all(looks).await?.into_iter().flatten().next())
    }

    /// The number of a record that is missing and that of one behind it that is there. A list is only asked what else there is.
    pub async fn hole(&mut self) -> Result<Option<(u64, u64)>, RegistryError> {
        let archive = self.archive.clone();
        let mut listed = archive.store().list(layout::REGISTRY_FOLDER);
        let mut highest = 0;
        while let Some(object) = listed.next().await {
            highest = highest.max(layout::parse_registry(&object?.name).unwrap_or_default());
        }
        if highest <= self.view.records {
            return Ok(None);
        }
        // Somebody may have written meanwhile, without a hole.
        let read = self.refresh().await?.records;
        Ok((highest > read).then_some((read + 1, highest)))
    }

    /// Appends a record, after whatever others append meanwhile, and returns its number.
    pub async fn append(
        &mut self,
        node: NodeId,
        time: LogTime,
        record: Record,
    ) -> Result<u64, RegistryError> {
        let nonce = format!("{:016x}", getrandom::u64().map_err(RegistryError::Random)?);
        let time = time.as_nanos();
        let node = node.to_string();
        for _ in 0..APPEND_ATTEMPTS {
            // The name after the end must not be that of a record that was lost.
            self.knows_end = false;
            self.read_on(WRITE_AHEAD).await?;
            let unmarked = self.view.lost.iter().filter(|(_, behind)| **behind > 0);
            let unmarked: Vec<u64> = unmarked.map(|(number, _)| *number).collect();
            let stored = |number: u64, record: &Record| StoredRecord {
                number,
                node: node.clone(),
                nonce: nonce.clone(),
                time,
                record: record.clone(),
            };
            for number in &unmarked {
                self.create(&stored(*number, &Record::Lost {})).await?;
            }
            if !unmarked.is_empty() {
                // One that has come back counts.
                self.view = RegistryView::default();
                continue;
            }
            let number = self.view.records + 1;
            if self.create(&stored(number, &record)).await? {
                self.view.add(&record, time);
                return Ok(number);
            }
        }
        Err(RegistryError::Contended { url: self.archive.url().to_owned() })
    }

    /// Whether the record has its name now; otherwise another one has it.
    async fn create(&self, stored: &StoredRecord) -> Result<bool, RegistryError> {
        let name = layout::registry(stored.number);
        let bytes = document::encode(REGISTRY_KIND, stored).map_err(|error| RegistryError::Record {
            object: self.archive.store().object(&name),
            reason: DocumentError::Syntax(error.to_string()),
        })?;
        Ok(!matches!(self.archive.store().create(&name, bytes).await?, Creation::Other(_)))
    }

    /// Keeps everything that a restore from `lsn` on needs, until the pin is taken back; returns its id. To be done before anything is
    /// read. `holder` says who, and why, for people.
    pub async fn pin(
        &mut self,
        node: NodeId,
        time: LogTime,
        lsn: Lsn,
        holder: &str,
    ) -> Result<String, RegistryError> {
        let id = format!("{:016x}", getrandom::u64().map_err(RegistryError::Random)?);
        let record = Record::Pin { id: id.clone(), lsn: lsn.get(), holder: holder.to_owned() };
        self.append(node, time, record).await?;
        Ok(id)
    }

    /// Takes a pin back.
    pub async fn unpin(&mut self, node: NodeId, time: LogTime, id: &str) -> Result<(), RegistryError> {
        self.append(node, time, Record::Unpin { id: id.to_owned() }).await.map(|_| ())
    }

    fn decode(&self, number: u64, bytes: &[u8]) -> Result<StoredRecord, RegistryError> {
        let decoded = StoredRecord::parse(bytes).and_then(|stored| {
            if stored.number == number { Ok(stored) } else { Err(DocumentError::Field("number")) }
        });
        let object = || self.archive.store().object(&layout::registry(number));
        decoded.map_err(|reason| RegistryError::Record { object: object(), reason })
    }
}

/// Why the registry cannot be read or appended to.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A record is damaged, or of a later version: what follows is not known.
    #[error("{object} cannot be used: {reason}")]
    Record {
        /// The object.
        object: String,
        /// Why.
        reason: DocumentError,
    },
    /// Others appended faster.
    #[error("the registry of {url} is written by too many at once")]
    Contended {
        /// The archive.
        url: String,
    },
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No randomness.
    #[error("the operating system gives no random bytes: {0}")]
    Random(getrandom::Error),
}

const REGISTRY_KIND: &str = "registry";
const APPEND_ATTEMPTS: usize = 100;
/// So many names behind a free one are looked at, for one that is taken: by those who only read, and by those who would take the free one.
const READ_AHEAD: u64 = 1;
const WRITE_AHEAD: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fault, FaultyStore, archive};

    fn owner(number: u64) -> Record {
        Record::Owner { branch: number.to_string() }
    }

    #[tokio::test]
    async fn records_of_two_writers_are_dense_and_seen_by_both() {
        let store = FaultyStore::new();
        let archive = archive(&store).await;
        let (mut one, mut two) = (Registry::new(archive.clone()), Registry::new(archive));
        let (node, time) = (NodeId::default(), LogTime::default());
        assert_eq!(one.append(node, time, owner(1)).await.unwrap(), 1);
        assert_eq!(two.append(node, time, owner(2)).await.unwrap(), 2);
        assert_eq!(one.append(node, time, Record::Floor { epoch: 1, first: 40 }).await.unwrap(), 3);
        assert_eq!(two.append(node, time, Record::Floor { epoch: 1, first: 20 }).await.unwrap(), 4);
        one.refresh().await.unwrap();
        assert_eq!(one.view(), two.view());
        assert_eq!(one.view().floor, Some((1, Lsn::new(40))), "a floor never goes down");
        assert!(one.view().is_below_floor(Lsn::new(39)) && !one.view().is_below_floor(Lsn::new(40)));
    }

    /// The store answers a put that happened with an error: the record must not be written twice.
    #[tokio::test]
    async fn an_ambiguous_append_is_not_repeated() {
        let store = FaultyStore::new();
        let mut registry = Registry::new(archive(&store).await);
        store.fail("registry/", Fault::PutAnswersError, 1);
        assert_eq!(registry.append(NodeId::default(), LogTime::default(), owner(1)).await.unwrap(), 1);
        store.fail("registry/", Fault::PutConflict, 2);
        assert_eq!(registry.append(NodeId::default(), LogTime::default(), owner(2)).await.unwrap(), 2);
        assert_eq!(registry.view().owners.len(), 2);
        let records = store.names().await.iter().filter(|name| name.starts_with("registry/")).count();
        assert_eq!(records, 2);
    }

    #[tokio::test]
    async fn a_pin_is_seen_by_others_until_it_is_taken_back() {
        let store = FaultyStore::new();
        let archive = archive(&store).await;
        let (mut reader, mut other) = (Registry::new(archive.clone()), Registry::new(archive));
        let (node, time) = (NodeId::default(), LogTime::default());
        let id = reader.pin(node, time, Lsn::new(7), "restore to node b").await.unwrap();
        let pin = Pin { lsn: 7, holder: "restore to node b".to_owned(), since: 0 };
        assert_eq!(other.refresh().await.unwrap().pins.get(&id), Some(&pin));
        reader.unpin(node, time, &id).await.unwrap();
        assert!(other.refresh().await.unwrap().pins.is_empty());
    }

    #[tokio::test]
    async fn a_damaged_record_is_named_and_not_passed_over() {
        let store = FaultyStore::new();
        let archive = archive(&store).await;
        let mut registry = Registry::new(archive.clone());
        for number in 1..4 {
            registry.append(NodeId::default(), LogTime::default(), owner(number)).await.unwrap();
        }
        store.fail(&layout::registry(2), Fault::WrongBytes, usize::MAX);
        let refused = Registry::new(archive).refresh().await.unwrap_err().to_string();
        assert!(refused.contains(&layout::registry(2)), "{refused}");
    }

    /// The fear: the next writer takes the name of a record that was lost; what lies behind it is read by nobody, and nothing tells of it.
    #[tokio::test]
    async fn the_name_of_a_lost_record_is_marked_and_not_given_away() {
        let (node, time) = (NodeId::default(), LogTime::default());
        for (lost, next) in [(&[2][..], 5), (&[1], 5), (&[1, 2, 3], 5), (&[4], 4)] {
            let store = FaultyStore::new();
            let archive = archive(&store).await;
            let mut before = Registry::new(archive.clone());
            for number in 1..=4 {
                before.append(node, time, owner(number)).await.unwrap();
            }
            for number in lost {
                store.remove(&layout::registry(*number)).await;
            }
            let mut reader = Registry::new(archive.clone());
            let kept = reader.refresh().await.unwrap().clone();
            assert!(
                kept.owners.len() == 4 - lost.len() || lost.len() > 1,
                "{lost:?}: what lies behind is read"
            );
            assert_eq!(
                store.names().await.iter().filter(|name| name.starts_with("registry/")).count(),
                4 - lost.len()
            );
            let mut writer = Registry::new(archive.clone());
            assert_eq!(writer.append(node, time, owner(9)).await.unwrap(), next, "{lost:?}");
            // Only that the last one was lost cannot be seen.
            let seen: Vec<u64> = lost.iter().copied().filter(|number| *number < 4).collect();
            let mut fresh = Registry::new(archive);
            for registry in [&mut fresh, &mut reader, &mut writer] {
                let view = registry.refresh().await.unwrap();
                assert_eq!(view.lost.keys().copied().collect::<Vec<u64>>(), seen, "{lost:?}");
                assert!(view.owners.contains("9") && view.owners.len() == 5 - lost.len(), "{lost:?}");
            }
        }
    }

    /// A record that two write at once is no hole, however the answers are ordered.
    #[tokio::test]
    async fn a_record_that_comes_back_counts() {
        let store = FaultyStore::new();
        let archive = archive(&store).await;
        let (node, time) = (NodeId::default(), LogTime::default());
        let mut registry = Registry::new(archive.clone());
        for number in 1..=3 {
            registry.append(node, time, owner(number)).await.unwrap();
        }
        store.fail(&layout::registry(2), Fault::Lost, 2);
        let mut writer = Registry::new(archive.clone());
        assert_eq!(writer.append(node, time, owner(4)).await.unwrap(), 4);
        assert_eq!((writer.view().owners.len(), writer.view().lost.len()), (4, 0));
        assert_eq!(Registry::new(archive).refresh().await.unwrap(), writer.view());
    }
}
