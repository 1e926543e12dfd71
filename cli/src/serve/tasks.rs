//! What takes longer than an answer: checks, dumps, archives.
//!
//! Invariants:
//! - What is written for others to read has its name only when it is complete.

use std::{
    cell::RefCell,
    io::{self, Write},
    path::Path,
};

use murphy_fs::{IndexSnapshot, SnapshotOrigin, StoreUrl};
use murphy_log::{Clock, Lsn, SystemClock, WaitError};
use murphy_mirror::EntryLine;
use serde_json::{Value, json};

use super::{
    host::{Host, outside},
    joining::{Waiting, any_acknowledges, join_later, may_acknowledge, must_wait, wait_again},
};
use crate::{
    archives::{Leaving, by_archives},
    check::{self, Finding},
    control::Replies,
    dump_file::Dumped,
    error::{CliError, failed},
    places::local_url,
    progress::Progress,
    settings::{Settings, SharedArchive, shared_form},
};

pub(super) fn fsck(host: &Host, data: bool, replies: &mut dyn Replies) -> Result<Value, CliError> {
    let mut found = |finding: Finding| match serde_json::to_value(&finding) {
        Ok(value) => replies.item(value),
        Err(error) => tracing::error!(%error, "a finding cannot be sent"),
    };
    let summary = check::check(&host.node, data, &host.runtime, &mut found)?;
    serde_json::to_value(summary).map_err(failed)
}

/// Hands out the entries from `from` on, as many as there are and fit; says where to go on.
pub(super) fn entries(host: &Host, from: Option<u64>, replies: &mut dyn Replies) -> Result<Value, CliError> {
    let log = host.volume().log();
    let from = from.map_or_else(|| log.first(), |from| Lsn::new(from).max(Lsn::FIRST));
    let end = match log.durable().wait_blocking(from, ENTRIES_WAIT) {
        Ok(state) => state.position.lsn,
        Err(WaitError::TimedOut { .. }) => return Ok(json!({ "next": from.get() })),
        Err(error) => return Err(failed(error)),
    };
    if from < log.first() {
        return Err(CliError::new(format!("lsn {from} is not in this log, which begins at {}", log.first()))
            .hint("an archive may reach further back"));
    }
    // Without a process between the log and whoever reads nothing waits for the reader, and nothing is held for it.
    let most = if host.ships() { ENTRIES_FRAMES } else { usize::MAX };
    let (mut next, mut told) = (from, 0);
    for frame in log.read(from).map_err(failed)?.take(most) {
        let frame = frame.map_err(failed)?;
        for line in EntryLine::of_frame(&frame).map_err(failed)? {
            if line.lsn >= from.get() {
                replies.item(serde_json::to_value(line).map_err(failed)?);
            }
        }
        next = frame.last().next();
        told += frame.bytes().len();
        if host.ships() && told >= ENTRIES_BYTES {
            break;
        }
    }
    Ok(json!({ "next": next.get(), "end": next > end }))
}

/// Writes the tree of now, with everything written so far, into one file, or into the answer.
pub(super) fn dump(host: &Host, path: Option<&Path>, replies: &mut dyn Replies) -> Result<Value, CliError> {
    host.flush(&mut |progress| replies.progress(progress))?;
    let view = host.volume().view_with_state();
    let inodes = view.state().map_or(0, |state| state.usage.inodes);
    let origin = SnapshotOrigin { branch: host.node.config.branch, created: SystemClock::new().wall() };
    let replies = RefCell::new(replies);
    let progress = |done: murphy_fs::SnapshotProgress| {
        replies.borrow_mut().progress(Progress::new("inodes dumped", done.inodes, inodes));
    };
    let dumped = Dumped { tree: &view, keys: &host.node.keys, origin };
    let summary = match path {
        None => dumped.write_to(&mut IntoAnswer(&replies), &progress)?,
        Some(path) => dumped.write_file(path, &progress)?,
    };
    let state = summary.header.state;
    Ok(json!({
        "lsn": state.position.lsn.get(),
        "digest": state.digest.to_string(),
        "inodes": state.usage.inodes,
    }))
}

/// Bytes that whoever asked writes where they belong: only there it is known where that is.
struct IntoAnswer<'a, 'b>(&'a RefCell<&'b mut dyn Replies>);

impl Write for IntoAnswer<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().bytes(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Refuses what cannot become an archive of this volume, as far as reading tells. Nothing is written.
pub(super) fn check_new_archive(host: &Host, url: &str, log_only: bool) -> Result<StoreUrl, CliError> {
    let url: StoreUrl = url.parse().map_err(failed)?;
    let shared = shared_form(&url);
    // One that could not be waited for when it was added may be listed, and is shipped to nowhere.
    if listed(host, &shared)?.is_some_and(|_| !host.ships() || host.archives.ships_to(&shared)) {
        return Err(CliError::new(format!("{shared} is an archive of this volume already")));
    }
    let (config, archives) = (&host.node.config, Settings::of(host.volume())?.archives);
    let mut others = vec![config.blocks.clone()];
    for archive in archives.iter().filter(|archive| archive.url != shared) {
        others.push(local_url(config, archive)?);
    }
    let own = "an archive has a prefix of its own, which nothing else writes into";
    if let Some(other) = others.iter().find(|other| other.overlaps(&url)) {
        let what = if *other == config.blocks { "the block store " } else { "" };
        let other = format!("{what}{}", shared_form(other));
        return Err(
            CliError::new(format!("{shared} and {other} are one place, or one lies in the other")).hint(own)
        );
    }
    let inside = host.mount_points().into_iter().chain([host.directory().to_owned()]);
    if let Some(inside) = inside.into_iter().find(|inside| url.lies_in(inside)) {
        return Err(CliError::new(format!("{shared} lies in {}", inside.display())).hint(own));
    }
    host.archives.check_new(&url, log_only)?;
    Ok(url)
}

/// An archive as the volume has it, if it does.
fn listed(host: &Host, shared: &str) -> Result<Option<SharedArchive>, CliError> {
    Ok(Settings::of(host.volume())?.archives.into_iter().find(|archive| archive.url == shared))
}

pub(super) fn add_archive(host: &Host, url: &str, log_only: bool) -> Result<Value, CliError> {
    let url = check_new_archive(host, url, log_only)?;
    let (settings, shared) = (Settings::of(host.volume())?, shared_form(&url));
    if !host.waits_for_archives()? || any_acknowledges(host, &settings.archives)? {
        host.flush(&mut |_| {})?;
    }
    if shared != url.to_string() {
        host.mirroring.change_config(|config| {
            config.archives.retain(|other| shared_form(other) != shared);
            config.archives.push(url.clone());
        })?;
    }
    let was_listed = listed(host, &shared)?.is_some();
    let archive = host.archives.create(&url, log_only)?;
    let adding = host.archives.change(|archives| {
        if let Some(listed) = archives.iter().find(|listed| listed.url == shared) {
            return Ok((host.archives.removals(), listed.clone()));
        }
        let mut archive = archive;
        // What an fsync waits for may have changed since.
        archive.joining = !log_only && must_wait(host, archives)?;
        // Nobody else has a copy by now.
        archive.known = archives.is_empty() && host.mirroring.is_alone();
        archives.push(archive.clone());
        Ok((host.archives.removals(), archive))
    });
    let added = host.runtime.block_on(adding);
    // An entry that could not be waited for may list it all the same.
    if host.ships()
        && let Some(listed) = listed(host, &shared)?
    {
        if !was_listed || !host.archives.ships_to(&shared) {
            host.archives.start_at(listed, url)?;
        }
        join_later(&host.archives, &host.mirroring, outside(&host.node)?);
    }
    let (removals, mut archive) = added?;
    if host.ships() {
        if archive.joining {
            let joined = host.runtime.block_on(async {
                may_acknowledge(host).await?;
                host.archives.let_acknowledge(std::slice::from_ref(&archive.url), removals).await
            });
            joined.map_err(|error| {
                CliError::new(format!("{shared} was added and acknowledges nothing yet: {error}"))
                    .hint(JOINS_LATER)
            })?;
            archive.joining = false;
        }
        host.flush(&mut |_| {})?;
    }
    serde_json::to_value(archive).map_err(failed)
}

/// Refuses to remove what [`remove_archive`] would refuse. Nothing is written.
pub(super) fn check_removal(host: &Host, url: &str, assume_lost: bool) -> Result<(), CliError> {
    let url: StoreUrl = url.parse().map_err(failed)?;
    let mut archives = Settings::of(host.volume())?.archives;
    take_out(host, &mut archives, &shared_form(&url), assume_lost)?;
    match assume_lost || host.ships() || !host.waits_for_archives()? {
        true => Ok(()),
        false => check_handed_over(host, &archives),
    }
}

/// Takes the archive `shared` out of the list, if fsync can do without it.
pub(super) fn take_out(
    host: &Host,
    archives: &mut Vec<SharedArchive>,
    shared: &str,
    assume_lost: bool,
) -> Result<(), CliError> {
    let before = archives.len();
    archives.retain(|archive| archive.url != shared);
    // One that could not be waited for is not on the list any more, and is still shipped to.
    if archives.len() == before && !host.archives.ships_to(shared) {
        return Err(CliError::new(format!("{shared} is not an archive of this volume")));
    }
    if !host.waits_for_archives()? || any_acknowledges(host, archives)? {
        return Ok(());
    }
    if !assume_lost {
        return Err(CliError::new(format!(
            "fsync waits for {shared}: it is the last archive that holds data"
        ))
        .hint("add another archive first; if this one is gone for good, --assume-lost gives it up"));
    }
    Ok(())
}

pub(super) fn remove_archive(host: &Host, url: &str, assume_lost: bool) -> Result<Value, CliError> {
    let url: StoreUrl = url.parse().map_err(failed)?;
    let shared = shared_form(&url);
    let leaving = if assume_lost { None } else { hand_over(host, &shared)? };
    remove_handed_over(host, shared, assume_lost, leaving)
}

/// Removes an archive that is `leaving`, if any fsync may have been acknowledged by it and is not given up.
pub(super) fn remove_handed_over(
    host: &Host,
    shared: String,
    assume_lost: bool,
    leaving: Option<Leaving<'_>>,
) -> Result<Value, CliError> {
    let removing = host.archives.change(|archives| {
        let gone = archives.iter().find(|archive| archive.url == shared).cloned();
        take_out(host, archives, &shared, assume_lost)?;
        if assume_lost {
            return wait_again(host, gone.as_ref(), archives);
        }
        if leaving.is_some() != host.waits_for_archives()? {
            return Err(CliError::new("nothing was changed: what an fsync waits for was changed meanwhile")
                .hint("run it again"));
        }
        leaving.as_ref().map_or(Ok(()), Leaving::check_unchanged)?;
        Ok(Vec::new())
    });
    let removed = host.runtime.block_on(removing);
    // An entry that could not be waited for lets others wait all the same.
    if host.ships() && host.archives.joining().is_some() {
        join_later(&host.archives, &host.mirroring, outside(&host.node)?);
    }
    let waiting = removed?;
    host.archives.stop(&shared);
    let refused = |errno| CliError::new(format!("the log does not go on: {errno:?}"));
    let lsn = host.runtime.block_on(host.volume().durable_here()).map_err(refused)?;
    // They would look for it, and find those that were added since nowhere else.
    let mut untold = host.runtime.block_on(host.mirroring.untold(lsn));
    let at_most = if host.ships() { HEARD_MAX } else { std::time::Duration::ZERO };
    let lacking = host.runtime.block_on(host.archives.lacking_after(lsn, at_most))?;
    untold.extend(lacking.into_iter().map(|(url, _)| url));
    Ok(json!({ "removed": shared, "not_known_to": untold, "waiting": described(&waiting) }))
}

/// Those that acknowledge nothing yet, and who has not heard of them.
pub(super) fn described(waiting: &[Waiting]) -> Vec<Value> {
    waiting.iter().map(|one| json!({ "archive": one.url, "waits_for": one.unheard })).collect()
}

/// Lets an archive acknowledge nothing more, and returns when the others have whatever it may have acknowledged; before the log says that it is gone:
/// whoever takes over then does not ask it. Nothing is waited for if no fsync waits for archives.
pub(super) fn hand_over<'a>(host: &'a Host, shared: &str) -> Result<Option<Leaving<'a>>, CliError> {
    let mut left = Settings::of(host.volume())?.archives;
    take_out(host, &mut left, shared, false)?;
    if !host.waits_for_archives()? {
        return Ok(None);
    }
    check_answered(host, shared)?;
    if !host.ships() {
        let leaving = host.archives.leave(shared);
        check_handed_over(host, &left)?;
        return Ok(Some(leaving));
    }
    let refused = |error: &dyn std::fmt::Display| {
        CliError::new(format!(
            "nothing was changed: the other archives do not have everything that {shared} may have acknowledged: {error}"
        ))
        .hint("run it again once one of them answers; --assume-lost gives up what they lack")
    };
    // What takes long comes before, while it still acknowledges.
    host.flush(&mut |_| {}).map_err(|error| refused(&error))?;
    let outside = outside(&host.node)?;
    let leaving = host.archives.leave(shared);
    if !host.archives.any_acknowledges(&outside) {
        return Err(refused(&"none of them is shipped to"));
    }
    // An fsync that waits meanwhile is to be answered in its time, whatever comes of this.
    let at_most = HANDED_OVER_MAX.min(host.volume().io_timeout() / 2);
    host.runtime
        .block_on(async {
            // It has acknowledged nothing behind that.
            let lsn = host.volume().durable_here().await.map_err(|errno| format!("{errno:?}"))?;
            let by = by_archives(&host.archives, outside);
            by.acknowledged(lsn, at_most).await.map_err(|error| error.to_string())
        })
        .map_err(|error| refused(&error))?;
    Ok(Some(leaving))
}

/// Refuses if an archive that may have acknowledged has not said what it holds since this process began: this node may have lost that.
fn check_answered(host: &Host, shared: &str) -> Result<(), CliError> {
    let gone = Settings::of(host.volume())?.archives.into_iter().find(|archive| archive.url == shared);
    // One that waits now may have acknowledged before.
    let gone = gone.map(|archive| SharedArchive { joining: false, ..archive });
    let may_have = gone.map_or(Ok(true), |gone| any_acknowledges(host, &[gone]))?;
    if !may_have {
        return Ok(());
    }
    let has_answered = match host.ships() {
        true => host.runtime.block_on(host.archives.answers(shared, ANSWERED_MAX)),
        false => host.reached.contains(shared),
    };
    if has_answered {
        return Ok(());
    }
    Err(CliError::new(format!(
        "nothing was changed: {shared} has not answered yet, and whether this node has everything that it has acknowledged is not known"
    ))
    .hint("run it again once it answers; if it is gone for good, --assume-lost gives it up"))
}

/// Refuses at a node that nobody serves, if no archive of those that are `left` was noted to have everything that was ever acknowledged.
fn check_handed_over(host: &Host, left: &[SharedArchive]) -> Result<(), CliError> {
    // What this process has decided was acknowledged by nobody.
    let lsn = host.settled.get();
    let statuses = host.archive_status()?;
    let holds = |archive: &SharedArchive| {
        statuses.iter().any(|status| status.url == archive.url && status.lsn >= lsn)
    };
    let holders: Vec<SharedArchive> = left.iter().filter(|archive| holds(archive)).cloned().collect();
    if any_acknowledges(host, &holders)? {
        return Ok(());
    }
    Err(CliError::new(
        "nobody serves this node, and it is not known whether another archive has everything that this one may have acknowledged",
    )
    .hint("murphy serve or murphy mount starts it, and lets the others have that; --assume-lost gives it up"))
}

/// The archives of the volume, or the one that is meant; an error if there is none.
pub(super) fn chosen_archives(host: &Host, url: Option<&str>) -> Result<Vec<SharedArchive>, CliError> {
    let wanted = url.map(|url| url.parse::<StoreUrl>().map_err(failed)).transpose()?;
    let wanted = wanted.as_ref().map(shared_form);
    let mut chosen = Settings::of(host.volume())?.archives;
    chosen.retain(|archive| wanted.as_ref().is_none_or(|wanted| archive.url == *wanted));
    if chosen.is_empty() {
        let text = match &wanted {
            Some(url) => format!("{url} is not an archive of this volume"),
            None => "this volume has no archive".to_owned(),
        };
        return Err(
            CliError::new(text).hint("murphy archive list shows those it has, murphy archive add makes one")
        );
    }
    Ok(chosen)
}

pub(super) fn snapshot_archive(host: &Host, url: Option<&str>) -> Result<Value, CliError> {
    let chosen = chosen_archives(host, url)?;
    host.flush(&mut |_| {})?;
    let mut taken = Vec::new();
    for archive in chosen {
        let position = host.archives.snapshot(&archive.url)?;
        taken.push(json!({ "url": archive.url, "lsn": position.lsn.get() }));
    }
    Ok(Value::Array(taken))
}

/// How an archive comes to acknowledge that was added and does not yet.
const JOINS_LATER: &str = "it is shipped to, and acknowledges by itself once another archive that does, or every archive and every mirror, has the entry that \
    added it; who is gone for good is taken out with murphy archive remove DIR URL --assume-lost, or murphy member remove DIR MEMBER --assume-lost";
/// So long an archive that is taken out gets to answer for the first time.
const ANSWERED_MAX: std::time::Duration = std::time::Duration::from_secs(10);
/// So long the archives that are left get to have what one that is removed may have acknowledged, while nobody else acknowledges.
const HANDED_OVER_MAX: std::time::Duration = std::time::Duration::from_secs(20);
/// So long the archives that are left get to have the removal of another one before the answer says that they do not.
const HEARD_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// A subscriber asks again so often when nothing happens.
const ENTRIES_WAIT: std::time::Duration = std::time::Duration::from_secs(1);
/// So many frames are told at a time.
const ENTRIES_FRAMES: usize = 256;
/// Not many more bytes of frames are told at a time: whoever asks holds them until they are printed.
const ENTRIES_BYTES: usize = 1 << 20;
