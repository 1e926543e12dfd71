//! What is refused of a change of a node that nobody serves before the node is opened for it: to open it for a change writes into its log.
//!
//! Invariants:
//! - Nothing is written: not in the node, not in its stores, not where an archive is to be.
//! - What is refused here would be refused by the change itself; whatever reading cannot tell is left to that.

use std::path::Path;

use tokio::runtime::Runtime;

use super::{
    SHUTDOWN,
    host::{Host, HostOptions, Purpose},
    level, tasks,
};
use crate::{
    archives::refuse_fenced,
    control::Request,
    error::{CliError, failed},
    mirrors,
    node::Looked,
};

/// Refuses `request` at the node in `directory` if its log, or what is in the stores, says already that it cannot be.
pub(super) fn check(directory: &Path, request: &Request) -> Result<(), CliError> {
    if !request.changes() && !matches!(request, Request::ArchiveSnapshot { .. }) {
        return Ok(());
    }
    let runtime = Runtime::new().map_err(failed)?;
    // Who opens it for the change says why it cannot be opened, and may mend that.
    let Ok(Looked { node, scratch }) = Looked::open(directory, runtime.handle()) else { return Ok(()) };
    let mirroring = mirrors::at_rest(&node, runtime.handle())?.into();
    let given_up = request.given_up();
    let options = HostOptions { purpose: Purpose::Look, io_timeout: None, ends_with_mounts: false, given_up };
    let host = Host::start(node, mirroring, options, runtime.handle())?;
    let checked = refuse(&host, request);
    host.mirroring.stop();
    drop(host);
    runtime.shutdown_timeout(SHUTDOWN);
    drop(scratch);
    checked
}

fn refuse(host: &Host, request: &Request) -> Result<(), CliError> {
    if request.changes() {
        host.mirroring.check_source()?;
        refuse_fenced(host.directory())?;
    }
    match request {
        Request::ArchiveAdd { url, log_only } => tasks::check_new_archive(host, url, *log_only).map(drop),
        Request::ArchiveRemove(order) => tasks::check_removal(host, &order.url, order.assume_lost),
        Request::ArchiveSnapshot { url } => tasks::chosen_archives(host, url.as_deref()).map(drop),
        Request::MemberRemove(order) => host.mirroring.check_removable(&order.nodes),
        Request::Ack(order) => level::check(host, order),
        _ => Ok(()),
    }
}
