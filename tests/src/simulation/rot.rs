//! Packs in the block stores of nodes that are lost, cut or changed, and the judge of what a reader is given then.
//!
//! Invariants:
//! - While the world lives, only what the archive has that no disaster befalls is damaged: every byte comes back from there, and nobody excuses
//!   a read that fails.
//! - No bit of a pack's version flips: an object that says that it is of a later version is replaced by nobody, and a restore over a store that
//!   has one lacks it.
//! - At the end everything is damaged everywhere: a read gives the acknowledged bytes or says that it cannot, never other ones.

use std::{sync::Arc, time::Duration};

use murphy_fs::Volume;
use murphy_log::Position;
use object_store::{ObjectStoreExt, path::Path};

use super::{
    Canary,
    account::{Account, Damage},
    client::{change_a_byte, compare},
    stage::Stage,
    world::World,
};

impl World {
    /// Loses, cuts or changes packs in the nodes' own stores now and then, until `end`, of those that `spared` has.
    pub(super) async fn damage_packs(self: Arc<Self>, spared: Arc<Account>, end: Duration) {
        let stage = Arc::clone(self.stage());
        loop {
            tokio::time::sleep(Duration::from_millis(PAUSE_MS + stage.below_apart(PAUSE_MS))).await;
            if stage.now() >= end {
                return;
            }
            let host = stage.below_apart(self.ground.stores.len() as u64) as usize;
            let store = self.ground.store(host);
            let safe = spared.names().await;
            let is_safe =
                |pack: &Path| in_archive(pack).is_some_and(|pack| safe.binary_search(&pack).is_ok());
            let packs: Vec<Path> = store.names().await.into_iter().filter(is_safe).collect();
            if packs.is_empty() {
                continue;
            }
            let pack = &packs[stage.below_apart(packs.len() as u64) as usize];
            let Ok(meta) = store.objects().head(pack).await else { continue };
            let how = match stage.below_apart(3) {
                0 => Damage::Lost,
                1 => Damage::Truncated,
                _ => Damage::Flipped(8 * flipped_byte(&stage, meta.size) + stage.below_apart(8)),
            };
            stage.disaster(kind_of(how), format!("{}: {pack}: {how:?}", store.name));
            if let Err(error) = store.damage(pack, how, true).await {
                stage.note(format!("not damaged: {error}"));
            }
        }
    }

    /// Damages every pack in every place, and reads the certain files of the history that ends at `tip` from `volume`.
    pub(super) async fn judge_rot(&self, leader: usize, volume: &Volume, tip: &Position) {
        let stage = self.stage();
        let files = stage.judge(|judge, _| Ok(judge.files())).unwrap_or_default();
        let is_held =
            |position: &Position| stage.judge(|judge, _| Ok(judge.is_on(position, tip))) == Some(true);
        let files: Vec<_> = files.into_iter().filter(|(_, certain)| is_held(&certain.position)).collect();
        for account in self.ground.every_archive().into_iter().chain([self.ground.store(leader)]) {
            damage_every_pack(stage, &account).await;
        }
        if stage.has(Canary::ForeignByte)
            && let Some((name, _)) = files.iter().find(|(_, certain)| certain.length > 0)
        {
            change_a_byte(volume, name).await;
        }
        for (name, certain) in &files {
            match tokio::time::timeout(READ_MAX, compare(volume, name, certain)).await {
                Ok(Ok(())) => stage.count("files that were read around packs that are all damaged"),
                Ok(Err(error)) if error.contains("cannot be") => {
                    stage.count("files that were called unreadable when all packs were damaged");
                }
                Ok(Err(error)) => return stage.violated(&format!("foreign: {error}")),
                Err(_) => return stage.violated(&format!("stall: {name} is not read in {READ_MAX:?}")),
            }
        }
    }
}

async fn damage_every_pack(stage: &Stage, account: &Account) {
    let packs = account.names().await.into_iter().filter(|name| name.as_ref().contains("/packs/"));
    for pack in packs {
        let how = match stage.below_apart(8) {
            0 => Damage::Lost,
            1 => Damage::Truncated,
            _ => Damage::Flipped(stage.below_apart(1 << 20)),
        };
        if let Err(error) = account.damage(&pack, how, true).await {
            stage.note(format!("not damaged: {error}"));
        }
    }
}

/// A byte of a pack of this length, but none that says of which version it is.
fn flipped_byte(stage: &Stage, length: u64) -> u64 {
    let byte = stage.below_apart(length.max(1));
    let version = length.saturating_sub(VERSION_FROM_END);
    if (version..version + 2).contains(&byte) { 0 } else { byte }
}

/// What an archive calls this pack of a block store.
fn in_archive(pack: &Path) -> Option<Path> {
    Some(Path::from(format!("archive/{}", pack.as_ref().strip_prefix("blocks/")?)))
}

fn kind_of(how: Damage) -> &'static str {
    match how {
        Damage::Lost => "a pack lost in a block store",
        Damage::Truncated => "a pack truncated in a block store",
        Damage::Flipped(_) => "a pack with a flipped bit in a block store",
    }
}

/// Where a pack says of which version it is, as its format has it.
const VERSION_FROM_END: u64 = 24;
/// Disasters come after at least so long, and at most twice that.
const PAUSE_MS: u64 = 1500;
/// A read tries every place, and says so.
const READ_MAX: Duration = Duration::from_secs(200);
