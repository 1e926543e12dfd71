//! What answers requests, whether they come through the control socket or from the same process.
//!
//! Invariants:
//! - A request is answered the same way whoever has the node open.

use std::time::Duration;

use serde_json::Value;

use super::{host::Host, level, removals, tasks};
use crate::{
    control::{Handler, Replies, Request},
    error::{CliError, failed},
};

impl Handler for Host {
    fn handle(&self, request: Request, replies: &mut dyn Replies) -> Result<Value, CliError> {
        let _inside = if request.outlives_nobody() { None } else { Some(self.enter()?) };
        match request {
            Request::Status => self.status(),
            Request::Flush => {
                self.flush(&mut |progress| replies.progress(progress))?;
                Ok(serde_json::json!({ "durable_lsn": self.volume().durable().lsn.get() }))
            }
            Request::Mount(request) => {
                self.mount(&request)?;
                Ok(serde_json::json!({ "mounted": request.path, "pid": std::process::id() }))
            }
            Request::Unmount { path } => self.unmount(&path, replies),
            Request::Fsck { data } => tasks::fsck(self, data, replies),
            Request::Tree(request) => {
                let left_out = request.perform(self.volume(), &self.runtime)?;
                Ok(serde_json::json!({ "left_out": left_out }))
            }
            Request::Dump { path } => tasks::dump(self, path.as_deref(), replies),
            Request::Invite { role, addresses, expires_secs } => {
                let role = role.parse().map_err(CliError::usage)?;
                let token = self.mirroring.invite(role, &addresses, Duration::from_secs(expires_secs))?;
                Ok(serde_json::json!({ "token": token }))
            }
            Request::Members => serde_json::to_value(self.mirroring.list_members()).map_err(failed),
            Request::MemberRemove(order) => removals::members(self, &order, replies),
            Request::Ack(order) => level::ack(self, &order),
            Request::Promote(order) => self.promote(&order),
            Request::Entries { from } => tasks::entries(self, from, replies),
            Request::ArchiveAdd { url, log_only } => tasks::add_archive(self, &url, log_only),
            Request::ArchiveRemove(order) => removals::archive(self, &order),
            Request::ArchiveSnapshot { url } => tasks::snapshot_archive(self, url.as_deref()),
        }
    }

    fn is_passing(&self) -> bool {
        self.takes_no_orders()
    }
}
