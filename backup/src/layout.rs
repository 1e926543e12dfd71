//! What the objects of an archive are called. `docs/formats/archive.md` has the whole layout.
//!
//! Invariants:
//! - A name is built here or not at all; parsing accepts exactly what building makes.
//! - Numbers have a fixed width, so that names sort as the numbers do.
//! - The name of a slot follows from the number of the epoch and its first LSN alone: two sources that would write the same
//!   entries meet in one name, whatever id their epochs have. Only where that name holds a slot of a history that lost there is a further one.

use murphy_log::{LogTime, Lsn};

/// Where the descriptor is.
pub(crate) const DESCRIPTOR: &str = "murphy.json";

/// The slot of epoch `epoch` that begins with `first`.
pub(crate) fn slot(epoch: u32, first: Lsn) -> String {
    format!("{LOG_FOLDER}/{epoch:010}/{:020}.seg", first.get())
}

/// What the names of all turns of that slot begin with; it sorts before them.
pub(crate) fn slot_place(epoch: u32, first: Lsn) -> String {
    format!("{LOG_FOLDER}/{epoch:010}/{:020}", first.get())
}

/// The same if so many names for it before hold slots of a history that lost.
pub(crate) fn slot_in_turn(epoch: u32, first: Lsn, turn: u32) -> String {
    match turn {
        0 => slot(epoch, first),
        turn => format!("{LOG_FOLDER}/{epoch:010}/{:020}-{turn:02}.seg", first.get()),
    }
}

/// The epoch, the first LSN and the turn of a slot's name.
pub(crate) fn parse_slot(name: &str) -> Option<(u32, Lsn, u32)> {
    let (epoch, file) = name.strip_prefix(LOG_FOLDER)?.strip_prefix('/')?.split_once('/')?;
    let (first, turn) = match file.strip_suffix(".seg")?.split_once('-') {
        None => (file.strip_suffix(".seg")?, 0),
        Some((first, turn)) => (first, turn.parse().ok()?),
    };
    let (epoch, first) = (epoch.parse().ok()?, Lsn::new(first.parse().ok()?));
    (slot_in_turn(epoch, first, turn) == name).then_some((epoch, first, turn))
}

/// The registry record `number`.
pub(crate) fn registry(number: u64) -> String {
    format!("{REGISTRY_FOLDER}/{number:020}")
}

/// What the objects of the snapshot at `lsn` have in common.
pub(crate) fn snapshot_folder(epoch: u32, lsn: Lsn) -> String {
    format!("{SNAPSHOT_FOLDER}/{epoch:010}-{:020}", lsn.get())
}

/// The manifest of the snapshot in `folder`.
pub(crate) fn manifest(folder: &str) -> String {
    format!("{folder}/{MANIFEST}")
}

/// A part of the snapshot in `folder`. `attempt` keeps the parts of an upload that was broken off apart from those of the next.
pub(crate) fn part(folder: &str, number: u32, attempt: u64) -> String {
    format!("{folder}/part-{number:04}-{attempt:016x}")
}

/// The folder of the snapshot whose manifest has this name.
pub(crate) fn parse_manifest(name: &str) -> Option<(&str, u32, Lsn)> {
    let folder = name.strip_suffix(MANIFEST)?.strip_suffix('/')?;
    let (epoch, lsn) = folder.strip_prefix(SNAPSHOT_FOLDER)?.strip_prefix('/')?.split_once('-')?;
    let (epoch, lsn) = (epoch.parse().ok()?, Lsn::new(lsn.parse().ok()?));
    (snapshot_folder(epoch, lsn) == folder).then_some((folder, epoch, lsn))
}

/// The result of a verification or drill that ended at `time`.
pub(crate) fn proof(time: LogTime) -> String {
    format!("{PROOF_FOLDER}/{:020}.json", time.as_nanos())
}

/// The number of a registry record.
pub(crate) fn parse_registry(name: &str) -> Option<u64> {
    name.strip_prefix(REGISTRY_FOLDER)?.strip_prefix('/')?.parse().ok()
}

/// The folder of slots and seals.
pub(crate) const LOG_FOLDER: &str = "log";
/// The folder of registry records.
pub(crate) const REGISTRY_FOLDER: &str = "registry";
/// The folder of snapshots.
pub(crate) const SNAPSHOT_FOLDER: &str = "snapshots";
/// The folder of proofs.
pub(crate) const PROOF_FOLDER: &str = "proofs";
const MANIFEST: &str = "manifest.json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_slots_sort_as_their_numbers() {
        let names =
            [slot(1, Lsn::new(2)), slot(1, Lsn::new(10)), slot(2, Lsn::new(9)), slot(10, Lsn::new(3))];
        assert!(names.is_sorted());
        assert_eq!(names[0], "log/0000000001/00000000000000000002.seg");
        assert_eq!(parse_slot(&names[1]), Some((1, Lsn::new(10), 0)));
        let again = slot_in_turn(1, Lsn::new(10), 3);
        assert_eq!(again, "log/0000000001/00000000000000000010-03.seg");
        assert_eq!(parse_slot(&again), Some((1, Lsn::new(10), 3)));
    }

    #[test]
    fn another_spelling_of_a_name_is_not_a_slot() {
        for name in
            ["log/1/2.seg", "log/0000000001/2.seg", "log/0000000001/00000000000000000002.sega", "log/", "x"]
                .into_iter()
                .chain([
                    "log/0000000001/00000000000000000002-00.seg",
                    "log/0000000001/00000000000000000002-1.seg",
                ])
        {
            assert_eq!(parse_slot(name), None, "{name}");
        }
    }

    #[test]
    fn a_manifest_names_its_snapshot() {
        let folder = snapshot_folder(3, Lsn::new(77));
        let name = manifest(&folder);
        assert_eq!(parse_manifest(&name), Some((folder.as_str(), 3, Lsn::new(77))));
        assert_eq!(parse_manifest(&part(&folder, 1, 2)), None);
    }
}
