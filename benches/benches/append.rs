//! The log: how many entries a second become durable, and how many bytes a file costs that `cp -a` brings.
//!
//! `cargo bench -p murphy-benches --bench append [-- ENTRIES]`. Prints one line for each figure. The second part does through the
//! library what `cp -a` does for a small file: create, write, times, mode; and counts what that leaves in the log, raw and as a slot of an
//! archive.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::{collections::BTreeMap, path::Path, process::ExitCode, time::Duration};

use bytes::Bytes;
use murphy_backup::{Lineage, SLOT_FRAMES_MAX, encode_slot};
use murphy_benches::{
    cpu::process_cpu_nanos,
    engine::{BRANCH, VOLUME, new_volume_with_log},
    history::creates,
};
use murphy_fs::{
    Answer, Caller, EntryKind, FileSystem, Ino, Name, OpenFlags, SetAttr, SetTime, Timespec, Volume,
    VolumeOptions,
};
use murphy_log::{
    Clock, DiskLog, DiskOptions, FRAME_HEADER_BYTES, Frame, Log, Lsn, NodeId, State, SystemClock, VolumeKeys,
    encode_entry,
};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let entries = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    let directory = tempfile::tempdir_in(".").expect("the current directory takes a directory");
    let path = directory.path().canonicalize().expect("it exists");
    let (base, frames) = creates(entries, &VolumeKeys::derive(VOLUME));
    append(&path.join("alone"), base, &frames, entries);
    drop(frames);
    let (volume, log) = new_volume_with_log(&path, VolumeOptions::default());
    let (files, copying) = (entries / 20, volume.clone());
    let copied = tokio::task::spawn_blocking(move || copy(&copying, files));
    copied.await.expect("copying does not panic");
    volume.sync_all().wait().await.expect("the log takes everything");
    print_bytes(&*log, files);
    ExitCode::SUCCESS
}

/// Appends all frames, the log's own limit on what is queued being the only brake, and waits until they are durable.
fn append(directory: &Path, base: State, frames: &[Frame], entries: usize) {
    let log = DiskLog::create(DiskOptions::new(directory, VOLUME, BRANCH), base).expect("an empty directory");
    log.claim(base.position.epoch).expect("a new log");
    let clock = SystemClock::new();
    let (start, cpu, mut previous) = (clock.monotonic(), process_cpu_nanos(), base.position);
    for frame in frames {
        log.append(&previous, frame.clone()).expect("there is room");
        previous = frame.position();
    }
    log.durable().wait_blocking(previous.lsn, DURABLE_MAX).expect("the disk takes it");
    let seconds = (clock.monotonic() - start).as_secs_f64();
    let cpu = (process_cpu_nanos() - cpu) as f64 / 1e3 / entries as f64;
    let bytes: usize = frames.iter().map(|frame| frame.bytes().len()).sum();
    println!(
        "append: {:.0} entries/s durable, {:.1} MB/s, {cpu:.2} us of CPU each, {:.1} bytes each, {} frames",
        entries as f64 / seconds,
        bytes as f64 / 1e6 / seconds,
        bytes as f64 / entries as f64,
        frames.len()
    );
}

/// What `cp -a` asks for, file by file.
fn copy(volume: &Volume, files: usize) {
    let caller = Caller::default();
    let mut parent = Ino::ROOT;
    for number in 0..files {
        if number % DIRECTORY == 0 {
            parent = wait(volume.mkdir(&caller, Ino::ROOT, &name(format!("dir{number}")), 0o755)).ino;
        }
        let flags = OpenFlags { read: false, write: true, ..OpenFlags::default() };
        let made = volume.create(&caller, parent, &name(format!("file{number:08}.rs")), 0o600, flags);
        let (attr, opened) = wait(made);
        let bytes = Bytes::from(format!("// file {number}\n").repeat(200));
        let written = wait(volume.write(&caller, attr.ino, opened.handle, 0, bytes.clone()));
        assert_eq!(written as usize, bytes.len());
        let time = SetTime::At(Timespec { seconds: 1_700_000_000 + number as i64, nanos: 1 });
        let times = SetAttr { atime: Some(time), mtime: Some(time), ..SetAttr::default() };
        wait(volume.setattr(&caller, attr.ino, Some(opened.handle), times));
        let mode = SetAttr { mode: Some(0o644), ..SetAttr::default() };
        wait(volume.setattr(&caller, attr.ino, None, mode));
        wait(volume.flush(attr.ino, opened.handle));
        volume.release(attr.ino, opened.handle);
    }
}

fn print_bytes(log: &dyn Log, files: usize) {
    let read = log.read(Lsn::FIRST).expect("the log is whole");
    let frames: Vec<Frame> = read.map(|frame| frame.expect("a sound frame")).collect();
    let raw: usize = frames.iter().map(|frame| frame.bytes().len()).sum();
    let entries: usize = frames.iter().map(|frame| frame.header().count as usize).sum();
    let lineage = Lineage { volume: VOLUME, branch: BRANCH };
    let slots: usize = slots_of(&frames)
        .map(|frames| encode_slot(lineage, NodeId::default(), frames).expect("frames that follow").len())
        .sum();
    let each = |number: usize| number as f64 / files as f64;
    println!(
        "cp -a of a small file: {:.2} entries, {:.1} bytes in the log ({:.1} of them frame headers), {:.1} in a slot",
        each(entries),
        each(raw),
        each(frames.len() * FRAME_HEADER_BYTES),
        each(slots)
    );
    print_kinds(&frames);
}

/// How many bytes the entries of each kind take, each as the first of a frame.
fn print_kinds(frames: &[Frame]) {
    let (mut kinds, mut stored) = (BTreeMap::<u8, (usize, usize)>::new(), Vec::new());
    for entry in frames.iter().flat_map(Frame::iter) {
        let entry = entry.expect("a sound entry");
        stored.clear();
        encode_entry(&entry, entry.time, &mut stored).expect("it was stored before");
        let (count, bytes) = kinds.entry(entry.kind).or_default();
        (*count, *bytes) = (*count + 1, *bytes + stored.len());
    }
    for (kind, (count, bytes)) in kinds {
        let kind = EntryKind::from_number(kind).map_or_else(|| kind.to_string(), |kind| format!("{kind:?}"));
        println!("  {count} x {kind}: {:.1} bytes each", bytes as f64 / count as f64);
    }
}

/// Runs of frames as a shipper cuts them that sends about a slot a second.
fn slots_of(mut frames: &[Frame]) -> impl Iterator<Item = &[Frame]> {
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = frames.iter().take(SLOT_FRAMES_MAX as usize).take_while(|frame| {
            bytes += frame.bytes().len();
            bytes <= SLOT_BYTES
        });
        let (slot, rest) = frames.split_at(fits.count());
        frames = rest;
        (!slot.is_empty()).then_some(slot)
    })
}

fn name(text: String) -> Name {
    Name::new(text.into_bytes()).expect("a name")
}

fn wait<T>(answer: Answer<T>) -> T {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(later) => tokio::runtime::Handle::current().block_on(later),
    }
    .expect("nothing stands in the way")
}

const DIRECTORY: usize = 1000;
const SLOT_BYTES: usize = 4 << 20;
const DURABLE_MAX: Duration = Duration::from_secs(600);
