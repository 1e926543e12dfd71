//! What the faulty disk itself promises: without it no crash test proves anything.

use super::*;

fn disk() -> FaultyDisk {
    let disk = FaultyDisk::new();
    disk.create_dir(Path::new("/d")).unwrap();
    disk
}

fn path(name: &str) -> PathBuf {
    Path::new("/d").join(name)
}

fn read(disk: &FaultyDisk, name: &str) -> Option<Vec<u8>> {
    disk.contents().into_iter().find(|(found, _)| *found == path(name)).map(|(_, bytes)| bytes)
}

#[test]
fn what_was_not_synced_may_be_lost_kept_or_torn() {
    let disk = disk();
    let file = disk.create(&path("f")).unwrap();
    file.write_at(0, &[1; 2048]).unwrap();
    assert_eq!(read(&disk.after_power_cut(0), "f"), None, "its name was not synced");
    file.sync_data().unwrap();
    assert_eq!(read(&disk.after_power_cut(0), "f"), None, "nor is it with the file");
    disk.sync_dir(Path::new("/d")).unwrap();
    file.write_at(0, &[2; 2048]).unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let bytes = read(&disk.after_power_cut(seed), "f").unwrap();
        for sector in bytes.chunks(512) {
            let new = sector.iter().filter(|byte| **byte == 2).count();
            assert!(sector[..new].iter().all(|byte| *byte == 2), "a torn sector is new, then old");
            seen.insert(new.min(1) + usize::from(new == 512));
        }
    }
    assert_eq!(seen, BTreeSet::from([0, 1, 2]), "old, torn, new");
    assert_eq!(read(&disk.after_power_cut(0), "f").unwrap(), [1; 2048]);
    assert_eq!(read(&disk.after_power_cut(1), "f").unwrap(), [2; 2048]);
    assert_eq!(read(&disk.after_kill(), "f").unwrap(), [2; 2048]);
}

#[test]
fn a_rename_that_was_not_synced_is_lost_or_whole() {
    let disk = disk();
    for (name, byte) in [("new", 1), ("old", 2)] {
        let file = disk.create(&path(name)).unwrap();
        file.write_at(0, &[byte; 10]).unwrap();
        file.sync_data().unwrap();
    }
    disk.sync_dir(Path::new("/d")).unwrap();
    disk.rename(&path("new"), &path("old")).unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..20 {
        let cut = disk.after_power_cut(seed);
        seen.insert((read(&cut, "new"), read(&cut, "old")));
    }
    let expected = BTreeSet::from([(Some(vec![1; 10]), Some(vec![2; 10])), (None, Some(vec![1; 10]))]);
    assert_eq!(seen, expected);
}

/// What fsyncgate was about: the pages are clean afterwards, and the next sync says yes.
#[test]
fn pages_of_a_failed_sync_can_be_read_and_are_not_written_by_the_next_one() {
    let disk = disk();
    let file = disk.create(&path("f")).unwrap();
    disk.sync_dir(Path::new("/d")).unwrap();
    file.write_at(0, &[1; 64 * 512]).unwrap();
    disk.fail_at(disk.operations(), Fault::Broken);
    assert!(file.sync_data().is_err());
    file.sync_data().unwrap();
    assert_eq!(read(&disk, "f").unwrap(), [1; 64 * 512]);
    let cut = read(&disk.after_power_cut(1), "f").unwrap();
    let lost = cut.chunks(512).filter(|sector| sector[0] == 0).count();
    assert!(cut.len() < 64 * 512 || (lost > 0 && lost < 64), "{} bytes, {lost} sectors lost", cut.len());
}

#[test]
fn every_moment_is_recorded_and_a_write_has_a_middle() {
    let disk = disk();
    disk.record();
    let file = disk.create(&path("f")).unwrap();
    file.write_at(0, &[1; 100]).unwrap();
    assert_eq!(disk.recorded(), 4);
    let lengths: Vec<Option<usize>> = disk
        .take_recorded()
        .iter()
        .map(|one| read(&one.after_kill(), "f").map(|bytes| bytes.len()))
        .collect();
    assert_eq!(lengths, [None, Some(0), Some(50), Some(100)]);
}

/// The way in which every small file of a node is written: configuration, key, cursor, promise, record of the index.
#[test]
fn a_replaced_file_is_the_old_one_or_the_new_one_at_every_moment() {
    let disk = disk();
    let (old, new) = (vec![1; 3000], vec![2; 5000]);
    crate::replace_file(&disk, &path("f"), &old).unwrap();
    disk.record();
    crate::replace_file(&disk, &path("f"), &new).unwrap();
    let moments = disk.take_recorded();
    let last = moments.len() - 1;
    for (at, moment) in moments.iter().enumerate() {
        for crashed in (0..50).map(|seed| moment.after_power_cut(seed)).chain([moment.after_kill()]) {
            let found = read(&crashed, "f").unwrap();
            assert!(found == new || (found == old && at < last), "moment {at}: {} bytes", found.len());
            crate::replace_private_file(&crashed, &path("f"), &old).unwrap();
            assert_eq!(read(&crashed.after_power_cut(0), "f").unwrap(), old, "what was left is in the way");
        }
    }
    for (fault, failing) in [(Fault::Full, 0..5), (Fault::Broken, 0..5)]
        .into_iter()
        .flat_map(|(fault, at)| at.map(move |at| (fault, at)))
    {
        let disk = disk.after_kill();
        disk.fail_at(disk.operations() + failing, fault);
        assert!(crate::replace_file(&disk, &path("f"), &old).is_err(), "{fault:?} at {failing}");
        for crashed in (0..20).map(|seed| disk.after_power_cut(seed)).chain([disk.after_kill()]) {
            let found = read(&crashed, "f").unwrap();
            assert!(found == old || found == new, "{fault:?} at {failing}");
        }
    }
}

/// The fear: a disk that is full only for those who reserve space first, and nobody else's way through a full disk is ever tested.
#[test]
fn whatever_makes_a_file_longer_meets_a_full_disk() {
    let disk = disk();
    let file = disk.create(&path("f")).unwrap();
    file.write_at(0, &[1; 100]).unwrap();
    disk.set_capacity(Some(disk.allocated() + 50));
    assert_eq!(file.write_at(60, &[2; 100]).unwrap_err().kind(), io::ErrorKind::StorageFull);
    file.write_at(0, &[3; 100]).unwrap();
    file.truncate(100).unwrap();
    file.write_at(100, &[4; 50]).unwrap();
    assert_eq!(disk.allocated(), 150);
    disk.set_capacity(None);
    file.write_at(60, &[2; 1000]).unwrap();
}
