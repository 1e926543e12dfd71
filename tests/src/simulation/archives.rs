//! What people do about the archives of a volume: they add one, take one out, and begin another one where one cannot be continued.
//!
//! Invariants:
//! - Nothing is taken out unless the source says that it cannot go on with it: it shows another source, somebody has sealed it who never led, or it
//!   ends before the log begins. Then one whose account is gone for ever, or that nobody can open, goes with it, if nothing else is left that could
//!   acknowledge.
//! - What was the last one, or ends before the log begins, is replaced by one in another account, which begins with a snapshot of now.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    Level,
    account::Account,
    shipping::{Shipped, Shipping},
    world::{World, witness},
};

impl World {
    /// Adds an archive to the volume, and ships to it.
    pub(super) async fn add_archive(
        &self,
        leader: usize,
        shipping: &Arc<Shipping>,
        account: &Arc<Account>,
    ) -> bool {
        if let Err(error) = shipping.add(account).await {
            self.stage().note(format!("{} is not added: {error}", account.name));
            return false;
        }
        let home = self.hosts[leader].lock();
        let Some(process) = &home.process else { return false };
        self.stage().count("archives that were added");
        self.stage().note(format!("{} is added", account.name));
        shipping.begin(account, &process.tasks);
        true
    }

    /// Takes archives out of the volume that the source cannot go on with, and begins others in the place of those that are missed.
    pub(super) async fn look_after_archives(self: Arc<Self>) {
        loop {
            tokio::time::sleep(ARCHIVES_LOOK).await;
            if let Some((shipping, one)) = self.archive_in_the_way() {
                self.take_out(&shipping, &one).await;
            } else if self.lacks_archive.load(Ordering::Relaxed) {
                self.begin_another().await;
            }
        }
    }

    async fn take_out(&self, shipping: &Arc<Shipping>, one: &Shipped) {
        let account = &one.account;
        let is_missed = one.is_stranded() || shipping.archives().len() == 1;
        match shipping.remove(account).await {
            Ok(()) => {
                self.stage().count("archives that were taken out of the volume");
                self.stage().note(format!("{} is taken out of the volume", account.name));
                self.lacks_archive.fetch_or(is_missed, Ordering::Relaxed);
            }
            Err(error) => self.stage().note(format!("{} is not taken out: {error}", account.name)),
        }
    }

    /// Each attempt has an account of its own: nobody knows what one that failed has left behind.
    async fn begin_another(&self) {
        let Some((leader, shipping)) = self.shipping_leader() else { return };
        let account = {
            let mut replacements = self.ground.replacements.lock();
            let name = format!("archive-{}", self.ground.archives.len() + replacements.len() + 1);
            let account = Account::new(self.stage(), &name, witness(self.stage(), &name, &self.ground.keys));
            replacements.push(Arc::clone(&account));
            account
        };
        if self.add_archive(leader, &shipping, &account).await {
            self.stage().count("archives that took the place of others");
            self.lacks_archive.store(false, Ordering::Relaxed);
        }
    }

    fn shipping_leader(&self) -> Option<(usize, Arc<Shipping>)> {
        let leader = self.leader()?;
        let home = self.hosts[leader].lock();
        Some((leader, home.process.as_ref()?.shipping.clone()?))
    }

    /// One that cannot be continued, as the source says; or one that was given up and shows another source, before whose removal nothing is
    /// acknowledged through any.
    fn archive_in_the_way(&self) -> Option<(Arc<Shipping>, Arc<Shipped>)> {
        let (_, shipping) = self.shipping_leader()?;
        let archives = shipping.archives();
        let given_up = self.given_up.lock();
        let is_in_the_way = |one: &&Arc<Shipped>| {
            let is_known = given_up.contains(&one.account.name);
            one.is_stranded() || (is_known && one.shows_another_source())
        };
        // Nothing is acknowledged before another one is added, and that is not added while an fsync waits for one that is gone for ever.
        let lacks = self.ground.level == Level::Archive && self.lacks_archive.load(Ordering::Relaxed);
        let is_unreadable = |one: &Shipped| one.account.is_damaged() && one.handle.lock().is_none();
        let are_all_gone = lacks && archives.iter().all(|one| one.account.is_gone() || is_unreadable(one));
        let found = archives.iter().find(is_in_the_way).or(archives.first().filter(|_| are_all_gone))?;
        Some((shipping, Arc::clone(found)))
    }

    /// What people have not done about archives yet.
    pub(super) fn archive_to_see_to(&self) -> Option<String> {
        if let Some((_, one)) = self.archive_in_the_way() {
            return Some(format!("{} cannot be continued, and is still of the volume", one.account.name));
        }
        self.lacks_archive
            .load(Ordering::Relaxed)
            .then(|| "no archive has taken the place of another one".to_owned())
    }
}

/// People look at archives so often.
const ARCHIVES_LOOK: Duration = Duration::from_secs(3);
