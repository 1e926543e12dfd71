//! Verifying an archive: everything that a restore would need is looked at, read, and compared.
//!
//! Invariants:
//! - Nothing is modified.
//! - Damage (it is there and wrong), absence (it is not there) and silence (the store did not answer) are told apart.
//! - Every finding names its object.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use futures::StreamExt;
use murphy_fs::{
    BlockStore, BlockStoreError, IndexError, PackMeta, PackName, PackReader, PackRow, RowBatch,
    SnapshotReader, Table,
};
use murphy_log::{Frame, Lsn, NodeId, Position};
use serde::Serialize;

use crate::{
    base::{BaseManifest, ReadBaseError, bases, read_base},
    descriptor::{Archive, ArchiveKind},
    document::PositionText,
    layout,
    pack::{named_packs, released_packs},
    proof::{Proof, VERIFY},
    registry::{Pin, Registry, RegistryError},
    slot::SlotHeader,
    store::StoreError,
    survey::{ReadSlotError, read_slot},
    surveyed::SlotKey,
    walk::{
        Boundary, HOLE_LOOKS, HOLE_PAUSE, Head, Link, TURNS_MAX, WalkError, above_floor, listed_slots,
        read_head,
    },
};

/// What is wrong with an object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// It is there, and not what was written.
    Damaged,
    /// It is not there.
    Missing,
    /// It could not be asked for.
    Unknown,
    /// It contradicts the objects around it.
    Contradiction,
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FindingKind::Damaged => "damaged",
            FindingKind::Missing => "missing",
            FindingKind::Unknown => "unknown",
            FindingKind::Contradiction => "contradiction",
        })
    }
}

/// Something that was found.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Finding {
    /// What kind.
    pub kind: FindingKind,
    /// The object.
    pub object: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.kind, self.object, self.reason)
    }
}

/// The result of a verification.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct VerifyReport {
    /// The archive.
    pub url: String,
    /// What it holds: a log archive is restored with the block store.
    pub kind: ArchiveKind,
    /// Up to where it was verified: everything up to here can be restored if there are no findings.
    pub position: PositionText,
    /// How many slots were read.
    pub slots: u64,
    /// How many entries are in them.
    pub entries: u64,
    /// How many slots no walk reaches: puts that landed late, or were cut anew. They do no harm.
    pub strays: u64,
    /// How many slots of a history that lost lie under names that the log has passed: a copy of the source ran. They do no harm.
    pub dead: u64,
    /// How many seals were passed.
    pub seals: u64,
    /// How many snapshots were read.
    pub snapshots: u64,
    /// How many packs were looked for.
    pub packs: u64,
    /// How many of them were read.
    pub packs_read: u64,
    /// States before this LSN are not verified: their packs may be gone.
    pub horizon: u64,
    /// How many packs were not looked for, because only states before the horizon refer to them.
    pub packs_below_horizon: u64,
    /// How many registry records there are.
    pub records: u64,
    /// Who reads at the moment, or died while reading.
    pub pins: Vec<Pin>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl VerifyReport {
    /// The proof that this report is, of a verification from `began` to `ended`.
    pub fn proof(&self, node: NodeId, data_percent: u8, began: u64, ended: u64) -> Proof {
        Proof {
            kind: VERIFY.to_owned(),
            node: node.to_string(),
            began,
            ended,
            position: self.position.clone(),
            data_percent,
            objects: self.slots + self.seals + self.snapshots + self.packs + self.records,
            findings: self.findings.iter().map(Finding::to_string).collect(),
        }
    }
}

/// Verifies `archive`; of `data_percent` of the packs the contents are read, of the others only that they are there.
///
/// The packs that are read are chosen by their names and `seed`, so that verifying with changing seeds reads all of them in time.
pub async fn verify(archive: &Archive, data_percent: u8, seed: u64) -> VerifyReport {
    let base = archive.descriptor().base;
    let report = VerifyReport {
        url: archive.url().to_owned(),
        kind: archive.descriptor().kind,
        position: base.into(),
        slots: 0,
        entries: 0,
        strays: 0,
        dead: 0,
        seals: 0,
        snapshots: 0,
        packs: 0,
        packs_read: 0,
        horizon: 0,
        packs_below_horizon: 0,
        records: 0,
        pins: Vec::new(),
        findings: Vec::new(),
    };
    let mut verifier = Verifier {
        archive,
        report,
        packs: BTreeMap::new(),
        lost: BTreeSet::new(),
        horizon: Lsn::default(),
        abandoned: BTreeSet::new(),
        dead: BTreeSet::new(),
        reached: BTreeSet::new(),
    };
    let start = verifier.registry().await;
    verifier.log(start).await;
    verifier.snapshots().await;
    if archive.descriptor().kind == ArchiveKind::Full {
        verifier.packs(data_percent.min(100), seed).await;
    }
    verifier.report.findings.sort();
    verifier.report
}

struct Verifier<'a> {
    archive: &'a Archive,
    report: VerifyReport,
    /// What the log and the newest snapshot name.
    packs: BTreeMap<PackName, PackMeta>,
    /// Those of them that the last word of the log calls missing.
    lost: BTreeSet<PackName>,
    /// States before it are of no concern.
    horizon: Lsn,
    /// Slots that were given up.
    abandoned: BTreeSet<SlotKey>,
    /// Packs that nothing referred to any more before the horizon.
    dead: BTreeSet<PackName>,
    /// The names of slots and seals that the walk passed.
    reached: BTreeSet<String>,
}

impl Verifier<'_> {
    fn found(&mut self, kind: FindingKind, name: &str, reason: impl fmt::Display) {
        let object = self.archive.store().object(name);
        self.report.findings.push(Finding { kind, object, reason: reason.to_string() });
    }

    fn found_error(&mut self, name: &str, error: &StoreError) {
        let kind = match error {
            StoreError::NotFound { .. } => FindingKind::Missing,
            StoreError::Length { .. } => FindingKind::Damaged,
            StoreError::Unavailable { .. } | StoreError::Exists { .. } | StoreError::Refused { .. } => {
                FindingKind::Unknown
            }
        };
        self.found(kind, name, error);
    }

    /// Reads the registry and says where the log begins.
    async fn registry(&mut self) -> Boundary {
        let mut registry = Registry::new(self.archive.clone());
        let refreshed = registry.refresh().await.map(|_| ());
        let number = registry.view().records + 1;
        match refreshed {
            Ok(()) => {}
            Err(RegistryError::Store(error)) => self.found_error(&layout::registry(number), &error),
            Err(error) => self.found(FindingKind::Damaged, &layout::registry(number), error),
        }
        for (number, behind) in registry.view().lost.clone() {
            let reason = match behind {
                0 => "it was lost, and marked when somebody went on: what it said is not known".to_owned(),
                _ => format!("it was lost: {} is there", layout::registry(behind)),
            };
            self.found(FindingKind::Missing, &layout::registry(number), reason);
        }
        // What lies behind a wider hole is read by nobody: floors, pins and owners are forgotten.
        match registry.hole().await {
            Ok(Some((missing, there))) => {
                let reason = format!("the last one that is there is {}", layout::registry(there));
                self.found(FindingKind::Missing, &layout::registry(missing), reason);
            }
            Ok(None) => {}
            Err(RegistryError::Store(error)) => self.found_error(layout::REGISTRY_FOLDER, &error),
            // Found above.
            Err(_) => {}
        }
        let branch = self.archive.lineage().branch.to_string();
        self.horizon = registry.view().horizons.get(&branch).copied().unwrap_or_default();
        self.report.horizon = self.horizon.get();
        self.report.pins = registry.view().pins.values().cloned().collect();
        self.report.records = registry.view().records;
        let base = Boundary::after(self.archive.descriptor().base);
        self.abandoned.clone_from(&registry.view().abandoned);
        match above_floor(self.archive, base, &registry).await {
            Ok(start) => start,
            Err(error) => {
                let kind = match &error {
                    WalkError::Missing { .. } => FindingKind::Missing,
                    WalkError::Registry(_) | WalkError::Store(_) => FindingKind::Unknown,
                    WalkError::Damaged { .. } | WalkError::Fork { .. } | WalkError::Foreign { .. } => {
                        FindingKind::Damaged
                    }
                };
                self.found(kind, layout::LOG_FOLDER, format!("the floor leads nowhere: {error}"));
                base
            }
        }
    }

    /// Walks slots and seals, reading each slot whole. Behind a hole it goes on with the next slot that is listed.
    async fn log(&mut self, start: Boundary) {
        let listed = match listed_slots(self.archive, "").await {
            Ok(listed) => listed,
            Err(error) => {
                self.found_error(layout::LOG_FOLDER, &error);
                Vec::new()
            }
        };
        let mut at = start;
        loop {
            while let Some(next) = self.step(at).await {
                at = next;
            }
            let behind = listed.iter().filter_map(|(name, _)| layout::parse_slot(name));
            let behind = behind.filter(|(epoch, first, _)| (*epoch, *first) > (at.epoch.number, at.next()));
            let unreached = behind.map(|(epoch, first, turn)| layout::slot_in_turn(epoch, first, turn));
            let is_open =
                |name: &String| layout::parse_slot(name).is_none_or(|key| !self.abandoned.contains(&key));
            let unreached = unreached.filter(|name| !self.reached.contains(name) && is_open(name));
            let unreached: Vec<String> = unreached.collect();
            let first_open = (0..at.turn).find(|turn| is_open(&Boundary { turn: *turn, ..at }.slot_name()));
            if let Some(turn) = first_open {
                // What lies further on may be the copy's.
                let dead = Boundary { turn, ..at }.slot_name();
                let reason = "it continues another history than the log before it: a copy of the source has shipped here, \
                    or the source has forgotten it; the source does not go on before it is given up";
                self.found(FindingKind::Contradiction, &dead, reason);
                break;
            }
            match self.behind_hole(&at, &unreached).await {
                Some(next) => at = next,
                None => break,
            }
        }
        self.report.strays = listed.iter().filter(|(name, _)| !self.reached.contains(name)).count() as u64;
        self.report.position = at.position.into();
    }

    /// Tells of the hole at `at`, behind which `unreached` lie, and says where the walk can go on.
    async fn behind_hole(&mut self, at: &Boundary, unreached: &[String]) -> Option<Boundary> {
        let further = unreached.first()?;
        let name = at.slot_name();
        if !self.reached.contains(&name) {
            // Several slots are under way at once: a later one may be there before an earlier one.
            for _ in 0..HOLE_LOOKS {
                tokio::time::sleep(HOLE_PAUSE).await;
                if let Ok(Some(_)) = read_head(self.archive, &name).await {
                    return Some(*at);
                }
            }
            self.found(FindingKind::Missing, &name, format!("the next one that is there is {further}"));
        }
        for name in unreached {
            match read_head(self.archive, name).await {
                Ok(Some(Head::Slot(slot))) => {
                    let lsn = slot.first.previous();
                    let position = Position { epoch: slot.epoch, lsn, hash: slot.hash_before };
                    return Some(Boundary::after(position));
                }
                Ok(Some(Head::Seal(seal))) => return Some(Boundary::before(seal.base, seal.epoch)),
                Ok(None) => self.found(FindingKind::Missing, name, "it is listed"),
                Err(error) => self.found(FindingKind::Damaged, name, error),
            }
            self.reached.insert(name.clone());
        }
        None
    }

    /// Verifies the object under the next name; `None` if there is none, or it leads nowhere.
    async fn step(&mut self, at: Boundary) -> Option<Boundary> {
        let name = at.slot_name();
        let head = match read_head(self.archive, &name).await {
            Ok(head) => head?,
            Err(WalkError::Store(error)) => {
                self.found_error(&name, &error);
                self.reached.insert(name);
                return None;
            }
            Err(error) => {
                self.found(FindingKind::Damaged, &name, error);
                self.reached.insert(name);
                return None;
            }
        };
        self.reached.insert(name.clone());
        match head {
            Head::Seal(seal) => {
                self.report.seals += 1;
                let same = (seal.base.lsn, seal.base.hash) == (at.position.lsn, at.position.hash);
                if !same || seal.epoch != at.epoch || seal.lineage != self.archive.lineage() {
                    self.found(
                        FindingKind::Contradiction,
                        &name,
                        format!("a seal of another history, at {}", seal.base),
                    );
                    return None;
                }
                Some(Boundary::before(at.position, seal.next))
            }
            Head::Slot(header) if self.is_dead(&header, &at) => {
                self.report.dead += 1;
                Some(Boundary { turn: at.turn + 1, ..at })
            }
            Head::Slot(header) => {
                if let Err((kind, reason)) = self.slot(&name, at).await {
                    self.found(kind, &name, reason);
                    // The header alone still says where the next one is.
                    if kind == FindingKind::Contradiction {
                        return None;
                    }
                }
                Some(Boundary::after(header.end()))
            }
        }
    }

    fn is_dead(&self, slot: &SlotHeader, at: &Boundary) -> bool {
        let is_own = slot.lineage == self.archive.lineage();
        is_own && at.turn < TURNS_MAX && Link::of(slot, at) == Some(Link::Dead)
    }

    async fn slot(&mut self, name: &str, at: Boundary) -> Result<(), (FindingKind, String)> {
        let slot = read_slot(self.archive, name).await.map_err(|error| match &error {
            ReadSlotError::Damaged { reason, .. } => (FindingKind::Damaged, reason.clone()),
            ReadSlotError::Store(StoreError::NotFound { .. }) => (FindingKind::Missing, error.to_string()),
            ReadSlotError::Store(_) => (FindingKind::Unknown, error.to_string()),
        })?;
        if slot.header.epoch != at.epoch {
            let reason = format!("it is of epoch {}, after {}", slot.header.epoch, at.epoch);
            return Err((FindingKind::Contradiction, reason));
        }
        let entries = slot.header.last.since(slot.header.first) + 1;
        let frames: Vec<Frame> = slot
            .verify(self.archive.keys(), &at.position)
            .map_err(|error| (FindingKind::Contradiction, error.to_string()))?;
        self.report.slots += 1;
        self.report.entries += entries;
        let named = named_packs(&frames).map_err(|error| (FindingKind::Damaged, error.to_string()))?;
        let released = released_packs(&frames, self.horizon);
        self.dead.extend(released.map_err(|error| (FindingKind::Damaged, error.to_string()))?);
        for pack in named {
            self.named(pack.meta, pack.is_missing);
        }
        Ok(())
    }

    fn named(&mut self, meta: PackMeta, is_missing: bool) {
        self.packs.insert(meta.name, meta);
        if is_missing {
            self.lost.insert(meta.name);
        } else {
            self.lost.remove(&meta.name);
        }
    }

    async fn snapshots(&mut self) {
        let listed = match bases(self.archive).await {
            Ok(listed) => listed,
            Err(error) => {
                self.found(FindingKind::Unknown, layout::SNAPSHOT_FOLDER, error);
                return;
            }
        };
        let mut first: Option<Lsn> = None;
        for base in listed {
            match base {
                Ok(base) => {
                    let lsn = base.state.position.lsn;
                    first = Some(first.map_or(lsn, |first| first.min(lsn)));
                    self.snapshot(&base).await;
                }
                Err(ReadBaseError::Store(error)) => self.found_error(layout::SNAPSHOT_FOLDER, &error),
                Err(error) => self.found(FindingKind::Damaged, layout::SNAPSHOT_FOLDER, error),
            }
        }
        let base = self.archive.descriptor().base.lsn;
        if base != Lsn::ROOT && first.is_none_or(|first| first > base) {
            let name =
                layout::manifest(&layout::snapshot_folder(self.archive.descriptor().base.epoch.number, base));
            self.found(FindingKind::Missing, &name, "nothing before the first snapshot can be restored");
        }
    }

    async fn snapshot(&mut self, base: &BaseManifest) {
        self.report.snapshots += 1;
        let reader = read_base(self.archive, base);
        let lineage = self.archive.lineage();
        let state = base.state;
        let verified = murphy_log::aside(move || {
            let reader = SnapshotReader::open(reader)?;
            let header = *reader.header();
            let mut packs = Vec::new();
            let mut sink = |rows: RowBatch| {
                packs.extend(rows.into_iter().filter(|(key, _)| key.table() == Table::Pack.number()));
                Ok::<(), IndexError>(())
            };
            reader.read(&mut sink, &|_| {})?;
            let matches =
                (header.volume, header.branch, header.state) == (lineage.volume, lineage.branch, state);
            Ok::<_, murphy_fs::ReadSnapshotError>((matches, packs))
        });
        match verified.await {
            Ok((true, packs)) => {
                for (key, value) in packs {
                    match PackRow::decode(&value) {
                        Ok(row) if row.live_bytes == 0 => {}
                        // The log has the last word, and was read before.
                        Ok(row) => {
                            let meta = row.meta();
                            if !self.packs.contains_key(&meta.name) {
                                self.named(meta, row.is_missing());
                            }
                        }
                        Err(error) => {
                            self.found(FindingKind::Damaged, &base.folder, format!("row {key:?}: {error}"));
                        }
                    }
                }
            }
            Ok((false, _)) => {
                self.found(FindingKind::Contradiction, &base.folder, "it is not what its manifest describes");
            }
            Err(error) => {
                let kind = match &error {
                    murphy_fs::ReadSnapshotError::Input(source) => match source
                        .get_ref()
                        .and_then(|source| source.downcast_ref::<ReadBaseError>())
                    {
                        Some(ReadBaseError::Store(StoreError::NotFound { .. })) => FindingKind::Missing,
                        Some(ReadBaseError::Store(StoreError::Unavailable { .. })) => FindingKind::Unknown,
                        _ => FindingKind::Damaged,
                    },
                    _ => FindingKind::Damaged,
                };
                self.found(kind, &base.folder, error);
            }
        }
    }

    async fn packs(&mut self, data_percent: u8, seed: u64) {
        let store = self.archive.packs();
        let known = self.packs.len();
        self.packs.retain(|name, _| !self.dead.contains(name));
        self.report.packs_below_horizon = (known - self.packs.len()) as u64;
        let mut packs: Vec<PackMeta> = std::mem::take(&mut self.packs).into_values().collect();
        packs.sort_by_cached_key(|meta| drawn(meta.name, seed));
        // Of few packs at least one.
        let read = (packs.len() * usize::from(data_percent)).div_ceil(100);
        self.report.packs = packs.len() as u64;
        let looked = futures::stream::iter(packs.into_iter().enumerate()).map(|(place, meta)| {
            let store = &store;
            async move {
                let is_read = place < read;
                (meta, is_read, look_at_pack(&meta, store, is_read).await)
            }
        });
        let mut looked = looked.buffer_unordered(PACKS_AT_ONCE);
        let mut findings = Vec::new();
        while let Some((meta, is_read, result)) = looked.next().await {
            self.report.packs_read += u64::from(is_read);
            if let Err((kind, mut reason)) = result {
                if kind == FindingKind::Missing && self.lost.contains(&meta.name) {
                    reason.push_str(" (the volume knows that it was lost with a source)");
                }
                findings.push((kind, meta.name.object_path(), reason));
            }
        }
        for (kind, name, reason) in findings {
            self.found(kind, &name, reason);
        }
    }
}

/// A number that puts packs into an order of chance.
fn drawn(name: PackName, seed: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.to_string().as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

async fn look_at_pack(
    meta: &PackMeta,
    store: &dyn BlockStore,
    is_read: bool,
) -> Result<(), (FindingKind, String)> {
    let failed = |error: BlockStoreError| {
        let kind = match &error {
            BlockStoreError::NotFound { .. } => FindingKind::Missing,
            BlockStoreError::Damaged { .. } => FindingKind::Damaged,
            BlockStoreError::Unavailable { .. } | BlockStoreError::Refused { .. } => FindingKind::Unknown,
        };
        (kind, error.to_string())
    };
    if is_read {
        let bytes = store.get(meta.name).await.map_err(failed)?;
        let read = PackReader::open(meta, bytes).and_then(|reader| reader.verify());
        return read.map_err(|error| (FindingKind::Damaged, error.to_string()));
    }
    let size = store.size(meta.name).await.map_err(failed)?;
    if size == meta.stored_len {
        return Ok(());
    }
    Err((FindingKind::Damaged, format!("{size} bytes where {} were written", meta.stored_len)))
}

const PACKS_AT_ONCE: usize = 32;

#[cfg(test)]
mod tests;
