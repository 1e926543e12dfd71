//! A node whose log is damaged, or has lost its end: what archives, mirrors and the source hold is fetched before the node decides, follows or
//! promises anything.
//!
//! Invariants:
//! - Only entries that continue the log, verified on the chain, are appended: at a source those of its own epoch, and a successor stops it; at a
//!   mirror, which may have followed others since, those that lead to what it is known to have held, and nothing behind that; if a later epoch
//!   has left that history, those that lead there.
//! - A log that still ends below what is known to have been durable is not used.
//! - What is damaged at its end is cut only once somebody was found who gives back what is known to have been there.

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use murphy_log::{
    Access, DiskLog, DiskOptions, Epoch, Frame, Log, Lsn, OpenError, Position, RepairError, Scrub,
    VolumeKeys, append_copy,
};
use murphy_mirror::{Lookup, Point, check_append, look_up};
use tokio::runtime::Handle;

use super::{
    base::{base_file, base_state},
    index::{ahead_of, known_to_index},
    index_directory,
    open::{log_options, open_log_for},
};
use crate::{
    archive_notes::known_durable,
    config::{NodeConfig, Role},
    error::{CliError, failed},
    givers::{Giver, Ground, NotGiven, givers_of},
    mirror_notes, promise, scrub_notes,
};

/// Opens the log of the node in `directory`, to be gone on with. What is damaged in it, and what its end lacks of what is known to have been
/// durable, comes from others first. All that its index has to be brought up with is whole then.
pub(crate) fn open(directory: &Path, config: &NodeConfig, runtime: &Handle) -> Result<DiskLog, CliError> {
    let reads_all = log_options(directory, config).scrub == Scrub::Everything;
    let log = open_whole(directory, config, runtime)?;
    if reads_all {
        scrub_notes::forget_log(directory)?;
    }
    Ok(log)
}

fn open_whole(directory: &Path, config: &NodeConfig, runtime: &Handle) -> Result<DiskLog, CliError> {
    // What is not whole at its end is cut only once others were asked.
    let log = match open_log_for(directory, config, Access::WriteWhole) {
        Err(refused) if refused.is_damage() => return reopen(directory, config, refused, runtime),
        opened => opened?,
    };
    // A source asks the others for more than its index knows of, once that is open.
    let known = match config.role {
        Role::Mirror => known_to_index(directory, &log, &VolumeKeys::derive(config.volume)),
        Role::Source => None,
    };
    let Some(known) = known else { return Ok(log) };
    let mut asked = Asked::new(directory, config, runtime);
    let lost = given_to_mirror(directory, &log, known, &mut asked);
    let taken = lost.and_then(|lost| take_back(&log, &lost, &mut asked));
    taken.map_err(|error| with_way_out(config, ahead_of(&log, &known)).because(&error))?;
    Ok(log)
}

/// What was refused, of a mirror with what people can do with a damaged one: it follows again with all that it held, or as another member. One
/// that came back with less would be asked what it has acknowledged, and would not know.
pub(super) fn with_way_out(config: &NodeConfig, refused: CliError) -> CliError {
    if config.role == Role::Source || !refused.is_damage() {
        return refused;
    }
    refused.hint(format!(
        "bring an archive, a member or the source that has these entries within reach (murphy serve --listen ADDR there) and start this mirror again: they \
         are fetched. If nobody has them: murphy join NEW-DIR --token-file FILE --blocks '{}', with a token of murphy invite at the source, makes a mirror anew \
         and copies no pack again (keep this directory if they lie in it); murphy member remove takes the old one out. Without a source: murphy promote at another \
         mirror, or murphy restore URL DIR --take-over; or, of the tree as the index here has it, murphy dump DIR FILE and murphy load FILE NEW-DIR",
        config.blocks
    ))
}

/// Opens a log that was refused as damaged or torn: frames that are damaged or missing in it, and an end that a note or the index vouches
/// for, come from others. `refused` is returned if nobody has them.
fn reopen(
    directory: &Path,
    config: &NodeConfig,
    refused: CliError,
    runtime: &Handle,
) -> Result<DiskLog, CliError> {
    let noted = known_durable(directory)?;
    let plain = log_options(directory, config);
    let vouched = DiskOptions { known_durable: noted, access: Access::Read, ..plain.clone() };
    if matches!(DiskLog::open(vouched), Err(OpenError::Diverged { .. })) {
        return Err(who_differs(directory, refused, noted));
    }
    let mut asked = Asked::new(directory, config, runtime);
    let (log, lost) = match mended(directory, config, (&plain, noted), &mut asked) {
        Ok((log, lost)) => (Arc::new(log), lost),
        Err(error) => return Err(why_refused(directory, refused, &error, None)),
    };
    if let Some(lost) = lost {
        let known = lost.known;
        let fetched = match config.role {
            Role::Source => fetch(directory, config, &log, known.lsn, runtime),
            Role::Mirror => take_back(&log, &lost, &mut asked),
        };
        fetched.map_err(|error| {
            why_refused(directory, refused.clone(), &error, Some(log.tail().position.lsn))
        })?;
        let point = Point { lsn: known.lsn, hash: known.hash };
        if !lost.is_superseded && look_up(&*log, known.lsn).map_err(failed)? != Lookup::End(point) {
            return Err(who_differs(directory, refused, noted));
        }
    }
    Arc::into_inner(log).ok_or_else(|| CliError::new("the log is in use"))
}

/// What is known to have been durable, and the ends of the frames that are missing.
struct Lost {
    known: Position,
    ends: Vec<Position>,
    /// A later epoch goes on without all that is known: the last one of the frames is its first.
    is_superseded: bool,
}

/// Those who may have what is missing; found out when the first of them is asked.
struct Asked<'a> {
    directory: &'a Path,
    config: &'a NodeConfig,
    runtime: &'a Handle,
    givers: Option<Vec<Box<dyn Giver>>>,
    /// What is said of those who were not reached, who are not asked again.
    silent: Vec<String>,
}

impl<'a> Asked<'a> {
    fn new(directory: &'a Path, config: &'a NodeConfig, runtime: &'a Handle) -> Asked<'a> {
        Asked { directory, config, runtime, givers: None, silent: Vec::new() }
    }

    /// Frames that follow `after`, from the first whose are wanted.
    fn frames(
        &mut self,
        after: Position,
        is_wanted: &dyn Fn(&[Frame]) -> bool,
    ) -> Result<Vec<Frame>, String> {
        let mut answers = self.answers(after, is_wanted)?;
        if let Some((_, frames)) = answers.frames.pop_if(|(_, frames)| is_wanted(frames)) {
            return Ok(frames);
        }
        Err(self.nobody(&answers))
    }

    /// Asks whoever was asked first last from now on; false if each of them was the first of so many tries.
    fn ask_next_first(&mut self, tried: usize) -> bool {
        let Some(givers) = &mut self.givers else { return false };
        let is_new = tried < givers.len();
        if is_new {
            givers.rotate_left(1);
        }
        is_new
    }

    /// What is said where `answers` are not what is wanted.
    fn nobody(&self, answers: &Answers) -> String {
        let mut why = vec!["nobody who answers has them".to_owned()];
        why.extend(answers.frames.iter().map(|(name, _)| format!("{name} holds another history")));
        why.extend(answers.errors.iter().chain(&self.silent).cloned());
        why.join("; ")
    }

    /// The ends of the frames that lead from `at` to `known`. Where others hold different ones, one way after the other is tried: who answers
    /// first may hold what was left, and end before `known`.
    fn way(&mut self, mut at: Position, known: &Position) -> Result<Vec<Position>, String> {
        let (mut ends, mut tried) = (Vec::new(), HashSet::new());
        // Ways to go on, the best one last: behind how many of `ends`, and with what.
        let mut ways: Vec<(usize, Vec<Position>)> = Vec::new();
        let mut first_refusal = None;
        while at.lsn < known.lsn {
            if tried.insert(at) {
                let reaches = |frames: &[Frame]| leading(known, frames).last() == Some(known);
                let answers = self.answers(at, &reaches)?;
                let mut next: Vec<_> =
                    answers.frames.iter().map(|(_, frames)| leading(known, frames)).collect();
                next.retain(|ends| !ends.is_empty());
                next.sort_by_key(|ends| ends.last().map(|end| (end == known, end.epoch.number, end.lsn)));
                if next.is_empty() {
                    let why = self.nobody(&answers);
                    first_refusal.get_or_insert(format!("what comes behind lsn {}: {why}", at.lsn));
                }
                ways.extend(next.into_iter().map(|next| (ends.len(), next)));
            }
            let Some((kept, next)) = ways.pop() else {
                return Err(first_refusal.unwrap_or_default());
            };
            ends.truncate(kept);
            ends.extend(next);
            at = ends.last().copied().unwrap_or(at);
        }
        Ok(ends)
    }

    /// Frames that follow `after`, of the history with the latest epochs that anybody holds; none if nobody holds any.
    fn latest_frames(&mut self, after: Position) -> Result<Vec<Frame>, String> {
        let answers = self.answers(after, &|_| false)?;
        Ok(latest(answers.frames.into_iter().map(|(_, frames)| frames).collect()))
    }

    /// What one giver after the other holds behind `after`, until that `is_enough` of one.
    fn answers(&mut self, after: Position, is_enough: &dyn Fn(&[Frame]) -> bool) -> Result<Answers, String> {
        let givers = match &mut self.givers {
            Some(givers) => givers,
            None => {
                let ground = ground(self.directory, self.config);
                let givers = givers_of(self.directory, self.config, &ground);
                self.givers.insert(givers.map_err(|error| error.to_string())?)
            }
        };
        let mut answers = Answers::default();
        let mut asked = 0;
        while let Some(giver) = givers.get(asked) {
            asked += 1;
            match self.runtime.block_on(giver.frames(after)) {
                Ok(frames) if frames.is_empty() => {}
                Ok(frames) => {
                    let is_last = is_enough(&frames);
                    answers.frames.push((giver.name(), frames));
                    if is_last {
                        break;
                    }
                }
                Err(NotGiven { error, is_silent: true }) => {
                    self.silent.push(error.to_string());
                    asked -= 1;
                    givers.remove(asked);
                }
                Err(NotGiven { error, .. }) => answers.errors.push(error.to_string()),
            }
        }
        Ok(answers)
    }
}

/// What givers hold behind a position.
#[derive(Default)]
struct Answers {
    /// Frames, at least one, and the name of who has them.
    frames: Vec<(String, Vec<Frame>)>,
    errors: Vec<String>,
}

/// The frames of `answers`, each of which has some, as far as they are known of all that share them; where they part, it goes on with the latest
/// epoch. Whoever holds more of a history that was left does not lead past the place where it was.
fn latest(mut answers: Vec<Vec<Frame>>) -> Vec<Frame> {
    let mut common: Vec<Frame> = Vec::new();
    loop {
        let next: Option<Vec<&Frame>> = answers.iter().map(|frames| frames.get(common.len())).collect();
        let newest = next.and_then(|next| next.into_iter().max_by_key(|frame| frame.epoch().number).cloned());
        let Some(newest) = newest else { return common };
        let (at, end) = (common.len(), newest.position());
        answers.retain(|frames| frames[at].position() == end);
        common.push(newest);
    }
}

/// The ends of those of `frames` that can be of a history that has `known`: none of a later epoch, none that contradicts it, and none behind it. Whoever
/// took over from the source of that may have begun before it.
fn leading(known: &Position, frames: &[Frame]) -> Vec<Position> {
    let ends = frames.iter().map(Frame::position);
    let leads = |end: &Position| {
        end.epoch.number <= known.epoch.number
            && (end.lsn < known.lsn || (end.lsn, end.hash) == (known.lsn, known.hash))
    };
    ends.take_while(leads).collect()
}

/// What a note about the mirrors says is told, unless the log reached it at `end`.
fn why_refused(directory: &Path, refused: CliError, error: &CliError, end: Option<Lsn>) -> CliError {
    let refused = refused.because(error);
    match mirror_notes::load(directory) {
        Some(note) if end.is_none_or(|end| note.position.lsn > end) => refused.because(&note.told()),
        _ => refused,
    }
}

/// A log that differs from what is `noted` to have been durable: which mirror that is noted of, if it is one.
fn who_differs(directory: &Path, refused: CliError, noted: Option<Position>) -> CliError {
    match mirror_notes::load(directory) {
        Some(note) if Some(note.position) == noted => refused.because(&note.told()),
        _ => refused,
    }
}

/// Opens the log, one damaged segment after the other mended, and says what of its end was lost. An end that is torn is cut only when somebody
/// was found who has everything that is known to come then.
fn mended(
    directory: &Path,
    config: &NodeConfig,
    (options, noted): (&DiskOptions, Option<Position>),
    asked: &mut Asked<'_>,
) -> Result<(DiskLog, Option<Lost>), CliError> {
    for _ in 0..MENDED_MAX {
        let segment = match DiskLog::open(DiskOptions { access: Access::Read, ..options.clone() }) {
            Ok(look) => {
                let indexed = known_to_index(directory, &look, &VolumeKeys::derive(config.volume));
                let known = noted.into_iter().chain(indexed).max_by_key(|position| position.lsn);
                let lost = known.map(|known| {
                    let missing = |error| {
                        CliError::new(format!("lsn {} is known to have been durable: {error}", known.lsn))
                    };
                    let own = look.recovery().epoch;
                    match config.role {
                        Role::Mirror => given_to_mirror(directory, &look, known, asked),
                        Role::Source => {
                            given(&look, &known, own, &mut |after| asked.frames(after, &|_| true))
                                .map(|ends| Lost { known, ends, is_superseded: false })
                        }
                    }
                    .map_err(missing)
                });
                let lost = lost.transpose()?;
                drop(look);
                return Ok((DiskLog::open(options.clone()).map_err(failed)?, lost));
            }
            Err(OpenError::DamagedMiddle { segment, .. } | OpenError::Header { path: segment, .. }) => {
                segment
            }
            Err(error) => return Err(failed(error)),
        };
        let (mut tried, base) = (0, base_state(directory));
        while let Err(error) = DiskLog::repair(options, &segment, base, &mut |after, epoch| {
            asked.frames(after, &|frames| frames.first().is_some_and(|frame| frame.epoch() == epoch))
        }) {
            // Whoever is asked first may hold another history of that epoch.
            tried += 1;
            if !matches!(error, RepairError::Other { .. }) || !asked.ask_next_first(tried) {
                return Err(failed(error));
            }
        }
        tracing::warn!("{} was damaged, and was mended", segment.display());
    }
    Err(CliError::new(format!("more than {MENDED_MAX} segments are damaged")))
}

/// The ends of the frames behind the end of `log`, up to `known`, which somebody has; none if the log reaches it. What is read for that is not
/// kept. Only frames of the `own` epoch count.
fn given(
    log: &DiskLog,
    known: &Position,
    own: Epoch,
    fetch: &mut dyn FnMut(Position) -> Result<Vec<Frame>, String>,
) -> Result<Vec<Position>, CliError> {
    let (mut at, mut ends) = (log.tail().position, Vec::new());
    while at.lsn < known.lsn {
        let behind = |why: String| CliError::new(format!("what comes behind lsn {}: {why}", at.lsn));
        let frames = fetch(at).map_err(behind)?;
        if let Some(other) = frames.iter().find(|frame| frame.epoch() != own) {
            return Err(behind(format!(
                "lsn {} is of epoch {}, not of this node's",
                other.first(),
                other.epoch()
            )));
        }
        ends.extend(frames.iter().map(Frame::position).take_while(|end| end.lsn <= known.lsn));
        at = frames.last().map_or(at, Frame::position);
    }
    match ends.last() {
        Some(last) if (last.lsn, last.hash) != (known.lsn, known.hash) => Err(CliError::new(format!(
            "whoever has what comes behind lsn {} holds another lsn {}",
            log.tail().position.lsn,
            known.lsn
        ))),
        _ => Ok(ends),
    }
}

/// What a mirror's log has lost up to `known`, and somebody has; or, if nobody does, up to where a later epoch has left that history. What a
/// mirror holds it keeps until a later epoch has decided.
fn given_to_mirror(
    directory: &Path,
    log: &DiskLog,
    known: Position,
    asked: &mut Asked<'_>,
) -> Result<Lost, CliError> {
    let nobody = match asked.way(log.tail().position, &known) {
        Ok(ends) => return Ok(Lost { known, ends, is_superseded: false }),
        Err(nobody) => CliError::new(nobody),
    };
    let promised = promise::load(directory)?;
    let (mut at, mut ends) = (log.tail().position, Vec::new());
    while at.lsn < known.lsn {
        let frames = asked.latest_frames(at).map_err(|error| nobody.clone().because(&failed(error)))?;
        if frames.is_empty() {
            return Err(nobody);
        }
        for frame in frames {
            at = frame.position();
            ends.push(at);
            if frame.epoch().number > known.epoch.number {
                check_append(promised, frame.epoch(), None)
                    .map_err(|error| nobody.clone().because(&failed(error)))?;
                return Ok(Lost { known, ends, is_superseded: true });
            }
        }
    }
    Err(nobody)
}

/// Appends to `log`, which nobody leads, what is lost and was found to be given, and nothing else; durable when it returns.
fn take_back(log: &DiskLog, lost: &Lost, asked: &mut Asked<'_>) -> Result<(), CliError> {
    let Lost { known, ends, is_superseded } = lost;
    let began = log.tail().position.lsn;
    let mut missing = ends.iter().peekable();
    while let Some(next) = missing.peek().copied() {
        let at = log.tail().position;
        let behind = |why: String| CliError::new(format!("what comes behind lsn {}: {why}", at.lsn));
        let is_next = |frames: &[Frame]| frames.first().is_some_and(|frame| frame.position() == *next);
        for frame in asked.frames(at, &is_next).map_err(behind)? {
            // It may go on with another history than what was found.
            if missing.next_if(|end| **end == frame.position()).is_none() {
                break;
            }
            append_copy(log, frame).map_err(failed)?;
        }
    }
    let end = log.tail().position.lsn;
    log.durable().wait_blocking(end, DURABLE_MAX).map_err(failed)?;
    if end > began {
        tracing::warn!("lsn {} to {end} were lost here, and came back from elsewhere", began.next());
    }
    if *is_superseded {
        let (own, epoch) = (known.epoch.number, log.tail().position.epoch.number);
        tracing::warn!(
            "up to lsn {} of epoch {own} were lost here; epoch {epoch} goes on without them",
            known.lsn
        );
    }
    Ok(())
}

/// Appends to `log`, which nobody leads yet, what archives and mirrors hold beyond it; fails if it does not reach `wanted` then.
pub(super) fn fetch(
    directory: &Path,
    config: &NodeConfig,
    log: &Arc<DiskLog>,
    wanted: Lsn,
    runtime: &Handle,
) -> Result<(), CliError> {
    let givers = givers_of(directory, config, &ground(directory, config))?;
    fetch_from(log, &givers, wanted, runtime)
}

fn ground(directory: &Path, config: &NodeConfig) -> Ground {
    let (index, base) = (index_directory(directory), base_file(directory));
    Ground { index, base, log: log_options(directory, config) }
}

/// The same from these, each as far as it answers.
pub(super) fn fetch_from(
    log: &Arc<DiskLog>,
    givers: &[Box<dyn Giver>],
    wanted: Lsn,
    runtime: &Handle,
) -> Result<(), CliError> {
    let own = log.recovery().epoch;
    let mut why = Vec::new();
    for giver in givers {
        let began = log.tail().position.lsn;
        if let Err(error) = runtime.block_on(giver.give_back(Arc::clone(log), own)) {
            why.push(error.to_string());
        }
        let end = log.tail().position.lsn;
        if end > began {
            tracing::warn!(
                "lsn {} to {end} were lost here, and came back from {}",
                began.next(),
                giver.name()
            );
        }
    }
    let end = log.tail().position.lsn;
    if end >= wanted {
        return Ok(());
    }
    let nobody = format!("nobody who answers has what comes behind lsn {end}");
    why.insert(0, nobody);
    Err(CliError::new(why.join("; ")))
}

/// What came back is on the disk by then.
const DURABLE_MAX: Duration = Duration::from_secs(60);
/// So many segments are mended at one opening.
const MENDED_MAX: usize = 64;

#[cfg(test)]
mod tests;
