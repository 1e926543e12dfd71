//! Taking archives and members out of the volume: what that would give up, and the order to do it.
//!
//! Invariants:
//! - A plan changes nothing, and is refused for whatever the order itself would be refused for, as far as nobody has to be waited for.
//! - What gives something up is done only for somebody who has seen the plan.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    host::Host,
    joining::{Waiting, any_acknowledges, wait_again},
    tasks::{described, remove_archive, take_out},
};
use crate::{
    archives::refuse_fenced,
    config::NodeConfig,
    control::{ArchiveRemoval, MemberRemoval, Replies, Request},
    error::{CliError, failed},
    settings::{Ack, Settings, SharedArchive, shared_form},
    status::ArchiveStatus,
};

/// Ships to an archive no longer, or says what that would give up.
pub(super) fn archive(host: &Host, order: &ArchiveRemoval) -> Result<Value, CliError> {
    check_source(host)?;
    let plan = ArchivePlan::of(host, order)?;
    if order.dry_run {
        return plan.described(host);
    }
    check_confirmed(plan.gives_up(), order.confirmed)?;
    remove_archive(host, &order.url, order.assume_lost)
}

/// Takes members out, one after the other, or says what that would give up.
pub(super) fn members(
    host: &Host,
    order: &MemberRemoval,
    replies: &mut dyn Replies,
) -> Result<Value, CliError> {
    check_source(host)?;
    if order.dry_run {
        return plan_members(host, order);
    }
    check_confirmed(order.assume_lost, order.confirmed)?;
    host.mirroring.remove_members(&order.nodes, order.assume_lost, &mut |member| replies.item(member))?;
    Ok(Value::Null)
}

/// Refuses at a node that changes nothing by itself, before anybody is asked to agree.
fn check_source(host: &Host) -> Result<(), CliError> {
    host.mirroring.check_source()?;
    refuse_fenced(host.directory())
}

fn check_confirmed(gives_up: bool, confirmed: bool) -> Result<(), CliError> {
    if !gives_up || confirmed {
        return Ok(());
    }
    Err(CliError::new("what would be given up was changed meanwhile")
        .hint("run it again: it says what would be given up now"))
}

/// What the volume is without an archive.
struct ArchivePlan {
    shared: String,
    assume_lost: bool,
    settings: Settings,
    left: Vec<SharedArchive>,
}

impl ArchivePlan {
    fn of(host: &Host, order: &ArchiveRemoval) -> Result<ArchivePlan, CliError> {
        let shared = shared_form(&order.url.parse().map_err(failed)?);
        let settings = Settings::of(host.volume())?;
        let mut left = settings.archives.clone();
        take_out(host, &mut left, &shared, order.assume_lost)?;
        Ok(ArchivePlan { shared, assume_lost: order.assume_lost, settings, left })
    }

    /// Whether less is safe afterwards than people may think.
    fn gives_up(&self) -> bool {
        self.assume_lost || self.left.is_empty()
    }

    fn described(&self, host: &Host) -> Result<Value, CliError> {
        let statuses = host.archive_status()?;
        let durable = host.volume().durable().lsn.get();
        let own = statuses.iter().find(|status| status.url == self.shared);
        let others: Vec<&ArchiveStatus> =
            statuses.iter().filter(|status| self.left.iter().any(|left| left.url == status.url)).collect();
        let waits = host.waits_for_archives()?;
        let acknowledges = waits && any_acknowledges(host, &self.left)?;
        let gone = self.settings.archives.iter().find(|archive| archive.url == self.shared);
        let waiting = match self.assume_lost {
            true => wait_again(host, gone, &mut self.left.clone())?,
            false => Vec::new(),
        };
        let mut lines = vec![line("archive", &held(&self.shared, own, durable))];
        for other in &others {
            lines.push(line("stays", &held(&other.url, Some(other), durable)));
        }
        lines.push(line("nothing is deleted", "what it holds stays restorable from its URL"));
        lines.push(line(
            "fsync waits",
            match (waits, acknowledges) {
                (false, _) => "for no archive",
                (true, true) => "for the archives that stay",
                (true, false) => {
                    "for an archive, and none is left that acknowledges: it fails until one is added"
                }
            },
        ));
        lines.extend(waiting.iter().map(|one| line("not at once", &waits_for(one))));
        if self.left.is_empty() {
            lines.push(line("given up", "what is written from then on is in no archive: it lives as long as this node and its mirrors do"));
        }
        if self.assume_lost {
            let own = own.map_or(0, |status| status.lsn);
            lines.push(line("given up", &format!(
                "nobody waits until another archive has what this one acknowledged (up to lsn {own}); whoever takes over through it all the same does not know of this node any more"
            )));
        }
        Ok(json!({
            "name": self.settings.name,
            "archive": self.shared,
            "lsn": own.map(|status| status.lsn),
            "durable_lsn": durable,
            "stays": others.iter().map(|other| &other.url).collect::<Vec<_>>(),
            "gives_up": self.gives_up(),
            "waiting": described(&waiting),
            "text": lines.join("\n"),
        }))
    }
}

fn plan_members(host: &Host, order: &MemberRemoval) -> Result<Value, CliError> {
    host.mirroring.check_removable(&order.nodes)?;
    let durable = host.volume().durable().lsn.get();
    let shown = host.mirroring.show_holders();
    let is_removed = |node: &str| order.nodes.iter().any(|removed| removed == node);
    let mut lines = Vec::new();
    for member in host.mirroring.list_members().iter().filter(|member| is_removed(&member.node)) {
        let seen = shown.iter().find(|mirror| mirror.node == member.node);
        let held = seen.map_or_else(String::new, |mirror| {
            let connected = if mirror.connected { "" } else { ", not connected" };
            let (entries, bytes) = (mirror.metadata_lsn, mirror.data_lsn);
            format!(", entries up to lsn {entries} of {durable}, bytes up to {bytes}{connected}")
        });
        lines.push(line("member", &format!("{} ({}): {}{held}", member.node, member.name, member.role)));
    }
    let left = shown.iter().filter(|mirror| !is_removed(&mirror.node)).count();
    let waits = match host.mirroring.waited_for()? {
        Ack::Mirrors(wanted) if left < wanted as usize => {
            format!("for {wanted} mirrors, and {left} are left: it fails until another one joins")
        }
        Ack::Mirrors(wanted) => format!("for {wanted} of the {left} mirrors that are left"),
        Ack::Local | Ack::Archive => "for no mirror".to_owned(),
    };
    lines.push(line("fsync waits", &waits));
    lines.push(match order.assume_lost {
        true => line("given up", GIVEN_UP_MEMBERS),
        false => line(
            "nothing is given up",
            "those that fsync waits for have everything first, or nothing is removed",
        ),
    });
    Ok(json!({
        "name": Settings::of(host.volume())?.name,
        "members": order.nodes,
        "left": left,
        "durable_lsn": durable,
        "gives_up": order.assume_lost,
        "text": lines.join("\n"),
    }))
}

/// The plan of what gives something up at a node that nobody serves, and that cannot be looked at as it is, which `error` says: it may be opened once
/// that was given up.
pub(super) fn plan_unseen(directory: &Path, request: &Request, error: CliError) -> Result<Value, CliError> {
    let (what, text) = match request {
        Request::MemberRemove(order) if order.dry_run && order.assume_lost => {
            (&order.nodes, GIVEN_UP_MEMBERS)
        }
        _ => return Err(error),
    };
    let mut lines = vec![line("members", &what.join(", "))];
    lines.push(line("not known", &format!("this node cannot be looked at as it is: {error}")));
    lines.push(line("given up", text));
    Ok(
        json!({ "name": NodeConfig::read(directory)?.name, "members": what, "gives_up": true, "text": lines.join("\n") }),
    )
}

/// What an archive waits for that is left, before it acknowledges.
fn waits_for(one: &Waiting) -> String {
    let url = &one.url;
    if one.unheard.is_empty() {
        return format!(
            "{url} acknowledges nothing before everybody who may take over is known to have heard of it"
        );
    }
    let unheard = one.unheard.join(", ");
    format!(
        "{url} acknowledges nothing before it is known that these have heard of it: {unheard}; {TAKEN_OUT}"
    )
}

/// Up to where an archive holds the history, as far as is known.
fn held(url: &str, status: Option<&ArchiveStatus>, durable: u64) -> String {
    match status {
        None => format!("{url}, of which nothing is known"),
        Some(status) => {
            let error = status.error.as_ref().map_or_else(String::new, |error| format!(" ({error})"));
            format!("{url}: lsn {} of {durable}{error}", status.lsn)
        }
    }
}

fn line(what: &str, text: &str) -> String {
    format!("{what:<19} {text}")
}

const TAKEN_OUT: &str = "one that is gone for good: murphy member remove DIR MEMBER --assume-lost, or murphy archive remove DIR URL --assume-lost";
const GIVEN_UP_MEMBERS: &str = "what only they hold or have acknowledged, also what this node has lost: nobody asks them for it any more";
