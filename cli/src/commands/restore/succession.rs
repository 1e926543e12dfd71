//! A restore that takes over: who stands between it and the old source, found out before anything is restored.
//!
//! Invariants:
//! - Every archive that the log names, as far as any archive holds the log, is read and sealed, or given up by its URL.
//! - A restore asks no member. With `mirror=W` each one that holds a copy is given up by its id, or nothing happens.
//! - What is printed before is what is done, or refused.
//! - The source is watched from the look on that the plan was made with: what comes while people read it is a sign of life. What that look saw is
//!   in the plan, as far as it can be read.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use jiff::tz::TimeZone;
use murphy_backup::{
    Archive, Newest, RestoreError, RestorePlan, SILENCE, Silence, Successor, Watch, planned_rows, show_time,
};
use murphy_fs::{Fence, IndexSnapshot, MemberRow, MemberState, RowKey, Table};
use murphy_log::{Clock, Epoch, LogTime, Lsn, NodeId, Position, SystemClock};
use murphy_mirror::Identity;
use serde::Serialize;
use tokio::runtime::Runtime;

use super::{Restore, pins::Pins};
use crate::{
    attempts,
    config::NodeConfig,
    error::{CliError, failed},
    node::Staging,
    output::Output,
    progress::{Progress, ProgressLine},
    settings::{Ack, Settings, SharedArchive, setting_text, shared_form},
    take_over::{GivenUp, Outlook, Taker, not_silent},
    units::{APART_MAX, span_text},
};

/// What a take-over has to do with archives and members. It serializes as people want to read it.
#[derive(Serialize)]
pub(super) struct Succession {
    /// The name of the volume, which is asked for.
    pub(super) name: String,
    /// What an fsync of the old source waited for.
    ack: String,
    /// What nobody who is read holds comes behind this entry.
    behind: u64,
    archives: Vec<Outlook>,
    members: Vec<MemberOutlook>,
    /// The newest entry that an archive holds, as its source dated it.
    source: Option<SourceOutlook>,
    #[serde(skip)]
    pub(super) given_up: GivenUp,
}

/// What the source wrote last, as far as archives hold it. None of these times says whether it lives.
#[derive(Serialize)]
struct SourceOutlook {
    lsn: u64,
    log_time: String,
    /// Its wall clock when it closed that frame.
    wall_time: String,
    /// How far that log time is ahead of this machine's clock; 0 unless it is.
    ahead_ms: u64,
    /// Whether it is watched before anything is restored; it is not once an archive is sealed.
    is_watched: bool,
}

/// What becomes of a member that holds a copy.
#[derive(Serialize)]
struct MemberOutlook {
    node: String,
    name: String,
    act: MemberAct,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
enum MemberAct {
    /// It may have acknowledged what no archive holds, and is not given up.
    #[serde(rename = "none")]
    Refused,
    #[serde(rename = "give up")]
    GiveUp,
    /// No fsync has waited for it.
    #[serde(rename = "not asked")]
    NotAsked,
}

/// What the nodes of the volume share.
struct Shared {
    settings: Settings,
    /// Who holds a copy, and its name.
    members: Vec<(NodeId, String)>,
}

/// What was found in the archives when a plan was made.
struct Looked {
    archives: Vec<Outlook>,
    source: Option<SourceOutlook>,
    watch: Option<Watch>,
    /// Up to where an archive goes.
    end: Option<Lsn>,
}

/// An attempt at the same directory that was cut short.
struct Earlier {
    node: NodeId,
    attempts: Vec<Epoch>,
}

impl Restore {
    /// The plan, once every archive that the log names is read, or cannot be; and what a take-over would do with each. Archives that were not
    /// given are opened, and pinned.
    pub(super) fn plan_succession(
        &mut self,
        mut pins: Option<&mut Pins<'_>>,
        runtime: &Runtime,
    ) -> Result<(RestorePlan, Succession), CliError> {
        let earlier = self.earlier()?;
        let config = self.as_a_node()?;
        let given_up = GivenUp::parse(&self.assume_lost, &[], true, COMMAND)?;
        if let Some(both) = self.urls.iter().map(shared_form).find(|url| given_up.archives.contains(url)) {
            return Err(CliError::usage(format!("{both} is given to be read, and given up"))
                .hint("what is given is sealed: leave out one of the two"));
        }
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let taker = Taker { config: &config, node: earlier.node, clock };
        let mut silent: Vec<Outlook> = Vec::new();
        let mut plans: Vec<Lsn> = Vec::new();
        loop {
            let (plan, shared) = runtime.block_on(self.plan_with_shared())?;
            let is_open = |named: &&SharedArchive| {
                !self.urls.iter().any(|url| shared_form(url) == named.url)
                    && !given_up.archives.contains(&named.url)
                    && !silent.iter().any(|silent| silent.url == named.url)
            };
            let open: Vec<SharedArchive> = shared.settings.archives.iter().filter(is_open).cloned().collect();
            if open.is_empty() {
                let again = !earlier.attempts.is_empty();
                let given_up = GivenUp::parse(&self.assume_lost, &shared.settings.archives, again, COMMAND)?;
                let position = plan.route.end;
                let looks = self.outlooks(&taker, &earlier, position, &given_up);
                let mut looked = runtime.block_on(looks)?;
                plans.push(position.lsn);
                if is_left_behind(&plans, looked.end) {
                    continue;
                }
                looked.archives.extend(silent);
                self.watch = looked.watch.take();
                let name = shared.settings.name_or(self.first()?);
                return Ok((plan, shared.succession(name, looked, given_up, position)));
            }
            for named in open {
                match runtime.block_on(taker.open(&named)) {
                    Ok(opened) => {
                        let archive = opened.fence.archive().clone();
                        if let Some(pins) = &mut pins {
                            pins.pin(archive.clone());
                        }
                        self.urls.push(opened.url);
                        self.archives.push(archive);
                    }
                    Err(error) => silent.push(Outlook::refused(&named.url, error.to_string())),
                }
            }
        }
    }

    /// A plan, and what is shared where it leads to. Snapshots that turn out to be damaged are left out.
    async fn plan_with_shared(&mut self) -> Result<(RestorePlan, Shared), CliError> {
        loop {
            let plan = self.plan(&self.excluded).await?;
            let rows = planned_rows(&self.archives, &plan, &[Table::Setting, Table::Member]).await;
            match rows {
                Ok(rows) => return Ok((plan, Shared::of(&rows)?)),
                Err(error @ (RestoreError::Snapshot { .. } | RestoreError::OtherSnapshot { .. })) => {
                    self.exclude(error)?;
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// How each archive that is read stands, and those that are given up; and a watch over the first, unless an earlier attempt has sealed one.
    async fn outlooks(
        &self,
        taker: &Taker<'_>,
        earlier: &Earlier,
        position: Position,
        given_up: &GivenUp,
    ) -> Result<Looked, CliError> {
        let successor = Successor {
            node: earlier.node,
            attempts: earlier.attempts.clone(),
            given_up: given_up.nodes.clone(),
        };
        let (mut archives, mut answered) = (Vec::new(), Vec::new());
        for (url, archive) in self.urls.iter().zip(&self.archives) {
            let (url, fence) = (shared_form(url), taker.fence(archive));
            archives.push(match fence.adopt().await {
                Ok(held) => {
                    let outlook = Outlook::of_restored(&url, (&fence, held.clone()), &position, &successor);
                    let outlook = outlook.await;
                    answered.push((fence, held));
                    outlook
                }
                Err(error) => Outlook::refused(&url, error.to_string()),
            });
        }
        for url in &given_up.archives {
            let shared = SharedArchive::new(url.clone(), false);
            archives.push(taker.give_up(&shared).await);
        }
        let is_begun = answered.iter().any(|(_, held)| successor.has_sealed(held));
        let end = answered.iter().map(|(_, held)| held.end.lsn).max();
        let watch = Watch::of(answered.iter().map(|(fence, held)| (fence, held)), Arc::clone(&taker.clock));
        let source = watch.newest().map(|newest| SourceOutlook::of(&newest, taker.clock.wall(), !is_begun));
        Ok(Looked { archives, source, watch: (!is_begun).then_some(watch), end })
    }

    /// Returns once the source has been silent for long enough, since the plan was made. Nothing is waited for if an earlier attempt has shut it
    /// out of an archive.
    pub(super) fn watch_source(
        &mut self,
        runtime: &Runtime,
        output: &Output,
    ) -> Result<Option<Silence>, CliError> {
        let Some(watch) = self.watch.take() else { return Ok(None) };
        let seconds = SILENCE.as_secs();
        output.note(&format!(
            "Watching the archives until nothing has come into them for {seconds} s: the source may be alive"
        ));
        let line = ProgressLine::new(output);
        let show = |rest: Duration| {
            line.show(&Progress::new("seconds of silence", seconds.saturating_sub(rest.as_secs()), seconds));
        };
        let silence = runtime.block_on(watch.until_silent(&show));
        silence.map(Some).map_err(not_silent)
    }

    /// Refuses a tree whose log names archives that are neither sealed nor given up: they were named while it was restored. An attempt that is
    /// `kept` may have sealed others.
    pub(super) fn check_named(&self, tree: &dyn IndexSnapshot, kept: Option<&Path>) -> Result<(), CliError> {
        let settings = Settings::in_tree(tree)?;
        let is_known = |named: &SharedArchive| {
            self.urls.iter().any(|url| shared_form(url) == named.url)
                || self.given_up.archives.contains(&named.url)
        };
        match settings.archives.iter().find(|named| !is_known(named)) {
            None => Ok(()),
            Some(named) => Err(added_meanwhile(&named.url, kept)),
        }
    }

    /// Who takes over: the node of an earlier attempt, which may have sealed already.
    fn earlier(&self) -> Result<Earlier, CliError> {
        let first = self.first()?;
        let kept = super::execute::remembered(first.lineage().branch);
        let Some((directory, file)) = Staging::left(&self.directory, &kept)? else {
            return Ok(Earlier { node: NodeId::default(), attempts: Vec::new() });
        };
        let identity = Identity::load_or_create(&directory).map_err(failed)?;
        Ok(Earlier { node: identity.node(), attempts: attempts::load(&file)? })
    }

    fn first(&self) -> Result<&Archive, CliError> {
        self.archives.first().ok_or_else(|| CliError::usage("give at least one archive"))
    }

    /// This node, as far as reaching archives goes.
    fn as_a_node(&self) -> Result<NodeConfig, CliError> {
        let first = self.first()?;
        let (lineage, name) = (first.lineage(), first.descriptor().name.clone());
        Ok(NodeConfig {
            archives: self.urls.clone(),
            ..NodeConfig::new(lineage.volume, lineage.branch, name, self.final_blocks()?)
        })
    }
}

impl Shared {
    fn of(rows: &BTreeMap<RowKey, Bytes>) -> Result<Shared, CliError> {
        let settings = Settings::read(|name| rows.get(&RowKey::setting(name)).map(setting_text).transpose())?;
        let mut members = Vec::new();
        for (key, row) in rows.iter().filter(|(key, _)| key.table() == Table::Member.number()) {
            let row = MemberRow::decode(row).map_err(|error| failed(format!("a member: {error}")))?;
            let node: [u8; 16] = key.key().try_into().map_err(|_| failed("a member has a damaged id"))?;
            if matches!(row.state, MemberState::Joined { .. }) && row.role.holds_copy() {
                members.push((NodeId::from_bytes(node), row.name));
            }
        }
        Ok(Shared { settings, members })
    }

    fn succession(
        self,
        name: String,
        Looked { archives, source, .. }: Looked,
        given_up: GivenUp,
        end: Position,
    ) -> Succession {
        let waited = matches!(self.settings.ack, Ack::Mirrors(_));
        let members = self.members.into_iter().map(|(node, name)| {
            let act = match (given_up.nodes.contains(&node), waited) {
                (true, _) => MemberAct::GiveUp,
                (false, true) => MemberAct::Refused,
                (false, false) => MemberAct::NotAsked,
            };
            MemberOutlook { node: node.to_string(), name, act }
        });
        let members = members.collect();
        let (ack, behind) = (self.settings.ack.to_string(), end.lsn.get());
        Succession { name, ack, behind, archives, members, source, given_up }
    }
}

impl Succession {
    /// Refuses while anybody could go on with the old source who is neither sealed nor given up.
    pub(super) fn check(&self) -> Result<(), CliError> {
        self.check_archives()?;
        self.check_members()
    }

    fn check_archives(&self) -> Result<(), CliError> {
        let lsn = self.behind;
        let refused: Vec<String> =
            self.archives.iter().filter(|one| one.is_refused()).map(Outlook::why_not).collect();
        if !refused.is_empty() {
            return Err(CliError::new(refused.join("; ")).hint(
                "somebody has taken over, or begun to: go on with that node, or with the DIR that an attempt of your own was given; \
                 --assume-lost and its id, if that node is gone for good",
            ));
        }
        let silent: Vec<&Outlook> = self.archives.iter().filter(|one| one.is_unasked()).collect();
        if silent.is_empty() {
            return Ok(());
        }
        let named: Vec<String> = silent.iter().map(|one| one.why_not()).collect();
        let ways: Vec<String> = silent.iter().map(|one| format!("--assume-lost '{}'", one.url)).collect();
        let (named, ways) = (named.join("; "), ways.join(" "));
        Err(CliError::new(format!("not every archive of the volume can be sealed: {named}")).hint(format!(
            "the old source could go on acknowledging through it: give its URL too, as it stands there, with credentials if it needs some; \
             {ways} gives it up, with whatever only it holds behind lsn {lsn}, also if it was acknowledged"
        )))
    }

    fn check_members(&self) -> Result<(), CliError> {
        let Ok(Ack::Mirrors(wanted)) = self.ack.parse::<Ack>() else { return Ok(()) };
        let (lsn, ack, known) = (self.behind, &self.ack, self.members.len());
        let refused: Vec<&MemberOutlook> =
            self.members.iter().filter(|member| member.act == MemberAct::Refused).collect();
        if !refused.is_empty() {
            let named: Vec<String> = refused.iter().map(|member| member.label()).collect();
            let ways: Vec<String> =
                refused.iter().map(|member| format!("--assume-lost {}", member.node)).collect();
            let (named, ways) = (named.join(", "), ways.join(" "));
            return Err(CliError::new(format!(
                "fsync waited for members (ack {ack}), and a restore seals and asks none of them: {named}"
            ))
            .hint(format!(
                "promote one of them if any is left (murphy promote): it loses nothing that enough of them have acknowledged; if all are gone, \
                 {ways} gives up whatever only they hold behind lsn {lsn}, also if it was acknowledged"
            )));
        }
        // So few cannot have acknowledged anything: if somebody has, it was somebody who joined later.
        if known < wanted as usize && self.given_up.nodes.is_empty() {
            return Err(CliError::new(format!(
                "fsync waited for members (ack {ack}), of which the archives know {known}: who joined behind lsn {lsn} may have acknowledged what no archive holds"
            ))
            .hint(
                "promote it if it is left (murphy promote); --assume-lost gives it up by its id, which its status shows",
            ));
        }
        Ok(())
    }

    /// The epochs of archives that are given up and answer: the one that is begun comes behind them, so that nobody takes the two for each other.
    pub(super) fn given_up_epochs(&self) -> Vec<Epoch> {
        self.archives.iter().filter_map(|archive| archive.epoch).collect()
    }

    /// What people read behind the plan.
    pub(super) fn text(&self) -> String {
        let archives = self.archives.iter().map(Outlook::line);
        let members = self.members.iter().map(|member| member.line(self.behind));
        let source = self.source.iter().map(SourceOutlook::line);
        let mut lines: Vec<String> = archives.chain(members).chain(source).collect();
        if matches!(self.ack.parse(), Ok(Ack::Mirrors(_))) {
            lines.push(format!("members            that joined behind lsn {} are known to no archive: what only they hold is lost", self.behind));
        }
        lines.join("\n")
    }
}

impl SourceOutlook {
    fn of(newest: &Newest, now: LogTime, is_watched: bool) -> SourceOutlook {
        let zone = TimeZone::system();
        SourceOutlook {
            lsn: newest.lsn.get(),
            log_time: show_time(newest.log_time, &zone),
            wall_time: show_time(newest.wall_time, &zone),
            ahead_ms: u64::try_from(newest.log_time.since(now).as_millis()).unwrap_or(u64::MAX),
            is_watched,
        }
    }

    fn line(&self) -> String {
        let SourceOutlook { lsn, log_time, wall_time, .. } = self;
        let ahead = Duration::from_millis(self.ahead_ms);
        let ahead = match ahead > APART_MAX {
            true => format!(
                ", which is {} ahead of this machine's clock (its own showed {wall_time}): that is no sign of life",
                span_text(ahead)
            ),
            false => String::new(),
        };
        let watched = match self.is_watched {
            true => {
                format!("its archives are watched for {} s before anything is restored", SILENCE.as_secs())
            }
            false => "it is shut out of an archive already, and not watched any more".to_owned(),
        };
        format!("source             has written up to lsn {lsn}, by its log at {log_time}{ahead}; {watched}")
    }
}

impl MemberOutlook {
    fn label(&self) -> String {
        let MemberOutlook { node, name, .. } = self;
        if name.is_empty() { node.clone() } else { format!("{node} ({name})") }
    }

    fn line(&self, behind: u64) -> String {
        let what = match self.act {
            MemberAct::Refused => {
                format!(
                    "stands in the way: it may have acknowledged what no archive holds behind lsn {behind}"
                )
            }
            MemberAct::GiveUp => {
                format!(
                    "is given up: what only it holds behind lsn {behind} is lost, also if it was acknowledged"
                )
            }
            MemberAct::NotAsked => {
                format!(
                    "is not asked: what it holds behind lsn {behind} is lost; a promotion there would keep it"
                )
            }
        };
        format!("member             {} {what}", self.label())
    }
}

/// Whether to plan again: archives go on to `end`, behind where the last of `plans` ends. What a look sees is no sign of life later, so nobody would
/// miss it before the first seal. What no plan reaches cannot be read; a source that writes all the time is found out by the watch.
fn is_left_behind(plans: &[Lsn], end: Option<Lsn>) -> bool {
    let reached = match plans {
        [.., before, last] if before >= last => return false,
        [.., last] => *last,
        [] => return true,
    };
    plans.len() < PLANS_MAX && end.is_some_and(|end| end > reached)
}

/// Refuses to go on without an archive that the source before has added since the plan was made.
fn added_meanwhile(url: &str, kept: Option<&Path>) -> CliError {
    CliError::new(format!("{url} was added meanwhile")).hint(match kept {
        None => "the source may be alive; nothing was changed: run it again".to_owned(),
        Some(kept) => format!(
            "archives may be sealed by now, and stay so: run it again with the same DIR, which goes on with {} and seals that one too",
            kept.display()
        ),
    })
}

/// So many plans are made while each look sees more.
const PLANS_MAX: usize = 5;
/// The command that names members and archives.
const COMMAND: &str = "murphy restore --take-over";

#[cfg(test)]
mod tests {
    use super::*;

    fn succession(ack: &str, members: Vec<MemberOutlook>, archives: Vec<Outlook>) -> Succession {
        let given_up = GivenUp::default();
        Succession {
            name: "vol".to_owned(),
            ack: ack.to_owned(),
            behind: 7,
            archives,
            members,
            source: None,
            given_up,
        }
    }

    fn member(act: MemberAct) -> MemberOutlook {
        MemberOutlook { node: "ab".to_owned(), name: "b".to_owned(), act }
    }

    /// The fear: an archive that was behind when the first mirror joined knows of nobody who could have acknowledged.
    #[test]
    fn members_that_no_archive_knows_are_given_up_by_name_too() {
        let mut unknown = succession("mirror=1", Vec::new(), Vec::new());
        let refused = unknown.check().unwrap_err();
        assert!(refused.to_string().contains("who joined behind lsn 7"), "{refused}");
        unknown.given_up.nodes.insert(NodeId::from_bytes([1; 16]));
        unknown.check().unwrap();
        assert!(unknown.text().contains("known to no archive"), "{}", unknown.text());
        succession("mirror=1", vec![member(MemberAct::GiveUp)], Vec::new()).check().unwrap();
        succession("local", Vec::new(), Vec::new()).check().unwrap();
        succession("archive", vec![member(MemberAct::NotAsked)], Vec::new()).check().unwrap();
    }

    /// The fear: a whole region is restored, for hours, before anybody looks whether it may take over at all.
    #[test]
    fn an_archive_that_somebody_else_has_sealed_is_refused_before_anything_is_restored() {
        let sealed =
            Outlook { lsn: Some(7), ..Outlook::refused("file:///a", "it was sealed at 7".to_owned()) };
        let away = Outlook::refused("file:///b", "it is away".to_owned());
        let refused = succession("local", Vec::new(), vec![away, sealed]).check().unwrap_err();
        assert_eq!(refused.message, "file:///a: it was sealed at 7");
        assert!(refused.hint.unwrap().contains("--assume-lost"));
    }

    /// The fear: people who read that nothing was changed start the old source again, whose archives are sealed.
    #[test]
    fn an_archive_that_was_added_while_others_were_sealed_is_not_called_nothing_changed() {
        let first = added_meanwhile("file:///a", None).hint.unwrap();
        assert!(first.contains("nothing was changed"), "{first}");
        let second = added_meanwhile("file:///a", Some(Path::new("/srv/.n.restoring"))).hint.unwrap();
        assert!(second.contains("sealed") && second.contains("/srv/.n.restoring"), "{second}");
        assert!(!second.contains("nothing was changed"), "{second}");
    }

    /// The fear: what came between the plan and the look is no sign of life and not restored, and the first seal is refused after hours of it.
    #[test]
    fn what_the_look_saw_beyond_the_plan_is_planned_for() {
        let lsns = |plans: &[u64]| plans.iter().map(|lsn| Lsn::new(*lsn)).collect::<Vec<_>>();
        for (plans, end, expected) in [
            (&[7][..], Some(9), true),
            (&[7], Some(7), false),
            (&[7], None, false),
            (&[7, 9], Some(9), false),
            (&[7, 9], Some(12), true),
            // It cannot be read: another plan would say the same.
            (&[7, 7], Some(9), false),
            (&[1, 2, 3, 4, 5], Some(9), false),
        ] {
            assert_eq!(is_left_behind(&lsns(plans), end.map(Lsn::new)), expected, "{plans:?} {end:?}");
        }
    }

    #[test]
    fn every_archive_that_does_not_answer_is_named_at_once_with_the_way_out() {
        let silent = ["file:///a", "file:///b"].map(|url| Outlook::refused(url, "it is away".to_owned()));
        let given_up = Outlook::given_up("file:///c", None);
        let archives = silent.into_iter().chain([given_up]).collect();
        let refused = succession("archive", Vec::new(), archives).check().unwrap_err();
        assert!(refused.message.contains("file:///a: it is away; file:///b: it is away"), "{refused}");
        let hint = refused.hint.unwrap();
        assert!(hint.contains("--assume-lost 'file:///a' --assume-lost 'file:///b'"), "{hint}");
        assert!(!hint.contains("file:///c"), "{hint}");
    }

    /// The fear: a clock that was once wrong makes people wait for a year, or believe that the source lives.
    #[test]
    fn a_log_time_ahead_of_this_machine_is_told_and_called_no_sign_of_life() {
        let minutes = |count: u64| LogTime::from_nanos((1_700_000_000 + 60 * count) * 1_000_000_000);
        let newest = |time| Newest { lsn: Lsn::new(40), log_time: time, wall_time: minutes(3) };
        let ahead = SourceOutlook::of(&newest(minutes(2 * 24 * 60)), minutes(0), true);
        assert_eq!(ahead.ahead_ms, 2 * 24 * 60 * 60_000);
        let line = ahead.line();
        assert!(line.contains("lsn 40") && line.contains("2 days ahead of this machine's clock"), "{line}");
        assert!(line.contains("no sign of life") && line.contains("watched for 60 s"), "{line}");
        for time in [minutes(0), minutes(1), minutes(60)] {
            let line = SourceOutlook::of(&newest(time), minutes(60), false).line();
            assert!(!line.contains("ahead") && line.contains("not watched any more"), "{line}");
        }
    }
}
