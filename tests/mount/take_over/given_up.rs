//! Archives that were given up and come back, and a promotion that nobody serves.

use std::{fs, sync::Arc};

use murphy_backup::{Archive, ArchiveFence, ArchiveStore};
use murphy_fs::{Fence, FenceError, StoreUrl};
use murphy_log::{Epoch, EpochId, NodeId, SystemClock};

use super::{Region, wait_for, write_safely};

/// Seals the archive in the directory `name` as a node would that took over there, in an epoch of that number, and did nothing more.
fn seal_as_another(region: &Region, name: &str, number: u32) {
    let url: StoreUrl = region.scratch.url(name).parse().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let opened = url.open().unwrap();
        let store = ArchiveStore::new(opened.store, opened.prefix, name);
        let archive = Archive::open(store).await.unwrap();
        let node = NodeId::from_bytes([9; 16]);
        let fence = ArchiveFence::new(archive, node, Arc::new(SystemClock::new()), None);
        let next = Epoch { number, id: EpochId::from_bytes([9; 16]) };
        for _ in 0..TRIES {
            let end = fence.adopt().await.unwrap().end;
            match fence.seal(end, next).await {
                // The source has shipped an idle tick in between.
                Err(FenceError::Unavailable { .. }) => {}
                sealed => return sealed.unwrap(),
            }
        }
        panic!("{name} could not be sealed");
    });
}

/// The fear: an archive that was given up comes back with the seal of somebody who never got further, and shuts the new source out for good.
#[test]
fn an_archive_that_was_given_up_and_that_another_one_has_sealed_fences_nobody() {
    let test = "an_archive_that_was_given_up_and_that_another_one_has_sealed_fences_nobody";
    let Some(region) = Region::sown(test, "archive") else { return };
    region.kill("a");
    fs::rename(region.path("one"), region.path("away")).unwrap();
    let one = region.archives[0].clone();
    region.scratch.run(["promote", "b", "--confirm", "vol", "--assume-lost", &one]).expect_code(0);
    write_safely(&region.path("mb/new"), b"acknowledged by the second archive").unwrap();
    seal_as_another(&region, "away", 2);
    region.put_back("one");
    wait_for("the archive to be looked at", || {
        region.status("b")["archives"][0]["error"]
            .to_string()
            .contains("was given up when this node took over")
    });
    write_safely(&region.path("mb/newer"), b"acknowledged by the second archive, too").unwrap();
    region.kill("b");
    region.mount("b", &[]);
    write_safely(&region.path("mb/newest"), b"after a start").unwrap();
    region.scratch.run(["archive", "remove", "b", &one, "--assume-lost", "--confirm", "vol"]).expect_code(0);
    write_safely(&region.path("mb/last"), b"without it").unwrap();
    // A later epoch is another source's, whatever was given up.
    let two = region.archives[1].clone();
    region.scratch.run(["verify", &two]).expect_code(0);
    seal_as_another(&region, "two", 3);
    let _refused = fs::File::create(region.path("mb/lost")).and_then(|file| file.sync_all());
    wait_for("the source to end", || region.status("b")["running"].is_null());
    region.scratch.run(["serve", "b"]).expect_error(1, "another source has taken over");
}

/// The fear: a mirror is gone with the source, an archive is given up and taken out as the documents say, and the other one, which the volume was made with,
/// acknowledges nothing until that mirror is taken out, too.
#[test]
fn a_mirror_that_is_gone_stops_no_fsync_when_an_archive_is_taken_out_that_was_given_up() {
    let test = "a_mirror_that_is_gone_stops_no_fsync_when_an_archive_is_taken_out_that_was_given_up";
    let Some(region) = Region::sown(test, "archive") else { return };
    let token = region.scratch.run(["invite", "a"]).expect_code(0).stdout();
    fs::write(region.path("token"), token).unwrap();
    let blocks = region.scratch.url("bc");
    region.scratch.run(["join", "c", "--token-file", "token", "--blocks", &blocks]).expect_code(0);
    region.mount("c", &[]);
    let wanted = region.status("a")["durable_lsn"].as_u64();
    for mirror in ["b", "c"] {
        wait_for("the mirror", || region.status(mirror)["data_lsn"].as_u64() >= wanted);
    }
    region.kill("c");
    region.kill("a");
    fs::rename(region.path("one"), region.path("away")).unwrap();
    let one = region.archives[0].clone();
    region.scratch.run(["promote", "b", "--confirm", "vol", "--assume-lost", &one]).expect_code(0);
    write_safely(&region.path("mb/new"), b"acknowledged by the second archive").unwrap();
    let remove = ["archive", "remove", "b", &one, "--assume-lost", "--confirm", "vol", "--json"];
    let removed = region.scratch.run(remove).expect_code(0).json();
    assert_eq!(removed["waiting"], serde_json::json!([]), "{removed}");
    write_safely(&region.path("mb/last"), b"still acknowledged by it").unwrap();
}

/// The fear: a mirror that nobody serves is the source already, and its promotion says after a minute that it has failed.
#[test]
fn a_promotion_of_a_mirror_that_is_not_served_says_that_it_is_done() {
    let test = "a_promotion_of_a_mirror_that_is_not_served_says_that_it_is_done";
    let Some(region) = Region::sown(test, "archive") else { return };
    region.scratch.run(["umount", "mb"]).expect_code(0);
    region.kill("a");
    assert_eq!(region.promote()["epoch"], 2);
    region.mount("b", &[]);
    write_safely(&region.path("mb/new"), b"acknowledged by an archive").unwrap();
    region.assert_archives_are_those_of_b();
}

const TRIES: usize = 20;
