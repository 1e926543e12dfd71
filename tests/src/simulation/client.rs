//! A client: a process that uses the file system of the node it runs on, and remembers what fsync promised it.
//!
//! Invariants:
//! - What a client is certain of, the judge knows; while something is done to a file nothing is certain of it.
//! - A request that is not answered in time is a violation: nobody waits for ever without an error.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_fs::{
    Answer, Caller, Errno, FileSystem, Handle, Ino, Name, OpenFlags, RenameMode, SetAttr, Volume, XattrMode,
    XattrName,
};
use murphy_log::Position;

use super::{Level, gate::Gate, judge::Certain, stage::Stage};
use crate::Random;

/// Somebody who uses a file system.
pub(super) struct Client {
    pub(super) stage: Arc<Stage>,
    pub(super) number: u64,
    /// How many files it has made.
    pub(super) made: u64,
    /// Its files, which it may use again.
    pub(super) files: Vec<String>,
    pub(super) level: Level,
    /// How many mirrors acknowledge, if they do.
    pub(super) wanted: usize,
}

/// Where a client runs.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) host: usize,
    pub(super) volume: Volume,
    pub(super) gate: Arc<Gate>,
}

/// Why an operation came to nothing.
enum Trouble {
    /// The node is gone, or leads no more.
    Gone,
    /// The file system said so.
    Errno(Errno),
}

impl Client {
    /// Uses the file system at `place` until something ends that.
    pub(super) async fn use_place(&mut self, place: &Place) {
        loop {
            self.stage.pause(5, 400).await;
            place.gate.pass_or_death().await;
            match self.act(place).await {
                Ok(()) => {}
                Err(Trouble::Errno(errno)) if errno != Errno::EROFS && place.volume.ended().is_none() => {
                    self.stage.note(format!("client {}: {errno:?}", self.number));
                }
                Err(_) => return,
            }
        }
    }

    async fn act(&mut self, place: &Place) -> Result<(), Trouble> {
        self.stage.operations.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        match self.stage.below(12) {
            0..=4 => {
                let name = format!("c{}-{}", self.number, self.made);
                self.made += 1;
                self.files.push(name.clone());
                self.write_file(place, &name, true).await
            }
            5 | 6 if !self.files.is_empty() => {
                let name = self.files[self.stage.below(self.files.len() as u64) as usize].clone();
                self.write_file(place, &name, false).await
            }
            7 if !self.files.is_empty() => {
                let at = self.stage.below(self.files.len() as u64) as usize;
                let name = self.files.swap_remove(at);
                self.uncertain(&name);
                let gone = self.wait(place, place.volume.unlink(&ROOT, Ino::ROOT, &named(&name))).await;
                ignore(gone, &[Errno::ENOENT])
            }
            8 if !self.files.is_empty() => self.rename(place).await,
            _ => self.odd(place).await,
        }
    }

    /// Writes a whole file, and makes it durable more often than not.
    async fn write_file(&mut self, place: &Place, name: &str, is_new: bool) -> Result<(), Trouble> {
        self.uncertain(name);
        let volume = &place.volume;
        let (ino, handle) = if is_new {
            let made = volume.create(&ROOT, Ino::ROOT, &named(name), 0o644, WRITE);
            let (attr, opened) = self.wait(place, made).await?;
            (attr.ino, opened.handle)
        } else {
            let attr = self.wait(place, volume.lookup(&ROOT, Ino::ROOT, &named(name))).await;
            let Ok(attr) = attr else { return ignore(attr.map(drop), &[Errno::ENOENT]) };
            let opened =
                self.wait(place, volume.open(&ROOT, attr.ino, OpenFlags { truncate: true, ..WRITE })).await?;
            (attr.ino, opened.handle)
        };
        let written = self.write_open(place, name, ino, handle).await;
        volume.release(ino, handle);
        written
    }

    async fn write_open(
        &mut self,
        place: &Place,
        name: &str,
        ino: Ino,
        handle: Handle,
    ) -> Result<(), Trouble> {
        let (content, length) = (self.stage.below(u64::MAX), self.length());
        let bytes: Bytes = Random::new(content).bytes(length).into();
        let mut offset = 0;
        for part in bytes.chunks(PART) {
            let part = bytes.slice_ref(part);
            let written = place.volume.write(&ROOT, ino, handle, offset, part);
            offset += u64::from(self.wait(place, written).await?);
        }
        if self.stage.below(10) < 4 {
            return Ok(());
        }
        let before = place.volume.state().position;
        self.wait(place, place.volume.fsync(ino, Some(handle))).await?;
        self.stage.acknowledged.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let tip = place.volume.durable();
        let Some(position) = self.acknowledged(place, &before) else { return Ok(()) };
        // A source that was replaced while the fsync waited acknowledges, with `local`, what came after that.
        let position = if self.level == Level::Local { tip } else { position };
        let certain = Certain { position, host: place.host, content, length };
        self.stage.judge(|judge, _| {
            judge.file(name, Some(certain));
            Ok(())
        });
        Ok(())
    }

    /// An fsync that began after `before` has returned.
    fn acknowledged(&self, place: &Place, before: &Position) -> Option<Position> {
        let tip = place.volume.durable();
        let position = self.stage.judge(|judge, _| {
            let found = judge.frame_of(before.lsn, tip.hash);
            found.ok_or_else(|| {
                format!(
                    "lost: an fsync returned at host {}, lsn {} is not durable there",
                    place.host, before.lsn
                )
            })
        })?;
        self.stage
            .note(format!("client {}: fsync at host {}, lsn {}", self.number, place.host, position.lsn));
        let (level, wanted) = (self.level, self.wanted);
        if level == Level::Mirror {
            self.stage.judge(|judge, _| judge.is_mirrored(wanted, place.host, &position))?;
            if wanted > 1 {
                self.stage.count("fsyncs that two mirrors acknowledged");
            }
        }
        self.stage.judge(|judge, now| judge.acknowledged(level, place.host, position, now))?;
        Some(position)
    }

    async fn rename(&mut self, place: &Place) -> Result<(), Trouble> {
        let at = self.stage.below(self.files.len() as u64) as usize;
        let from = self.files.swap_remove(at);
        let to = format!("c{}-{}", self.number, self.made);
        self.made += 1;
        self.uncertain(&from);
        self.files.push(to.clone());
        let (from, to) = (named(&from), named(&to));
        let moved = place.volume.rename(&ROOT, (Ino::ROOT, &from), (Ino::ROOT, &to), RenameMode::Replace);
        ignore(self.wait(place, moved).await, &[Errno::ENOENT])
    }

    /// Something that only the digests judge.
    async fn odd(&mut self, place: &Place) -> Result<(), Trouble> {
        let volume = &place.volume;
        let name = named(&format!("odd{}-{}", self.number, self.stage.below(6)));
        let expected =
            [Errno::EEXIST, Errno::ENOENT, Errno::ENOTEMPTY, Errno::EISDIR, Errno::ENOTDIR, Errno::EPERM];
        let done = match self.stage.below(7) {
            0 => self.wait(place, volume.mkdir(&ROOT, Ino::ROOT, &name, 0o755)).await.map(drop),
            1 => self.wait(place, volume.symlink(&ROOT, Ino::ROOT, &name, b"../else/where")).await.map(drop),
            2 => self.wait(place, volume.rmdir(&ROOT, Ino::ROOT, &name)).await,
            3 => self.wait(place, volume.unlink(&ROOT, Ino::ROOT, &name)).await,
            4 => {
                let mode = Some(0o600 + self.stage.below(64) as u16);
                let change = SetAttr { mode, ..SetAttr::default() };
                self.wait(place, volume.setattr(&ROOT, Ino::ROOT, None, change)).await.map(drop)
            }
            5 => {
                let value = Bytes::from(Random::new(self.stage.below(1000)).bytes(30));
                let attribute = XattrName::new(b"user.murphy".to_vec()).expect("a name of the user's");
                self.wait(place, volume.setxattr(&ROOT, Ino::ROOT, &attribute, value, XattrMode::Set)).await
            }
            _ => self.wait(place, volume.sync_all()).await,
        };
        ignore(done, &expected)
    }

    /// The answer, unless the node dies first.
    async fn wait<T>(&self, place: &Place, answer: Answer<T>) -> Result<T, Trouble> {
        let began = self.stage.now();
        let outcome = tokio::select! {
            answer = answer.wait() => answer.map_err(Trouble::Errno),
            () = place.gate.death() => Err(Trouble::Gone),
        };
        let took = self.stage.now().saturating_sub(began);
        if took > LONGEST && !place.gate.was_paused() {
            self.stage.violated(&format!("stall: a request of client {} took {took:?}", self.number));
        }
        outcome
    }

    fn uncertain(&self, name: &str) {
        self.stage.judge(|judge, _| {
            judge.file(name, None);
            Ok(())
        });
    }

    fn length(&self) -> usize {
        let most = match self.stage.below(20) {
            0 => 300_000,
            1..=4 => 20_000,
            _ => 900,
        };
        self.stage.below(most) as usize
    }
}

fn ignore(outcome: Result<(), Trouble>, expected: &[Errno]) -> Result<(), Trouble> {
    match outcome {
        Err(Trouble::Errno(errno)) if expected.contains(&errno) => Ok(()),
        other => other,
    }
}

/// Reads a file that must be there and compares it.
pub(super) async fn compare(volume: &Volume, name: &str, certain: &Certain) -> Result<(), String> {
    let failed = |what: &str, errno: Errno| format!("lost: {name} cannot be {what}: {errno:?}");
    let attr = volume.lookup(&ROOT, Ino::ROOT, &named(name)).wait().await;
    let attr = attr.map_err(|errno| failed("found", errno))?;
    if attr.size != certain.length as u64 {
        return Err(format!("lost: {name} has {} bytes, {} were acknowledged", attr.size, certain.length));
    }
    let read = OpenFlags { read: true, ..OpenFlags::default() };
    let opened = volume.open(&ROOT, attr.ino, read).wait().await.map_err(|errno| failed("opened", errno))?;
    let length = u32::try_from(certain.length).map_err(|_| "a file is too long".to_owned())?;
    let bytes = volume.read(attr.ino, opened.handle, 0, length).wait().await;
    volume.release(attr.ino, opened.handle);
    let bytes = bytes.map_err(|errno| failed("read", errno))?;
    if bytes != Random::new(certain.content).bytes(certain.length) {
        return Err(format!("lost: {name} has other bytes than were acknowledged"));
    }
    Ok(())
}

/// The bug: a byte of a file becomes another one.
pub(super) async fn change_a_byte(volume: &Volume, name: &str) {
    let Ok(attr) = volume.lookup(&ROOT, Ino::ROOT, &named(name)).wait().await else { return };
    let Ok(opened) = volume.open(&ROOT, attr.ino, WRITE).wait().await else { return };
    let other = volume.read(attr.ino, opened.handle, 0, 1).wait().await;
    let other = other.ok().and_then(|bytes| bytes.first().map(|byte| byte ^ 1)).unwrap_or_default();
    // The judge says what came of it.
    let _judged = volume.write(&ROOT, attr.ino, opened.handle, 0, Bytes::from(vec![other])).wait().await;
    volume.release(attr.ino, opened.handle);
}

fn named(name: &str) -> Name {
    Name::new(name.as_bytes().to_vec()).expect("a client's names are names")
}

const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 1 };
const WRITE: OpenFlags = OpenFlags { read: true, write: true, append: false, truncate: false, sync: false };
/// Files are written in parts of so many bytes.
const PART: usize = 64 << 10;
/// No request takes longer: flushing and waiting for copies have the longest time of a request each, one after the other.
const LONGEST: Duration = Duration::from_secs(3 * 60 + 10);
