//! Changes of length that take many entries, and who else asks for the file meanwhile.

use std::{collections::BTreeSet, task::Poll};

use futures::poll;

use super::*;

/// What somebody else does after some parts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    /// Bytes that are stored at once, behind the end and in front of it.
    Writes,
    /// Bytes that were written before, behind the new end, are read.
    Reads,
    /// Whoever asked for the change goes.
    Leaves,
}

/// Shortens a long file; looks at it and at another one after each part.
async fn shorten(how: impl FnOnce(&Volume, Ino) -> Answer<()>, size: u64, meanwhile: Meanwhile) {
    let (node, volume) = Node::new();
    let [ino, other] = [fragmented(&volume, "long", EXTENTS).await, fragmented(&volume, "other", 1).await];
    let handle = open(&volume, ino).await;
    if meanwhile == Meanwhile::Reads {
        let bytes = Bytes::from(vec![7; 20]);
        volume.write(&Caller::default(), ino, handle, size + 10, bytes).wait().await.unwrap();
    }
    let Answer::Later(mut resized) = how(&volume, ino) else { panic!("whoever asks does it all") };
    let mut sizes = BTreeSet::new();
    let mut is_done = false;
    while !is_done {
        match poll!(&mut resized) {
            Poll::Ready(resized) => {
                resized.unwrap();
                is_done = true;
            }
            Poll::Pending => tokio::task::yield_now().await,
        }
        for ino in [other, ino] {
            // The change goes on only after this; others keep the lock for a moment.
            let lock = |file: Arc<files::FileState>| file.lock_within(overwrites::PATIENCE).is_some();
            assert!(volume.shared.files.find(ino).is_none_or(lock), "whoever looks at the file would wait");
            let Answer::Now(Ok(attr)) = volume.getattr(ino) else { panic!("a stat waits") };
            if ino != other && sizes.insert(attr.size) && sizes.len() == 4 {
                match meanwhile {
                    Meanwhile::Nothing => {}
                    Meanwhile::Writes => write_around(&volume, ino, handle).await,
                    Meanwhile::Reads => {
                        let read = volume.read(ino, handle, size + 10, 20).wait().await;
                        assert_eq!(read.unwrap(), vec![7; 20]);
                    }
                    Meanwhile::Leaves => is_done = true,
                }
            }
        }
    }
    drop(resized);
    let row = volume.inode_row(ino).unwrap().unwrap();
    if meanwhile == Meanwhile::Leaves {
        volume.durable_here().await.unwrap();
        let crashed = overwrites::after_crash(node.log.reopened(), Arc::clone(&node.blocks));
        assert_eq!(crashed.inode_row(ino).unwrap(), Some(row));
        let [left, live] = [&crashed, &volume].map(|volume| volume.extent_offsets(ino, 0).unwrap());
        assert_eq!(left, live);
        stays_as_it_is(&volume, ino, row.size).await;
        assert!(row.size > size);
    } else {
        assert!(sizes.len() > 5, "{sizes:?}");
        assert_eq!(row.size, size);
    }
    let left: Vec<_> = volume.view().extents(ino, 0, u64::MAX).map(Result::unwrap).collect();
    assert_eq!(row.extents, left.len() as u64);
    assert!(left.iter().all(|extent| extent.end() <= row.size));
    assert_eq!(volume.dirty_bytes(), 0);
    volume.release(ino, handle);
}

async fn write_around(volume: &Volume, ino: Ino, handle: Handle) {
    for at in [10, EXTENTS / 4 * EXTENT, EXTENTS * EXTENT - 10, 3 * EXTENTS * EXTENT] {
        volume.write(&Caller::default(), ino, handle, at, Bytes::from(vec![7; 20])).wait().await.unwrap();
    }
    volume.fsync(ino, Some(handle)).wait().await.unwrap();
}

async fn stays_as_it_is(volume: &Volume, ino: Ino, size: u64) {
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert_eq!(volume.inode_row(ino).unwrap().unwrap().size, size);
    }
}

fn cut_in_half(volume: &Volume, ino: Ino) -> Answer<()> {
    let change = SetAttr { size: Some(HALF), ..SetAttr::default() };
    match volume.setattr(&Caller::default(), ino, None, change) {
        Answer::Now(resized) => Answer::Now(resized.map(drop)),
        Answer::Later(later) => Answer::later(async move { later.await.map(drop) }),
    }
}

fn open_emptied(volume: &Volume, ino: Ino) -> Answer<()> {
    let flags = OpenFlags { write: true, truncate: true, ..OpenFlags::default() };
    match volume.open(&Caller::default(), ino, flags) {
        Answer::Now(opened) => Answer::Now(opened.map(drop)),
        Answer::Later(later) => Answer::later(async move { later.await.map(drop) }),
    }
}

/// The fear: whoever looks at a long file while it is cut waits until all of it is, and everybody behind him waits too.
#[tokio::test]
async fn a_long_file_and_others_are_answered_while_it_is_cut() {
    shorten(cut_in_half, HALF, Meanwhile::Nothing).await;
    shorten(open_emptied, 0, Meanwhile::Nothing).await;
}

/// The fear: what others store between two parts is left behind the end of the file, or makes the next part fail.
#[tokio::test]
async fn what_is_stored_while_a_long_file_is_cut_is_cut_too() {
    shorten(cut_in_half, HALF, Meanwhile::Writes).await;
    shorten(open_emptied, 0, Meanwhile::Writes).await;
}

/// The fear: the first part of a cut drops bytes that were written and not stored, although it does not come to them, and older ones appear.
#[tokio::test]
async fn what_a_long_cut_has_not_come_to_is_as_it_was_written() {
    shorten(cut_in_half, HALF, Meanwhile::Reads).await;
    shorten(open_emptied, 0, Meanwhile::Reads).await;
}

/// The fears: a change of length of which somebody was told that it failed cuts off what he writes then; a crash between two parts leaves
/// extents behind the end.
#[tokio::test]
async fn a_cut_that_nobody_waits_for_any_more_goes_no_further() {
    shorten(cut_in_half, HALF, Meanwhile::Leaves).await;
}

const EXTENTS: u64 = 6000;
const HALF: u64 = EXTENTS / 2 * EXTENT;
