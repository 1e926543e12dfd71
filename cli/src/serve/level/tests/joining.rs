//! When an archive that was added begins to acknowledge, while mirrors have not heard of it.

use std::task::Poll;

use futures::poll;
use murphy_log::{Clock, SystemClock};

use super::*;
use crate::{
    config::NodeConfig,
    control::ArchiveRemoval,
    serve::{
        joining::{join_later, wait_after_taking_over},
        removals::archive,
        tasks::{add_archive, hand_over, remove_archive, remove_handed_over},
    },
};

/// A URL in a failure domain of its own.
fn url(scene: &Scene, name: &str) -> String {
    format!("file://{}?domain={name}", scene.folder.path().join(name).display())
}

fn archives(scene: &Scene) -> Vec<SharedArchive> {
    Settings::of(scene.host.volume()).unwrap().archives
}

/// Whether archives acknowledge everything so far, each of which has it.
fn acknowledges(scene: &Scene) -> bool {
    let by = by_archives(&scene.host.archives, outside(&scene.host.node).unwrap());
    scene.runtime.block_on(async {
        let lsn = scene.host.volume().durable_here().await.unwrap();
        scene.host.archives.all_hold(lsn, PATIENCE).await.unwrap();
        by.acknowledged(lsn, Duration::from_millis(200)).await.is_ok()
    })
}

/// One more entry.
fn write(scene: &Scene) {
    let before = scene.host.volume().durable().lsn;
    let set = vec![("test".to_owned(), Some(before.to_string()))];
    scene.runtime.block_on(scene.host.volume().change_settings(set).wait()).unwrap();
    assert!(scene.runtime.block_on(scene.host.volume().durable_here()).unwrap() > before);
}

/// Adds an archive that is joining, and that nobody lets acknowledge.
fn add_joining(scene: &Scene, url: &str) {
    let there: StoreUrl = url.parse().unwrap();
    let joining = SharedArchive { joining: true, ..scene.host.archives.create(&there, false).unwrap() };
    let listed = scene.host.archives.change(|list| {
        list.push(joining.clone());
        Ok(())
    });
    scene.runtime.block_on(listed).unwrap();
    scene.host.archives.start_at(joining, there).unwrap();
}

fn wait_until(what: &str, is_done: impl Fn() -> bool) {
    let clock = SystemClock::new();
    let until = clock.monotonic() + PATIENCE;
    while !is_done() {
        assert!(clock.monotonic() < until, "waited for {what}");
        thread::yield_now();
    }
}

/// The fear: an archive is given up, another one is added and acknowledges at once; the first one answers again, and a mirror that was away the
/// whole time takes over through it, without asking anybody what the other one has acknowledged.
#[test]
fn an_archive_that_follows_one_that_was_given_up_acknowledges_once_every_mirror_has_heard_of_it() {
    let scene = Scene::new(2).at(Ack::Archive);
    remove_archive(&scene.host, &archives(&scene)[0].url, true).unwrap();
    let near = url(&scene, "near");
    thread::scope(|scope| {
        let adding = scope.spawn(|| add_archive(&scene.host, &near, false));
        wait_until("the list", || scene.host.archives.ships_to(&near));
        scene.host.mirroring.has_everything(MIRRORS[0]);
        assert!(!acknowledges(&scene), "{} does not know of it", MIRRORS[1]);
        assert!(archives(&scene)[0].joining);
        scene.while_they_follow(|| adding.join().unwrap()).unwrap();
    });
    assert!(!archives(&scene)[0].joining);
    scene.fsync().unwrap();
}

/// The same for one that had been added by then, and waited for the one that is given up.
#[test]
fn an_archive_that_waited_for_one_that_is_given_up_waits_for_every_mirror_then() {
    let scene = Scene::new(1).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].url.clone(), url(&scene, "near"));
    add_joining(&scene, &near);
    remove_archive(&scene.host, &far, true).unwrap();
    assert!(archives(&scene)[0].joining && !acknowledges(&scene));
    join_later(&scene.host.archives, &scene.host.mirroring, outside(&scene.host.node).unwrap());
    scene.while_they_follow(|| wait_until("it to acknowledge", || !archives(&scene)[0].joining));
    scene.fsync().unwrap();
}

/// The fear: whoever lags a little behind under load never has everything so far, and nobody acknowledges as long as that goes on. All that he needs is
/// the entry that names the archive.
#[test]
fn an_archive_acknowledges_once_everybody_has_the_entry_that_names_it_however_far_they_lag() {
    let scene = Scene::new(1).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].url.clone(), url(&scene, "near"));
    add_archive(&scene.host, &near, false).unwrap();
    let named = scene.host.archives.named(&near).unwrap();
    remove_archive(&scene.host, &far, true).unwrap();
    assert!(archives(&scene)[0].joining);
    scene.host.mirroring.has_up_to(MIRRORS[0], named);
    wait_until("it to acknowledge", || {
        write(&scene);
        !archives(&scene)[0].joining
    });
    assert!(scene.host.mirroring.unheard(named.next()).len() == 1, "it has heard of nothing else");
    scene.fsync().unwrap();
}

/// The fear: an archive from which somebody restores, and takes over, has never heard of the one that acknowledges.
#[test]
fn an_archive_that_was_added_waits_for_every_other_one_too() {
    let scene = Scene::new(0).at(Ack::Archive);
    let (far, log_only) = (archives(&scene)[0].url.clone(), url(&scene, "log"));
    add_archive(&scene.host, &log_only, true).unwrap();
    remove_archive(&scene.host, &far, true).unwrap();
    let (there, away) = (scene.folder.path().join("log"), scene.folder.path().join("log.away"));
    std::fs::rename(&there, &away).unwrap();
    let near = url(&scene, "near");
    thread::scope(|scope| {
        let adding = scope.spawn(|| add_archive(&scene.host, &near, false));
        wait_until("the list", || scene.host.archives.ships_to(&near));
        assert_eq!(archives(&scene).iter().map(|one| one.joining).collect::<Vec<_>>(), [false, true]);
        std::fs::rename(&away, &there).unwrap();
        adding.join().unwrap().unwrap();
    });
    scene.fsync().unwrap();
}

/// The fear: an archive that dies with the source acknowledges nothing, is taken for one that could, and the one that was added waits for it for ever.
#[test]
fn an_archive_that_dies_with_the_source_is_not_waited_for() {
    let scene = Scene::new(0).at(Ack::Archive);
    let far = archives(&scene)[0].url.clone();
    let beside = format!("file://{}", scene.folder.path().join("beside").display());
    add_archive(&scene.host, &beside, false).unwrap();
    let refused = remove_archive(&scene.host, &far, false).unwrap_err();
    assert!(refused.message.contains("it is the last archive"), "{refused}");
    remove_archive(&scene.host, &far, true).unwrap();
    add_archive(&scene.host, &url(&scene, "near"), false).unwrap();
    scene.fsync().unwrap();
}

/// The fear: one archive was cut off when another one was added, and those that knew of both burn down. Whoever takes over through the one that
/// was cut off seals nothing else, and the new one goes on acknowledging to the source before.
#[test]
fn an_archive_that_one_which_is_given_up_vouched_for_waits_for_the_archives_that_have_not_heard_of_it() {
    let scene = Scene::new(0).at(Ack::Archive);
    let (far, cut, near) = (archives(&scene)[0].url.clone(), url(&scene, "cut"), url(&scene, "near"));
    add_archive(&scene.host, &cut, false).unwrap();
    let (there, away) = (scene.folder.path().join("cut"), scene.folder.path().join("cut.away"));
    std::fs::rename(&there, &away).unwrap();
    add_archive(&scene.host, &near, false).unwrap();
    assert!(archives(&scene).iter().all(|one| !one.joining), "the first one vouches for it");
    let removed = remove_archive(&scene.host, &far, true).unwrap();
    assert_eq!(removed["not_known_to"], json!([cut]));
    let joining: Vec<(String, bool)> =
        archives(&scene).into_iter().map(|one| (one.url, one.joining)).collect();
    assert_eq!(joining, [(cut, false), (near.clone(), true)], "whom everybody knows waits for nobody");
    let by = by_archives(&scene.host.archives, outside(&scene.host.node).unwrap());
    let lsn = scene.host.volume().durable().lsn;
    let acknowledged = scene.runtime.block_on(by.acknowledged(lsn, Duration::from_millis(200)));
    assert!(acknowledged.is_err(), "{acknowledged:?}");
    std::fs::rename(&away, &there).unwrap();
    wait_until("it to acknowledge", || archives(&scene).iter().all(|one| !one.joining));
    scene.fsync().unwrap();
}

/// The same for a mirror that was away.
#[test]
fn an_archive_that_one_which_is_given_up_vouched_for_waits_for_the_mirrors_that_have_not_heard_of_it() {
    let scene = Scene::new(1).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].url.clone(), url(&scene, "near"));
    add_archive(&scene.host, &near, false).unwrap();
    assert!(!archives(&scene)[1].joining && acknowledges(&scene));
    let log_only = url(&scene, "log");
    add_archive(&scene.host, &log_only, true).unwrap();
    remove_archive(&scene.host, &log_only, true).unwrap();
    assert!(!archives(&scene)[1].joining, "one that acknowledged nothing vouched for nobody");
    remove_archive(&scene.host, &far, true).unwrap();
    assert!(archives(&scene)[0].joining && !acknowledges(&scene));
    scene.while_they_follow(|| wait_until("it to acknowledge", || !archives(&scene)[0].joining));
    scene.fsync().unwrap();
}

/// The fear: the source has started again, a mirror is away, perhaps for good, and an archive is given up: the other one, which everybody has known since the
/// volume was made, acknowledges nothing any more, and every fsync fails until the mirror is taken out.
#[test]
fn an_archive_that_everybody_was_seen_to_know_needs_nobodys_word_afterwards() {
    let scene = Scene::new(0).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].url.clone(), url(&scene, "near"));
    add_archive(&scene.host, &near, false).unwrap();
    wait_until("everybody to know it", || archives(&scene)[1].known);
    // One that joins gets the whole log; it has not been heard of since.
    scene.host.mirroring.admit(MIRRORS[0]);
    let removed = remove_archive(&scene.host, &far, true).unwrap();
    assert_eq!(removed["waiting"], json!([]), "{removed}");
    assert!(!archives(&scene)[0].joining && acknowledges(&scene));
    scene.fsync().unwrap();
}

/// The answer names who stands in the way of the others.
#[test]
fn an_archive_that_waits_again_says_for_whom() {
    let scene = Scene::new(1).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].url.clone(), url(&scene, "near"));
    add_archive(&scene.host, &near, false).unwrap();
    let order = |dry_run| ArchiveRemoval { url: far.clone(), assume_lost: true, dry_run, confirmed: true };
    let plan = archive(&scene.host, &order(true)).unwrap()["text"].to_string();
    assert!(plan.contains(&MIRRORS[0].to_string()) && plan.contains("member remove"), "{plan}");
    let removed = archive(&scene.host, &order(false)).unwrap();
    let waits_for = json!([{ "archive": near, "waits_for": [MIRRORS[0].to_string()] }]);
    assert_eq!(removed["waiting"], waits_for, "{removed}");
}

/// The same for an archive that was given up by whoever took over.
#[test]
fn with_an_archive_that_was_given_up_in_a_take_over_goes_its_word() {
    let scene = Scene::new(1).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].url.clone(), url(&scene, "near"));
    add_archive(&scene.host, &near, false).unwrap();
    let joining = || archives(&scene).iter().map(|one| one.joining).collect::<Vec<_>>();
    let take_over = |given_up: &str| {
        let given_up = BTreeSet::from([given_up.to_owned()]);
        wait_after_taking_over(&scene.host.archives, &given_up, scene.runtime.handle()).unwrap();
    };
    take_over("s3://removed-long-ago");
    assert_eq!(joining(), [false, false]);
    take_over(&far);
    assert_eq!(joining(), [false, true], "everybody has known the first one since the volume was made");
}

/// A restore writes nothing of that, and a promotion may be killed before it does: it is seen to when the node is started.
#[test]
fn a_source_that_starts_after_a_take_over_takes_no_word_of_an_archive_that_was_given_up() {
    let scene = Scene::new(1).at(Ack::Archive);
    let far = archives(&scene)[0].url.clone();
    add_archive(&scene.host, &url(&scene, "near"), false).unwrap();
    let taken_over = scene.folder.path().join("taken over");
    crash(&scene.directory, &taken_over);
    let _back = ["far", "near"].map(|name| take_away(&scene, name));
    let mut config = NodeConfig::read(&taken_over).unwrap();
    config.archives_given_up.insert(far);
    config.write(&taken_over).unwrap();
    let host = serve(&taken_over, &NodeOptions::default(), &scene.runtime);
    let listed = Settings::of(host.volume()).unwrap().archives;
    assert_eq!(listed.iter().map(|one| one.joining).collect::<Vec<_>>(), [false, true]);
    host.mirroring.stop();
}

/// The fear: the one that vouched is given up between its word and what is done with it.
#[test]
fn the_word_of_an_archive_that_is_given_up_meanwhile_lets_nobody_acknowledge() {
    let scene = Scene::new(1).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].url.clone(), url(&scene, "near"));
    add_archive(&scene.host, &near, false).unwrap();
    let before = scene.host.archives.removals();
    remove_archive(&scene.host, &far, true).unwrap();
    let joined =
        scene.runtime.block_on(scene.host.archives.let_acknowledge(std::slice::from_ref(&near), before));
    assert!(joined.unwrap_err().message.contains("was removed meanwhile"));
    assert!(archives(&scene)[0].joining);
}

/// A volume that waits for `far`, which takes nothing for the time being, and `near`, which is joining; how `far` comes back, and an entry that it lacks.
fn with_far_away() -> (Scene, [String; 2], impl Fn(), Lsn) {
    let scene = Scene::new(0).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].url.clone(), url(&scene, "near"));
    add_joining(&scene, &near);
    // Neither is known to have it before it is open.
    write(&scene);
    assert!(acknowledges(&scene));
    let come_back = take_away(&scene, "far");
    write(&scene);
    let lsn = scene.runtime.block_on(scene.host.volume().durable_here()).unwrap();
    (scene, [far, near], come_back, lsn)
}

/// Lets an archive take nothing; how it comes back.
fn take_away(scene: &Scene, name: &str) -> impl Fn() + use<> {
    let (there, away) = (scene.folder.path().join(name), scene.folder.path().join(format!("{name}.away")));
    std::fs::rename(&there, &away).unwrap();
    std::fs::write(&there, b"no archive").unwrap();
    move || {
        std::fs::remove_file(&there).unwrap();
        std::fs::rename(&away, &there).unwrap();
    }
}

/// The fear: an archive is taken out, which alone had what an fsync was answered for, by an order that gives nothing up: the source dies before another one
/// has it, and whoever takes over asks only those that are left.
#[test]
fn an_archive_that_alone_has_what_was_acknowledged_is_taken_out_only_by_giving_that_up() {
    let options = NodeOptions { io_timeout: Some(Duration::from_secs(2)), ..NodeOptions::default() };
    let scene = Scene::served(0, &options).at(Ack::Archive);
    let (far, two) = (archives(&scene)[0].url.clone(), url(&scene, "two"));
    add_archive(&scene.host, &two, false).unwrap();
    let back = take_away(&scene, "two");
    write(&scene);
    scene.fsync().unwrap();
    let refused = remove_archive(&scene.host, &far, false).unwrap_err();
    assert!(refused.message.contains("nothing was changed"), "{refused}");
    assert!(refused.hint.as_ref().is_some_and(|hint| hint.contains("--assume-lost")), "{refused:?}");
    assert_eq!(archives(&scene).iter().map(|one| &one.url).collect::<Vec<_>>(), [&far, &two]);
    // It acknowledges as before, and is taken out once the other one has everything.
    write(&scene);
    scene.fsync().unwrap();
    back();
    remove_archive(&scene.host, &far, false).unwrap();
    scene.fsync().unwrap();
}

/// While it is waited for that the others have everything, what is written is acknowledged by them alone.
#[test]
fn an_archive_that_is_being_taken_out_acknowledges_nothing_more() {
    let scene = Scene::new(0).at(Ack::Archive);
    let (far, two) = (archives(&scene)[0].url.clone(), url(&scene, "two"));
    add_archive(&scene.host, &two, false).unwrap();
    let _back = take_away(&scene, "two");
    assert!(scene.host.archives.any_acknowledges(&outside(&scene.host.node).unwrap()));
    let by = by_archives(&scene.host.archives, outside(&scene.host.node).unwrap());
    write(&scene);
    let lsn = scene.host.volume().durable().lsn;
    let asked = |at_most| scene.runtime.block_on(by.acknowledged(lsn, at_most));
    asked(PATIENCE).unwrap();
    let removals = scene.host.archives.removals();
    let leaving = scene.host.archives.leave(&far);
    asked(Duration::from_millis(200)).unwrap_err();
    // Nor does anybody acknowledge by its word.
    let joined = scene.runtime.block_on(scene.host.archives.let_acknowledge(&[two], removals));
    assert!(joined.unwrap_err().message.contains("was removed meanwhile"));
    drop(leaving);
    asked(PATIENCE).unwrap();
}

/// The fear: an order is given twice, the first one ends, and the archive acknowledges for itself what the second one waits for.
#[test]
fn an_archive_acknowledges_nothing_while_a_second_order_takes_it_out() {
    let scene = Scene::new(0).at(Ack::Archive);
    let (far, two) = (archives(&scene)[0].url.clone(), url(&scene, "two"));
    add_archive(&scene.host, &two, false).unwrap();
    let _back = take_away(&scene, "two");
    let by = by_archives(&scene.host.archives, outside(&scene.host.node).unwrap());
    write(&scene);
    let lsn = scene.host.volume().durable().lsn;
    let asked = |at_most| scene.runtime.block_on(by.acknowledged(lsn, at_most));
    asked(PATIENCE).unwrap();
    let (first, second) = (scene.host.archives.leave(&far), scene.host.archives.leave(&far));
    first.check_unchanged().unwrap_err();
    drop(first);
    asked(Duration::from_millis(200)).unwrap_err();
    second.check_unchanged().unwrap();
    // Another shipper to it acknowledges.
    let shared = archives(&scene)[0].clone();
    scene.host.archives.start_at(shared, far.parse().unwrap()).unwrap();
    let refused = remove_handed_over(&scene.host, far.clone(), false, Some(second)).unwrap_err();
    assert!(refused.message.contains("nothing was changed"), "{refused}");
    assert_eq!(archives(&scene)[0].url, far);
}

/// The fear: of two archives that have what was acknowledged each is taken out because the other one has it.
#[test]
fn an_archive_stays_if_the_one_that_has_everything_is_given_up_meanwhile() {
    let scene = Scene::new(0).at(Ack::Archive);
    let far = archives(&scene)[0].url.clone();
    let [two, three] = ["two", "three"].map(|name| url(&scene, name));
    add_archive(&scene.host, &two, false).unwrap();
    add_archive(&scene.host, &three, false).unwrap();
    wait_until("everybody to know all of them", || archives(&scene).iter().all(|one| one.known));
    let _back = take_away(&scene, "three");
    write(&scene);
    let leaving = hand_over(&scene.host, &far).unwrap();
    remove_archive(&scene.host, &two, true).unwrap();
    let refused = remove_handed_over(&scene.host, far.clone(), false, leaving).unwrap_err();
    assert!(refused.message.contains("meanwhile"), "{refused}");
    assert_eq!(archives(&scene).iter().map(|one| &one.url).collect::<Vec<_>>(), [&far, &three]);
}

/// The fear: for as long as it is waited for that the others have everything no fsync is answered, and those of a healthy source fail.
#[test]
fn no_fsync_fails_because_an_archive_cannot_be_taken_out() {
    let options = NodeOptions { io_timeout: Some(Duration::from_secs(4)), ..NodeOptions::default() };
    let scene = Scene::served(0, &options).at(Ack::Archive);
    let (far, two) = (archives(&scene)[0].url.clone(), url(&scene, "two"));
    add_archive(&scene.host, &two, false).unwrap();
    let _back = take_away(&scene, "two");
    thread::scope(|scope| {
        let removing = scope.spawn(|| remove_archive(&scene.host, &far, false));
        while !removing.is_finished() {
            write(&scene);
            scene.fsync().unwrap();
        }
        let refused = removing.join().unwrap().unwrap_err();
        assert!(refused.message.contains("nothing was changed"), "{refused}");
    });
}

/// The fear: the entry that lists an archive could not be waited for, and nobody ever ships to it, because it is listed already.
#[test]
fn an_archive_that_is_listed_and_not_shipped_to_can_be_added_again() {
    let scene = Scene::new(0).at(Ack::Archive);
    let near = url(&scene, "near");
    let created = scene.host.archives.create(&near.parse().unwrap(), false).unwrap();
    let listed = scene.host.archives.change(|list| {
        list.push(SharedArchive { joining: true, ..created });
        Ok(())
    });
    scene.runtime.block_on(listed).unwrap();
    assert!(!scene.host.archives.ships_to(&near));
    add_archive(&scene.host, &near, false).unwrap();
    assert!(
        scene.host.archives.ships_to(&near) && archives(&scene).len() == 2 && !archives(&scene)[1].joining
    );
    let again = add_archive(&scene.host, &near, false).unwrap_err();
    assert!(again.message.contains("already"), "{again}");
}

/// The fear: this node has lost what an archive holds that has not answered yet, and what it has acknowledged is gone with it.
#[test]
fn an_archive_that_has_not_answered_since_the_start_is_taken_out_only_by_giving_it_up() {
    let scene = Scene::new(0).at(Ack::Archive);
    let (far, two) = (archives(&scene)[0].clone(), url(&scene, "two"));
    add_archive(&scene.host, &two, false).unwrap();
    write(&scene);
    assert!(acknowledges(&scene));
    let back = take_away(&scene, "far");
    scene.host.archives.start_at(far.clone(), far.url.parse().unwrap()).unwrap();
    let refused = remove_archive(&scene.host, &far.url, false).unwrap_err();
    assert!(refused.hint.as_ref().is_some_and(|hint| hint.contains("--assume-lost")), "{refused:?}");
    assert_eq!(archives(&scene)[0].url, far.url);
    back();
    wait_until("it to answer", || scene.host.archives.has_answered(&far.url));
    remove_archive(&scene.host, &far.url, false).unwrap();
}

/// The fear: an entry that takes an archive out could not be waited for and becomes durable later, and the archive acknowledges on.
#[test]
fn an_archive_that_the_log_does_not_list_acknowledges_nothing_however_that_came_about() {
    let scene = Scene::new(0).at(Ack::Archive);
    let (far, near) = (archives(&scene)[0].clone(), url(&scene, "near"));
    add_joining(&scene, &near);
    write(&scene);
    assert!(acknowledges(&scene));
    let decided = vec![archives(&scene)[1].clone()];
    let entry = scene.host.volume().change_settings(Settings::set_archives(&decided).unwrap());
    scene.runtime.block_on(entry.wait()).unwrap();
    scene.runtime.block_on(scene.host.archives.change(|_| Ok(()))).unwrap();
    let lsn = scene.host.volume().durable().lsn;
    wait_until("the archive", || scene.host.archives.lacking(lsn, std::slice::from_ref(&far)).is_empty());
    assert!(
        !acknowledges(&scene)
            && scene.host.archives.joining().is_some_and(|(urls, _)| urls == [near.clone()])
    );
}

/// The fear: an fsync waits for an archive that is away, another one begins to acknowledge, and the fsync fails all the same.
#[test]
fn an_archive_that_begins_to_acknowledge_helps_an_fsync_that_waits_already() {
    let (scene, [_, near], _, lsn) = with_far_away();
    let by = by_archives(&scene.host.archives, outside(&scene.host.node).unwrap());
    let archives = &scene.host.archives;
    scene.runtime.block_on(async {
        let mut waiting = by.acknowledged(lsn, PATIENCE);
        assert_eq!(poll!(&mut waiting), Poll::Pending, "it waits");
        archives.let_acknowledge(&[near], archives.removals()).await.unwrap();
        waiting.await.unwrap();
    });
}

/// The same once the one that is away is given up: the fsync goes on with whoever acknowledges then.
#[test]
fn an_fsync_goes_on_when_the_archive_is_given_up_that_it_waits_for() {
    let (scene, [far, _], _, lsn) = with_far_away();
    let by = by_archives(&scene.host.archives, outside(&scene.host.node).unwrap());
    let mut waiting = by.acknowledged(lsn, PATIENCE);
    assert_eq!(scene.runtime.block_on(async { poll!(&mut waiting) }), Poll::Pending, "it waits");
    remove_archive(&scene.host, &far, true).unwrap();
    join_later(&scene.host.archives, &scene.host.mirroring, outside(&scene.host.node).unwrap());
    scene.runtime.block_on(waiting).unwrap();
}

/// The fear: an fsync that began before an archive was taken out is acknowledged by it afterwards, and whoever takes over does not ask it.
#[test]
fn an_archive_that_is_taken_out_meanwhile_acknowledges_no_fsync_that_waited_before() {
    let (scene, [far, _], come_back, lsn) = with_far_away();
    let by = by_archives(&scene.host.archives, outside(&scene.host.node).unwrap());
    let gone: Vec<SharedArchive> = archives(&scene).into_iter().filter(|one| one.url == far).collect();
    scene.runtime.block_on(async {
        let mut waiting = by.acknowledged(lsn, PATIENCE);
        assert_eq!(poll!(&mut waiting), Poll::Pending, "it waits");
        let taken_out = scene.host.archives.change(|list| {
            list.retain(|one| one.url != far);
            Ok(())
        });
        taken_out.await.unwrap();
        come_back();
        while !scene.host.archives.lacking(lsn, &gone).is_empty() {
            tokio::task::yield_now().await;
        }
        let answer = tokio::time::timeout(Duration::from_millis(500), &mut waiting).await;
        assert!(answer.is_err(), "{answer:?}");
    });
}

const PATIENCE: Duration = Duration::from_secs(60);
