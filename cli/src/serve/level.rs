//! `--ack` of a volume that exists: what an fsync waits for, what another level would give up, and the way there.
//!
//! ```text
//!   any -> archive     every archive and every mirror knows every archive; an fsync waits for archives; they have everything; entry
//!   any -> mirror=W    mirrors/level.rs
//!   any -> local       at once
//! ```
//!
//! Whoever takes over reads and seals every archive that it knows of, whatever the level is: what counts is that it knows all of them.
//!
//! Invariants:
//! - A level is in force when the answer says so, and not before: then everything so far has what it promises, and so does what comes.
//! - Nobody has to answer for `local`, and it waits behind nobody: an order that waits for somebody is ended, and told so.
//! - A node that nobody serves cannot know what others hold: only `local` is set there.

use std::{sync::PoisonError, time::Duration};

use murphy_fs::StoreUrl;
use serde_json::{Value, json};

use super::host::{Host, outside};
use crate::{
    archives::{by_archives, check_outlives},
    control::AckOrder,
    error::{CliError, failed},
    node::failure_domain,
    places::local_url,
    settings::{Ack, Settings},
};

/// Shows what an fsync waits for, or changes it.
pub(super) fn ack(host: &Host, order: &AckOrder) -> Result<Value, CliError> {
    let Some(to) = order.level else { return describe(host) };
    if host.mirroring.is_mirror() {
        let source = host.mirroring.source_place();
        return Err(CliError::new(format!(
            "this node is a mirror of {source}, and changes nothing by itself"
        ))
        .hint("run murphy ack there, at the source"));
    }
    host.mirroring.check_source()?;
    if order.dry_run {
        return Change::of(host, to)?.plan(host);
    }
    let overtaking = match to {
        Ack::Local => {
            // One that would be refused ends nobody.
            Change::confirmed(host, to, order)?;
            Some(host.mirroring.overtake())
        }
        Ack::Mirrors(_) | Ack::Archive => None,
    };
    let _turn = host.level_turn.lock().unwrap_or_else(PoisonError::into_inner);
    Change::confirmed(host, to, order)?.perform(host)?;
    drop(overtaking);
    describe(host)
}

/// Refuses a change that would be refused without anything having been tried.
pub(super) fn check(host: &Host, order: &AckOrder) -> Result<(), CliError> {
    order.level.map_or(Ok(()), |to| Change::confirmed(host, to, order).map(|_| ()))
}

/// A change of the level.
struct Change {
    /// What the log names.
    set: Ack,
    /// What is waited for; another level than the log names if that is not in force yet.
    waits: Ack,
    to: Ack,
}

impl Change {
    fn of(host: &Host, to: Ack) -> Result<Change, CliError> {
        let (set, waits) = (Settings::of(host.volume())?.ack, host.mirroring.waited_for()?);
        if waits != set && ![set, waits, Ack::Local].contains(&to) {
            return Err(CliError::new(format!(
                "{set} was set and is not in force yet: fsync waits for {waits}"
            ))
            .hint(format!(
                "murphy ack DIR {set} waits until it is; murphy ack DIR {waits} goes back; from there to {to}"
            )));
        }
        Ok(Change { set, waits, to })
    }

    /// The same, refused if it gives up what nobody has agreed to give up, or if nobody could do it.
    fn confirmed(host: &Host, to: Ack, order: &AckOrder) -> Result<Change, CliError> {
        let change = Change::of(host, to)?;
        change.check(host, order)?;
        Ok(change)
    }

    /// Whether it gives up what is promised now.
    fn weakens(&self) -> bool {
        self.to != self.set && !self.waits.is_kept_by(self.to)
    }

    fn check(&self, host: &Host, order: &AckOrder) -> Result<(), CliError> {
        if self.weakens() && !order.confirmed {
            let meanwhile = "what an fsync waits for was changed meanwhile";
            return Err(CliError::new(meanwhile).hint("run it again: it says what would be given up now"));
        }
        if self.to == Ack::Local || host.ships() {
            return Ok(());
        }
        Err(CliError::new(format!(
            "nobody serves this node, so nobody can say who has what {} promises",
            self.to
        ))
        .hint("murphy serve or murphy mount starts it; murphy ack DIR local waits for nobody, here too"))
    }

    fn plan(&self, host: &Host) -> Result<Value, CliError> {
        Ok(json!({
            "name": Settings::of(host.volume())?.name,
            "ack": self.set,
            "waits_for": self.waits,
            "to": self.to,
            "weakens": self.weakens(),
            "text": self.text(),
        }))
    }

    fn text(&self) -> String {
        let Change { waits, to, .. } = self;
        let kept = match (waits, to) {
            (Ack::Mirrors(_), Ack::Local) | (Ack::Archive, Ack::Local) => {
                "what is written from then on, and was not copied yet, is lost with this node"
            }
            (Ack::Mirrors(_), Ack::Mirrors(_)) => "fewer copies have what is written from then on",
            (Ack::Mirrors(_), Ack::Archive) => {
                "mirrors may lack what is written from then on: whoever takes over needs an archive that has it"
            }
            (Ack::Archive, Ack::Mirrors(_)) => {
                "archives may lack what is written from then on: a restore may lose what mirrors have"
            }
            (Ack::Local, _) | (Ack::Archive, Ack::Archive) => "",
        };
        let lines = [format!("fsync waits         for {waits}, and for {to} from then on")];
        let kept = Some(format!("given up            {kept}")).filter(|_| self.weakens());
        lines.into_iter().chain(kept).collect::<Vec<_>>().join("\n")
    }

    fn perform(&self, host: &Host) -> Result<(), CliError> {
        host.mirroring.check_mandate()?;
        if self.to == Ack::Local {
            return host.runtime.block_on(host.mirroring.wait_for_nobody());
        }
        if self.to != self.set && self.to == self.waits {
            return host.runtime.block_on(host.mirroring.stay_with(self.to));
        }
        let changing = host.runtime.block_on(async {
            match self.to {
                to if to == self.set => self.confirm(host).await,
                Ack::Archive => wait_for_archives(host).await,
                Ack::Mirrors(wanted) => host.mirroring.wait_for_mirrors(wanted).await,
                Ack::Local => Ok(()),
            }
        });
        changing.map_err(|error| self.explain(host, error))
    }

    /// Returns when what is set is in force, and everything so far has it.
    async fn confirm(&self, host: &Host) -> Result<(), CliError> {
        host.mirroring.confirm_level().await?;
        if self.to == Ack::Archive {
            let by = by_archives(&host.archives, outside(&host.node)?);
            host.mirroring.acknowledged_by(&*by).await?;
        }
        Ok(())
    }

    /// Says in which state it was left.
    fn explain(&self, host: &Host, error: CliError) -> CliError {
        let state = Settings::of(host.volume()).and_then(|now| Ok((now.ack, host.mirroring.waited_for()?)));
        let (to, message) = (self.to, error.message.clone());
        let Ok((set, waits)) = state else { return error };
        let (text, way) = if set != to {
            (
                format!("nothing was changed, fsync waits for {waits} as before: {message}"),
                "a mirror that is gone for good: murphy member remove DIR MEMBER --assume-lost; an archive: murphy archive remove DIR URL".to_owned(),
            )
        } else if waits != to {
            (
                format!("{to} is set and not in force yet, fsync waits for {waits} until then: {message}"),
                format!(
                    "it takes effect by itself, and murphy ack DIR {to} waits for that; murphy ack DIR {waits} goes back; who is gone for good is taken out with murphy member remove DIR MEMBER --assume-lost, or murphy archive remove DIR URL --assume-lost"
                ),
            )
        } else {
            (
                format!("fsync waits for {to} from now on, and not everything so far has it: {message}"),
                format!("murphy ack DIR {to} waits for that again; murphy ack DIR local waits for nobody"),
            )
        };
        let mut error = error;
        error.message = text;
        error.hint.get_or_insert(way);
        error
    }
}

/// Goes over to archives.
async fn wait_for_archives(host: &Host) -> Result<(), CliError> {
    let mirroring = &host.mirroring;
    // One that is added while it is not known to all would acknowledge what nobody looks for there.
    let _list = host.archives.unchanged().await;
    check_places(host)?;
    let refused = |errno| CliError::new(format!("the log does not go on: {errno:?}"));
    let lsn = host.volume().durable_here().await.map_err(refused)?;
    let known =
        async { tokio::try_join!(host.archives.all_hold(lsn, KNOWN_MAX), mirroring.heard_by_all(lsn)) };
    mirroring.unless_overtaken(known).await?;
    let by = by_archives(&host.archives, outside(&host.node)?);
    mirroring.wait_for_archives(&by).await?;
    mirroring.acknowledged_by(&*by).await
}

/// As at `format`: a full archive must outlive the source.
fn check_places(host: &Host) -> Result<(), CliError> {
    let (node, settings) = (&host.node, Settings::of(host.volume())?);
    let own = [failure_domain(&node.directory)?, node.config.blocks.failure_domain()];
    let full = settings.archives.iter().filter(|archive| archive.may_acknowledge());
    let urls = full.map(|shared| local_url(&node.config, shared)).collect::<Result<Vec<StoreUrl>, _>>()?;
    let add = "murphy archive add DIR URL makes one, in another account or with ?domain=LABEL";
    check_outlives(&own, urls.iter()).map_err(|error| error.hint(add))
}

/// What is set, what is waited for now, and who counts.
fn describe(host: &Host) -> Result<Value, CliError> {
    let (settings, waits) = (Settings::of(host.volume())?, host.mirroring.waited_for()?);
    let is_mirror = host.mirroring.is_mirror();
    let mirrors = if is_mirror { Vec::new() } else { host.mirroring.describe_acknowledging()? };
    let now = match waits {
        Ack::Local => "this node only".to_owned(),
        Ack::Mirrors(wanted) => {
            let (asked, of) = host.mirroring.asked_of(wanted)?;
            format!("{asked} of {of} mirrors")
        }
        Ack::Archive => "an archive in another failure domain".to_owned(),
    };
    let domains = outside(&host.node)?;
    let mut archives = Vec::new();
    for shared in &settings.archives {
        let domain = local_url(&host.node.config, shared)?.failure_domain().to_string();
        let counts = waits == Ack::Archive && shared.may_acknowledge() && !domains.contains(&domain);
        archives.push(json!({ "url": shared.url, "acknowledges": counts }));
    }
    serde_json::to_value(json!({
        "name": settings.name,
        "ack": settings.ack,
        "waits_for": waits,
        "in_force": settings.ack == waits,
        "now": if is_mirror { format!("nothing: a mirror of {}", host.mirroring.source_place()) } else { now },
        "sync": settings.sync,
        "mirrors": mirrors,
        "archives": archives,
    }))
    .map_err(failed)
}

/// So long archives get to have what names them.
const KNOWN_MAX: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests;
