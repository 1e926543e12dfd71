//! What a mirror takes back of what it has lost, from whom, and how far.

use std::sync::Mutex;

use futures::future::BoxFuture;
use murphy_log::{Appender, BranchId, Digest, Entry, EpochId, LogTime, State, Usage, VolumeId};
use tokio::runtime::Runtime;

use super::*;

/// A history: runs of entries, each in an epoch; entries differ by the number in front.
type History<'a> = (u64, &'a [(u32, std::ops::RangeInclusive<u64>)]);

fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
}

fn frames((salt, runs): History<'_>) -> Vec<Frame> {
    let (mut state, mut frames) = (State::origin(epoch(1)), Vec::new());
    for (number, lsns) in runs {
        let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
        let mut appender = Appender::new(keys, epoch(*number), state);
        for lsn in lsns.clone() {
            // What comes first in epoch 1 is common to all.
            let own = salt * 100 + u64::from(*number) * 1000;
            let time = LogTime::from_nanos(lsn + if lsn > COMMON || *number > 1 { own } else { 0 });
            appender.push(&Entry::tick(Lsn::new(lsn), time), Digest(0), Usage::default()).unwrap();
            frames.extend(appender.close(time, Lsn::ROOT));
        }
        state = appender.state();
    }
    frames
}

/// Somebody who holds these frames.
struct Holder {
    frames: Vec<Frame>,
    asked: Arc<Mutex<u32>>,
    is_silent: bool,
}

impl Giver for Holder {
    fn name(&self) -> String {
        "somebody".to_owned()
    }

    fn frames(&self, after: Position) -> BoxFuture<'_, Result<Vec<Frame>, NotGiven>> {
        *self.asked.lock().unwrap() += 1;
        if self.is_silent {
            let error = CliError::new("no answer");
            return Box::pin(async { Err(NotGiven { error, is_silent: true }) });
        }
        let next = self.frames.iter().position(|frame| frame.header().follows(&after).is_ok());
        let some = next.map(|next| self.frames[next..].iter().take(3).cloned().collect());
        Box::pin(async { Ok(some.unwrap_or_default()) })
    }

    fn give_back(&self, _: Arc<DiskLog>, _: Epoch) -> BoxFuture<'_, Result<(), CliError>> {
        Box::pin(async { Ok(()) })
    }
}

/// A mirror whose log ends with the common entries, and which is known to have held `KNOWN`.
struct Scene {
    folder: tempfile::TempDir,
    config: NodeConfig,
    runtime: Runtime,
    log: DiskLog,
}

impl Scene {
    fn new() -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
        let config = NodeConfig {
            role: Role::Mirror,
            ..NodeConfig::new(volume, branch, "v".to_owned(), "file:///x".parse().unwrap())
        };
        let options = DiskOptions::new(folder.path().join("log"), volume, branch);
        let log = DiskLog::create(options, State::origin(epoch(1))).unwrap();
        for frame in frames((0, &[(1, 2..=COMMON)])) {
            append_copy(&log, frame).unwrap();
        }
        log.durable().wait_blocking(Lsn::new(COMMON), DURABLE_MAX).unwrap();
        Scene { folder, config, runtime: Runtime::new().unwrap(), log }
    }

    /// Takes back what was lost up to `KNOWN`, of a history of epoch 1, from holders of these; one more is out of reach.
    fn take_back(&self, held: &[History<'_>]) -> Result<Position, CliError> {
        self.take_back_of(WHOLE, KNOWN, held)
    }

    /// The same of another history, up to `known`.
    fn take_back_of(
        &self,
        whole: History<'_>,
        known: u64,
        held: &[History<'_>],
    ) -> Result<Position, CliError> {
        let known = frames(whole).iter().find(|frame| frame.last() == Lsn::new(known)).unwrap().position();
        let mut asked = Asked::new(self.folder.path(), &self.config, self.runtime.handle());
        let holder = |held: &History<'_>| {
            let (frames, asked) = (frames(*held), Arc::default());
            Box::new(Holder { frames, asked, is_silent: false }) as Box<dyn Giver>
        };
        let silent_asked = Arc::new(Mutex::new(0));
        let silent = Holder { frames: Vec::new(), asked: Arc::clone(&silent_asked), is_silent: true };
        let all = [Box::new(silent) as Box<dyn Giver>].into_iter().chain(held.iter().map(holder));
        asked.givers = Some(all.collect());
        let lost = given_to_mirror(self.folder.path(), &self.log, known, &mut asked);
        let taken = lost.and_then(|lost| take_back(&self.log, &lost, &mut asked));
        assert_eq!(*silent_asked.lock().unwrap(), 1, "whoever is not reached is asked once");
        taken.map(|()| self.log.durable().state().position)
    }
}

/// The fear: a mirror comes back with less than it has acknowledged, with more than it ever held, or in another history.
#[test]
fn a_mirror_takes_back_what_it_held_and_nothing_else() {
    let expected = frames(WHOLE)[KNOWN as usize - 2].position();
    for held in [
        &[WHOLE][..],
        &[OTHER, WHOLE],
        &[WHOLE, OTHER],
        &[LATER, OTHER, WHOLE],
        &[OTHER, SHORT, LATER, WHOLE],
        &[SHORT, WHOLE],
        &[LATER_EPOCH_BEHIND],
        &[OTHER, LATER_EPOCH_BEHIND],
    ] {
        assert_eq!(Scene::new().take_back(held), Ok(expected), "{held:?}");
    }
    for held in [&[][..], &[SHORT], &[OTHER], &[SHORT, OTHER]] {
        let scene = Scene::new();
        let refused = scene.take_back(held).unwrap_err().to_string();
        assert!(refused.contains("no answer") && refused.contains("nobody who answers"), "{refused}");
        assert_eq!(scene.log.tail().position.lsn, Lsn::new(COMMON), "{held:?}: nothing was taken");
    }
}

/// The fear: whoever answers first holds more of an epoch that was left before what is known, and is followed to its end.
#[test]
fn a_mirror_takes_back_what_it_held_of_a_later_epoch_whoever_answers_first() {
    let left: History<'_> = (1, &[(1, 2..=17)]);
    let whole: History<'_> = (1, &[(1, 2..=14), (2, 15..=20)]);
    for known in [15, 16, 18, 20] {
        let expected = frames(whole)[known as usize - 2].position();
        for held in [&[left, whole][..], &[whole, left], &[left, SHORT, whole], &[LATER, left, OTHER, whole]]
        {
            assert_eq!(Scene::new().take_back_of(whole, known, held), Ok(expected), "{known} of {held:?}");
        }
        for held in [&[left][..], &[left, OTHER], &[LATER]] {
            let scene = Scene::new();
            scene.take_back_of(whole, known, held).unwrap_err();
            assert_eq!(scene.log.tail().position.lsn, Lsn::new(COMMON), "{held:?}: nothing was taken");
        }
    }
}

/// The fear: a mirror that has lost the end of a history which lost itself is never opened again; or it goes over to an epoch that it has
/// promised not to.
#[test]
fn what_is_lost_of_a_history_that_a_later_epoch_has_left_is_not_waited_for() {
    let begins = frames(LATER).iter().find(|frame| frame.epoch() == epoch(2)).unwrap().position();
    // Who holds more of the old history, and answers first, leads nobody past where it was left.
    for held in [&[LATER][..], &[SHORT, LATER], &[LONGER, LATER], &[LATER, LONGER], &[LONGER, SHORT, LATER]] {
        assert_eq!(Scene::new().take_back(held), Ok(begins), "{held:?}");
    }
    for (promised, is_refused) in [(epoch(2), false), (epoch(3), true)] {
        let scene = Scene::new();
        promise::save(scene.folder.path(), promised).unwrap();
        let taken = scene.take_back(&[LATER]);
        assert_eq!(taken.is_err(), is_refused, "{taken:?}");
        assert_eq!(scene.log.tail().position.lsn == Lsn::new(COMMON), is_refused);
    }
}

/// The fear: a mirror has lost the end of a history that a later epoch had left before what can still be read, and nobody says what to do with it.
#[test]
fn a_mirror_whose_history_was_left_before_what_it_can_read_is_told_to_join_anew() {
    let left_before: History<'_> = (1, &[(1, 2..=6), (2, 7..=20)]);
    let scene = Scene::new();
    let refused = scene.take_back(&[left_before]).unwrap_err();
    assert_eq!(scene.log.tail().position.lsn, Lsn::new(COMMON), "nothing was changed");
    let known = frames(WHOLE)[KNOWN as usize - 2].position();
    let told = with_way_out(&scene.config, ahead_of(&scene.log, &known)).because(&refused);
    let text = format!("{told} {told:?}");
    for part in ["nobody who answers", "murphy join NEW-DIR", "murphy dump DIR FILE"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
}

/// The fear: a mirror is not opened as long as an archive answers that was sealed in the middle of what is damaged, though a member has it all.
#[test]
fn what_is_damaged_comes_from_whoever_has_that_epoch() {
    for held in [
        &[LATER, WHOLE][..],
        &[LATER, SHORT, WHOLE],
        &[SHORT, LATER, WHOLE],
        &[OTHER, WHOLE],
        &[OTHER, LATER, OTHER, SHORT, WHOLE],
    ] {
        let Scene { folder, config, runtime, log } = Scene::new();
        let whole = frames(WHOLE);
        for frame in &whole[COMMON as usize - 1..] {
            append_copy(&log, frame.clone()).unwrap();
            log.durable().wait_blocking(frame.last(), DURABLE_MAX).unwrap();
        }
        let end = log.tail().position;
        drop(log);
        let files = std::fs::read_dir(folder.path().join("log")).unwrap().map(|file| file.unwrap().path());
        let offset = |bytes: &[u8], frame: &Frame| {
            bytes.windows(frame.bytes().len()).position(|some| some == frame.bytes())
        };
        let mut read = files.filter_map(|path| Some((std::fs::read(&path).ok()?, path)));
        let found = read.find(|(bytes, _)| offset(bytes, &whole[COMMON as usize]).is_some());
        let (mut bytes, segment) = found.unwrap();
        for frame in &whole[COMMON as usize..KNOWN as usize] {
            let at = offset(&bytes, frame).unwrap();
            bytes[at + 20] ^= 1;
        }
        std::fs::write(&segment, bytes).unwrap();
        let mut asked = Asked::new(folder.path(), &config, runtime.handle());
        let holder = |held: &History<'_>| {
            let (frames, asked) = (frames(*held), Arc::default());
            Box::new(Holder { frames, asked, is_silent: false }) as Box<dyn Giver>
        };
        asked.givers = Some(held.iter().map(holder).collect());
        let options = log_options(folder.path(), &config);
        let (mended, lost) = mended(folder.path(), &config, (&options, None), &mut asked).unwrap();
        assert!(lost.is_none(), "{held:?}");
        assert_eq!(mended.tail().position, end, "{held:?}");
    }
}

/// The fear: `status` says for ever that a log is damaged which was mended, or found to be whole.
#[test]
fn what_a_scrub_found_in_a_log_is_forgotten_once_all_of_it_was_read() {
    let Scene { folder, config, runtime, log } = Scene::new();
    drop(log);
    let open = || drop(open(folder.path(), &config, runtime.handle()).unwrap());
    let note = |log: Option<&str>, index: Option<&str>| {
        let (log, index) = (log.map(str::to_owned), index.map(str::to_owned));
        scrub_notes::ScrubNote { lsn: 9, ended: 1, took_ms: 1, log, index }
    };
    for (found, left) in [
        (note(Some("damaged"), None), None),
        (note(Some("damaged"), Some("differs")), Some(note(None, Some("differs")))),
        (note(None, None), Some(note(None, None))),
    ] {
        scrub_notes::save(folder.path(), &found).unwrap();
        open();
        assert_eq!(scrub_notes::load(folder.path()), left, "{found:?}");
    }
}

const COMMON: u64 = 9;
const KNOWN: u64 = 15;
const WHOLE: History<'_> = (1, &[(1, 2..=20)]);
/// Ends before.
const SHORT: History<'_> = (1, &[(1, 2..=12)]);
/// Ends before too, behind where a later epoch has begun.
const LONGER: History<'_> = (1, &[(1, 2..=14)]);
/// Another one of the same epoch.
const OTHER: History<'_> = (2, &[(1, 2..=20)]);
/// A later epoch has begun before.
const LATER: History<'_> = (1, &[(1, 2..=12), (2, 13..=20)]);
const LATER_EPOCH_BEHIND: History<'_> = (1, &[(1, 2..=17), (2, 18..=20)]);
