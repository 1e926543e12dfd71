//! A promotion that an earlier attempt of the same mirror has bound: where the old epoch ends is settled in an archive.

use std::{fs, sync::Arc};

use murphy_backup::{Archive, ArchiveFence, ArchiveStore};
use murphy_fs::{Fence, StoreUrl};
use murphy_log::{Clock, Epoch, EpochId, Position, SystemClock};
use murphy_mirror::Identity;
use murphy_tests::{can_mount, free_address, write_summed};
use serde_json::{Value, json};

use super::mirrors::{Pair, wait_for, write_safely};

/// Does what an attempt of mirror `b` did that sealed the archive and died: its epoch is remembered, and the archive ends the one before.
fn seal_as_b(pair: &Pair, url: &str) -> Position {
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let remembered = json!([{ "number": next.number, "id": next.id.to_string() }]);
    write_summed(&pair.scratch.path("b/promoting.json"), &remembered);
    let identity = Identity::load_existing(&pair.scratch.path("b")).unwrap().unwrap();
    let opened = url.parse::<StoreUrl>().unwrap().open().unwrap();
    let store = ArchiveStore::new(opened.store, opened.prefix, url);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let archive = Archive::open(store).await.unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let fence = ArchiveFence::new(archive, identity.node(), clock, None);
        let end = fence.adopt().await.unwrap().end;
        fence.seal(end, next).await.unwrap();
        end
    })
}

/// The fear: a mirror whose first attempt has sealed an archive fetches at the second one what another mirror holds beyond, and begins its
/// epoch behind it: the archive never gets those entries, or takes them for another history.
#[test]
fn what_comes_behind_a_settled_end_is_not_fetched_from_another_mirror() {
    if !can_mount("what_comes_behind_a_settled_end_is_not_fetched_from_another_mirror") {
        return;
    }
    let pair = Pair::start("mirror=1");
    pair.join("a", "c", "bc");
    pair.mount("c", &free_address());
    let (ma, mb) = (pair.scratch.path("ma"), pair.scratch.path("mb"));
    write_safely(&ma.join("early"), b"everybody has this").unwrap();
    wait_for("the mirrors' addresses at the source", || {
        let mirrors = pair.status("a")["mirrors"].clone();
        let known = |mirror: &Value| mirror["addresses"].as_array().is_some_and(|all| !all.is_empty());
        mirrors.as_array().is_some_and(|all| all.len() == 2 && all.iter().all(known))
    });
    let url = format!("{}?domain=elsewhere", pair.scratch.url("archive"));
    pair.scratch.run(["archive", "add", "ma", &url]).expect_code(0);
    pair.settle();
    pair.kill("b");
    let held = pair.status("b")["position"].clone();
    wait_for("the archive", || pair.status("a")["archives"][0]["lsn"].as_u64() >= held["lsn"].as_u64());
    // From here on the archive gets nothing.
    let (place, away) = (pair.scratch.path("archive"), pair.scratch.path("away"));
    fs::rename(&place, &away).unwrap();
    write_safely(&ma.join("late"), b"only the other mirror has acknowledged this").unwrap();
    let wanted = pair.status("a")["durable_lsn"].as_u64();
    wait_for("the other mirror", || pair.status("c")["data_lsn"].as_u64() >= wanted);
    let other = Identity::load_existing(&pair.scratch.path("c")).unwrap().unwrap().node().to_string();
    pair.lose_source();
    fs::remove_dir_all(&place).unwrap_or_default();
    fs::rename(&away, &place).unwrap();
    let end = seal_as_b(&pair, &url);
    pair.mount("b", &free_address());
    let settled = Some(end.lsn.get());
    assert!(held["lsn"].as_u64() <= settled && settled < wanted, "{held} {end} {wanted:?}");
    let refused =
        pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "an earlier attempt");
    assert!(refused.stderr().contains(&format!("--assume-lost {other}")), "{refused}");
    let after = pair.status("b");
    assert_eq!((&after["role"], &after["position"]), (&json!("mirror"), &held), "{after}");
    // Whoever orders it gives up what only the other mirror has; what the archive ended with goes on.
    pair.scratch.run(["promote", "b", "--confirm", "vol", "--assume-lost", &other]).expect_code(0);
    assert_eq!(fs::read(mb.join("early")).unwrap(), b"everybody has this");
    let status = pair.status("b");
    assert_eq!((&status["role"], &status["position"]["epoch"]), (&json!("source"), &json!(2)), "{status}");
}
