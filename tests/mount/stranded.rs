//! An archive that ends before the log of the mirror that takes over begins, and nobody has what lies between: the way out, and what stays.

use std::fs;

use murphy_tests::{Scratch, can_mount, free_address};

use super::mirrors::{Pair, wait_for, write_safely};

/// The fear: the volume goes on without a backup for ever, or the archive says that it holds what it never got.
#[test]
fn an_archive_that_nobody_can_bring_up_is_left_restorable_and_another_one_begins() {
    if !can_mount("an_archive_that_nobody_can_bring_up_is_left_restorable_and_another_one_begins") {
        return;
    }
    let pair = Pair::start("local");
    let scratch: &Scratch = &pair.scratch;
    let (ma, mc) = (scratch.path("ma"), scratch.path("mc"));
    let [old, new] = ["old", "new"].map(|name| format!("{}?domain={name}", scratch.url(name)));
    let archived = |node: &str| {
        let wanted = pair.status(node)["durable_lsn"].as_u64();
        wait_for("the archive", || pair.status(node)["archives"][0]["lsn"].as_u64() >= wanted);
        wanted.unwrap()
    };
    write_safely(&ma.join("early"), b"in the old archive").unwrap();
    scratch.run(["archive", "add", "ma", &old]).expect_code(0);
    archived("a");
    let (place, away) = (scratch.path("old"), scratch.path("away"));
    fs::rename(&place, &away).unwrap();
    write_safely(&ma.join("gap"), b"written while the archive was away").unwrap();
    // The mirror that takes over is seeded with a snapshot, and its log begins there.
    pair.join("a", "c", "bc");
    pair.mount("c", &free_address());
    let seeded = pair.status("a")["durable_lsn"].as_u64();
    wait_for("the mirror", || pair.status("c")["data_lsn"].as_u64() >= seeded);
    pair.kill("b");
    pair.lose_source();
    fs::remove_dir_all(&place).unwrap_or_default();
    fs::rename(&away, &place).unwrap();
    let refused = scratch.run(["promote", "c", "--confirm", "vol"]).expect_error(1, &old).stderr();
    assert!(
        refused.contains("no other archive has what comes then") && refused.contains("--assume-lost"),
        "{refused}"
    );
    scratch.run(["promote", "c", "--confirm", "vol", "--assume-lost", &old]).expect_code(0);
    wait_for("the status to say what to do", || {
        let said = pair.status("c")["archives"][0]["error"].as_str().unwrap_or_default().to_owned();
        said.contains("murphy archive remove") && said.contains("murphy archive add")
    });
    scratch.run(["archive", "remove", "mc", &old, "--confirm", "vol"]).expect_code(0);
    scratch.run(["archive", "add", "mc", &new]).expect_code(0);
    write_safely(&mc.join("after"), b"in the new archive").unwrap();
    archived("c");
    for url in [&old, &new] {
        scratch.run(["verify", url, "--data", "100"]).expect_code(0);
    }
    let restored = |directory: &str, urls: &[&str]| {
        scratch.run(["restore"].iter().chain(urls).chain(&[directory])).expect_code(0);
        let place = format!("m{directory}");
        scratch.make_dir(&place);
        scratch.run(["mount", directory, &place, "-d"]).expect_code(0);
        let names = fs::read_dir(scratch.path(&place)).unwrap();
        let mut names: Vec<_> = names.map(|item| item.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        scratch.run(["umount", &place]).expect_code(0);
        names
    };
    // What was there before the gap stays, what comes behind it is whole, and a moment within is refused with what there is.
    assert_eq!(restored("before", &[&old]), ["early"]);
    assert_eq!(restored("behind", &[&old, &new]), ["after", "early", "gap"]);
    let end = scratch.run(["restore", &old, "plan", "--dry-run", "--json"]).expect_code(0).json();
    let within = (end["position"]["lsn"].as_u64().unwrap() + 1).to_string();
    let refused = ["restore", &old, &new, "within", "--lsn", &within];
    scratch.run(refused).expect_error(1, "is beyond the archives, which cover");
    assert!(!scratch.path("within").exists());
}
