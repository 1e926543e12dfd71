//! Scans of directories that change meanwhile.
//!
//! Invariants:
//! - An entry that is there during the whole scan is seen exactly once; what was never there is never seen. About entries that
//!   come or go meanwhile nothing is promised.

use std::collections::BTreeSet;

use murphy_fs::{Ino, Name};

use super::contest::{Contest, Side, Twin, Verdict};

/// A scan under way on both sides.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) directory: Twin,
    /// Names with the reference's inodes.
    always: BTreeSet<(Name, Ino)>,
    ever: BTreeSet<Name>,
    progress: [Progress; 2],
}

/// How far one side is.
#[derive(Default, Debug)]
struct Progress {
    cookie: u64,
    seen: Vec<Name>,
    done: bool,
}

impl Contest<'_> {
    pub(super) fn begin_scan(&mut self, directory: u16) -> Verdict {
        if self.scans.len() == SCANS_MAX {
            return Ok(());
        }
        let directory = self.directory(directory);
        let always = self.names_now(directory)?;
        let ever = always.iter().map(|(name, _)| name.clone()).collect();
        let progress = [Progress::default(), Progress::default()];
        self.scans.push(Scan { directory, always, ever, progress });
        Ok(())
    }

    pub(super) fn go_on_scanning(&mut self, scan: u16, page: u8) -> Verdict {
        if self.scans.is_empty() {
            return Ok(());
        }
        let number = usize::from(scan) % self.scans.len();
        for (index, side) in Side::BOTH.into_iter().enumerate() {
            let scan = &self.scans[number];
            let from = scan.progress[index].cookie;
            if scan.progress[index].done {
                continue;
            }
            let call = self.side(side).readdir(scan.directory.on(side), from, usize::from(page));
            let read =
                self.driver.wait(call).map_err(|errno| format!("{side:?}: readdir fails with {errno}"))?;
            let progress = &mut self.scans[number].progress[index];
            progress.done = read.is_empty();
            for entry in read {
                if entry.cookie <= progress.cookie {
                    return Err(format!("{side:?}: cookie {} after {}", entry.cookie, progress.cookie));
                }
                progress.cookie = entry.cookie;
                progress.seen.push(entry.name);
            }
        }
        if self.scans[number].progress.iter().all(|progress| progress.done) {
            self.scans.swap_remove(number).judge()?;
        }
        Ok(())
    }

    /// Notes what came and went in the scanned directories.
    pub(super) fn watch_scans(&mut self) -> Verdict {
        for number in 0..self.scans.len() {
            let now = self.names_now(self.scans[number].directory)?;
            let scan = &mut self.scans[number];
            scan.always.retain(|entry| now.contains(entry));
            scan.ever.extend(now.into_iter().map(|(name, _)| name));
        }
        Ok(())
    }

    fn names_now(&self, directory: Twin) -> Verdict<BTreeSet<(Name, Ino)>> {
        let entries = self.list(Side::Reference, directory, LIST_ENTRIES)?;
        Ok(entries.into_iter().map(|(name, entry)| (name, entry.attr.ino)).collect())
    }
}

impl Scan {
    fn judge(&self) -> Verdict {
        for (progress, side) in self.progress.iter().zip(Side::BOTH) {
            if let Some(name) = progress.seen.iter().find(|name| !self.ever.contains(*name)) {
                return Err(format!("{side:?}: a scan saw {name:?}, which was never there"));
            }
            for (name, _) in &self.always {
                let times = progress.seen.iter().filter(|seen| *seen == name).count();
                if times != 1 {
                    return Err(format!(
                        "{side:?}: a scan saw {name:?} {times} times, which was always there"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Scans at once.
const SCANS_MAX: usize = 3;
/// Entries read in one call.
const LIST_ENTRIES: usize = 1000;
