//! A source that goes on between two seals, two successors at once, and archives that begin where others end.

use super::*;

impl World {
    /// The frames of the source's log.
    fn frames(&self) -> Vec<Frame> {
        self.log.read(Lsn::FIRST).unwrap().map(Result::unwrap).collect()
    }

    /// Where each archive ends, and the epoch that comes then.
    async fn held(&self) -> Vec<(Lsn, murphy_log::ChainHash, Epoch)> {
        let mut held = Vec::new();
        for archive in &self.archives {
            let at = fence(archive, 8).adopt().await.unwrap();
            held.push((at.end.lsn, at.end.hash, at.epoch));
        }
        held
    }

    /// Where a restore from all archives ends.
    async fn restorable(&self) -> Position {
        let (none, zone) = (BTreeSet::new(), jiff::tz::TimeZone::UTC);
        let plan = plan_restore(&self.archives, Target::Latest, &none, &zone).await.unwrap();
        assert!(plan.problems.is_empty(), "{:?}", plan.problems);
        plan.route.end
    }

    /// Which archives are sealed, and by whom.
    async fn sealers(&self) -> Vec<(usize, NodeId)> {
        let mut sealers = Vec::new();
        for (number, archive) in self.archives.iter().enumerate() {
            let seals = fence(archive, 8).adopt().await.unwrap().seals;
            sealers.extend(seals.iter().map(|seal| (number, seal.by)));
        }
        sealers
    }
}

/// The fear: a restore has sealed one archive, the old source wakes, gets more into the others and acknowledges it; and no restore ever takes
/// over any more, or one that forgets that.
#[tokio::test(start_paused = true)]
async fn what_was_archived_between_two_seals_of_a_restore_goes_on_in_the_new_epoch() {
    for sealed in [0, 1, 2] {
        for requests in 1.. {
            let context = format!("archive {sealed} was sealed first, dead at request {requests}");
            let world = World::new(&[6, 6, 6], 0).await;
            let frames = world.frames();
            let (base, all) = (frames[5].position(), world.log.tail().position);
            let (fences, _) = world.restored().await;
            fences[sealed].seal(base, epoch(2, 80)).await.unwrap();
            // One of the others gets everything, the last one some of it.
            let others: Vec<usize> = (0..3).filter(|other| *other != sealed).collect();
            assert_eq!(ship(&world.archives[others[0]], &world.log, 1).await, ShipEnd::Reached);
            put(&world.stores[others[1]], &frames[6..9]).await;
            let life = Life::of(requests, requests % 2 == 0);
            world.live(Some(&life));
            let mut taken = world.take_over_restored(&fences, base).await;
            world.live(None);
            if life.is_over() {
                // The command begins with what there is now.
                taken = world.take_over_restored(&fences, world.restorable().await).await;
            }
            assert_eq!(taken, Ok(all.lsn), "{context}");
            let end = world.restorable().await;
            assert_eq!((end.lsn, end.hash), (all.lsn, all.hash), "{context}");
            assert_eq!(world.take_over_restored(&fences, end).await, Ok(all.lsn), "{context}");
            for held in world.held().await {
                assert_eq!(held, (all.lsn, all.hash, epoch(2, 80)), "{context}");
            }
            // The old source goes no further in any of them.
            let mut source = World::new(&[], 0).await.source;
            append(&world.log, &source.frames(2, 1));
            for archive in &world.archives {
                let end = ship(archive, &world.log, 1).await;
                assert!(matches!(end, ShipEnd::Fenced(_) | ShipEnd::Forked { .. }), "{context}: {end}");
            }
            if !life.is_over() {
                break;
            }
        }
    }
}

/// A copy of the old source's directory may have shipped to one archive, and the old source to another one: nobody decides between them here.
#[tokio::test(start_paused = true)]
async fn of_two_histories_behind_the_first_seal_none_is_carried_over() {
    let world = World::new(&[6, 6, 6], 0).await;
    let (fences, _) = world.restored().await;
    let frames = world.frames();
    let base = frames[5].position();
    fences[0].seal(base, epoch(2, 80)).await.unwrap();
    let mut copy = Source::new();
    copy.frames(6, 3);
    copy.wait(77);
    put(&world.stores[1], &copy.frames(3, 3)).await;
    put(&world.stores[2], &frames[6..12]).await;
    let refused = world.take_over_restored(&fences, base).await.unwrap_err();
    assert!(matches!(&refused, TakeOverError::Fence { error: FenceError::Forked { .. }, .. }), "{refused}");
    assert_eq!(world.held().await[0], (base.lsn, base.hash, epoch(2, 80)), "nothing was carried over");
}

/// The fear: two take-overs are given the same archives, each seals the first one of its own list, and neither can go on.
#[tokio::test(start_paused = true)]
async fn everybody_seals_the_archives_in_the_same_order() {
    let mut firsts = BTreeSet::new();
    for is_reversed in [false, true] {
        for by_restore in [false, true] {
            for requests in 1.. {
                let mut world = World::new(&[12, 12, 12], 12).await;
                if is_reversed {
                    world.archives.reverse();
                    world.stores.reverse();
                }
                world.live(Some(&Life::of(requests, true)));
                let (fences, base) = world.restored().await;
                let died = match by_restore {
                    true => world.take_over_restored(&fences, base).await.map(drop),
                    false => world.promote(&[]).await.map(drop),
                };
                world.live(None);
                let sealed = world.sealers().await;
                if let Some((number, _)) = sealed.first().filter(|_| sealed.len() == 1) {
                    firsts.insert(world.archives[*number].descriptor().created.as_nanos());
                }
                if died.is_ok() {
                    break;
                }
            }
        }
    }
    assert_eq!(firsts, BTreeSet::from([0]));
}

/// The fear: an archive was added later, so that it begins behind the log; once another one has led there it is not asked again, and what only it
/// holds is lost.
#[tokio::test(start_paused = true)]
async fn an_archive_that_begins_where_another_one_ends_is_asked_again() {
    for is_settled in [false, true] {
        let mut world = World::new(&[9, 6], 6).await;
        let (frames, all) = (world.frames(), world.log.tail().position);
        let later = FaultyStore::new();
        let made = Descriptor { base: frames[8].position(), ..descriptor() };
        // It comes first in every order.
        world.archives.insert(0, Archive::create(later.archive_store(), made).await.unwrap());
        put(&later, &frames[9..12]).await;
        world.stores.insert(0, later);
        if is_settled {
            // Where the old epoch ends is settled: the rest is carried over when the new one begins.
            world.attempts.push(epoch(2, 40));
            let place = fence(&world.archives[2], MIRROR);
            place.seal(frames[5].position(), epoch(2, 40)).await.unwrap();
        }
        let state = world.promote(&[]).await.unwrap();
        assert_eq!((state.position.lsn, state.position.hash), (all.lsn, all.hash), "{is_settled}");
    }
}

/// Entries between what the log, or a restore, has and what an archive holds are gone: that is said before anything is sealed. The fear: whoever
/// restores is told to try again, for ever; also by an archive that was begun and holds nothing.
#[tokio::test(start_paused = true)]
async fn an_archive_behind_a_gap_is_not_left_behind_silently() {
    for is_empty in [true, false] {
        let mut world = World::new(&[6], 6).await;
        let frames = world.frames();
        let later = FaultyStore::new();
        let made = Descriptor { base: frames[8].position(), ..descriptor() };
        world.archives.push(Archive::create(later.archive_store(), made).await.unwrap());
        if !is_empty {
            put(&later, &frames[9..12]).await;
        }
        world.stores.push(later);
        let refused = world.promote(&[]).await.unwrap_err();
        assert!(matches!(refused, TakeOverError::Gap { .. }), "{refused}");
        let (fences, _) = world.restored().await;
        let refused = world.take_over_restored(&fences, frames[5].position()).await.unwrap_err();
        assert!(matches!(refused, TakeOverError::Gap { .. }), "{refused}");
        assert!(world.sealers().await.is_empty());
    }
}

/// What somebody carried over behind its seal is what this mirror has from the source before: there is nothing that has lost. Nothing of the
/// new epoch had reached it when that somebody was lost.
#[tokio::test(start_paused = true)]
async fn a_log_whose_end_an_archive_has_behind_a_seal_passes_it() {
    for (more, given_up) in [(3, &[9][..]), (0, &[9]), (3, &[])] {
        let mut world = World::new(&[6, 12], 12).await;
        let ends = [world.places().places[0].adopt().await.unwrap().end, world.log.tail().position];
        for (archive, end) in world.archives.iter().zip(ends) {
            fence(archive, 9).seal(end, epoch(2, 90)).await.unwrap();
        }
        let frames: Vec<Frame> = world.log.read(ends[0].lsn.next()).unwrap().map(Result::unwrap).collect();
        let tail = world.log.read(ends[0].lsn).unwrap().next().unwrap().unwrap().state();
        let mut carried = under(world.source.keys(), epoch(2, 90), tail, &frames).unwrap();
        carried.extend(world.source.taken_over(epoch(2, 90)).frames(more, 2));
        let end = put(&world.stores[0], &carried).await;
        let promoted = world.promote(given_up).await;
        if given_up.is_empty() {
            let refused = promoted.unwrap_err();
            assert!(
                matches!(&refused, TakeOverError::Fence { error: FenceError::Sealed(_), .. }),
                "{refused}"
            );
            continue;
        }
        let state = promoted.unwrap();
        assert_eq!((state.position.lsn, state.position.hash), (end.lsn, end.hash));
        world.assert_good(state, end, &format!("{more} more")).await;
    }
}

/// The same LSNs with other entries have lost.
#[tokio::test(start_paused = true)]
async fn a_log_whose_end_an_archive_has_otherwise_behind_a_seal_does_not_pass_it() {
    let mut world = World::new(&[6], 6).await;
    let base = world.log.read(Lsn::FIRST).unwrap().map(Result::unwrap).nth(5).unwrap().position();
    fence(&world.archives[0], 9).seal(base, epoch(2, 90)).await.unwrap();
    let mut other = Source::new();
    other.frames(6, 3);
    let mut other = other.taken_over(epoch(2, 90));
    other.wait(1);
    put(&world.stores[0], &other.frames(9, 2)).await;
    world.mirror = Arc::clone(&world.log);
    for given_up in [&[][..], &[9]] {
        let refused = world.promote(given_up).await.unwrap_err();
        assert!(matches!(&refused, TakeOverError::Fence { error: FenceError::Sealed(_), .. }), "{refused}");
    }
}

/// The fear: somebody sealed one archive and died, the source did not reach that one and went on through the other; a restore ends at the seal, or no
/// take-over gets past it.
#[tokio::test(start_paused = true)]
async fn what_was_acknowledged_behind_the_seal_of_one_who_never_led_is_restored_and_taken_over() {
    for order in [[0, 1], [1, 0]] {
        for requests in 1.. {
            let context = format!("{order:?}, dead at request {requests}");
            let mut world = World::new(&[6, 12], 0).await;
            let (frames, all) = (world.frames(), world.log.tail().position);
            fence(&world.archives[0], 9).seal(frames[5].position(), epoch(2, 90)).await.unwrap();
            world.archives = order.iter().map(|at| world.archives[*at].clone()).collect();
            world.stores = order.iter().map(|at| world.stores[*at].clone()).collect();
            let (fences, _) = world.restored().await;
            let base = world.restorable().await;
            assert_eq!(base, all, "{context}");
            let who = successor(8, &[epoch(3, 80)], &[9]);
            let refused = take_over_at(&fences, (&who, None), base, None).await.unwrap_err();
            assert!(
                matches!(refused, TakeOverError::NotWatched { .. }),
                "{context}: the source may be alive: {refused}"
            );
            let silence = seen_silent(&fences).await.ok();
            let silence = silence.as_ref();
            let unforgiving = successor(8, &[epoch(3, 80)], &[]);
            let refused = take_over_at(&fences, (&unforgiving, None), base, silence).await.unwrap_err();
            assert!(
                matches!(&refused, TakeOverError::Fence { error: FenceError::Sealed(_), .. }),
                "{refused}"
            );
            let life = Life::of(requests, requests % 2 == 0);
            world.live(Some(&life));
            let mut taken = take_over_at(&fences, (&who, None), base, silence).await;
            world.live(None);
            if life.is_over() {
                let silence = seen_silent(&fences).await.ok();
                let base = world.restorable().await;
                taken = take_over_at(&fences, (&who, None), base, silence.as_ref()).await;
            }
            assert_eq!(taken, Ok(all.lsn), "{context}");
            for held in world.held().await {
                assert_eq!(held, (all.lsn, all.hash, epoch(3, 80)), "{context}");
            }
            let end = world.restorable().await;
            assert_eq!((end.lsn, end.hash), (all.lsn, all.hash), "{context}");
            if !life.is_over() {
                break;
            }
        }
    }
}

/// The fear: the same in a promotion, which fetches what the other archive holds and is refused by the seal then, for ever.
#[tokio::test(start_paused = true)]
async fn a_promotion_carries_over_what_was_acknowledged_behind_the_seal_of_one_who_never_led() {
    let mut world = World::new(&[6, 12], 6).await;
    let (frames, all) = (world.frames(), world.log.tail().position);
    fence(&world.archives[0], 9).seal(frames[5].position(), epoch(2, 90)).await.unwrap();
    let state = world.promote(&[9]).await.unwrap();
    assert_eq!((state.position.lsn, state.position.hash), (all.lsn, all.hash));
    world.assert_good(state, all, "carried over").await;
}

/// The fear: an old source goes on in an archive that was given up, and what it left there is passed over without a word, or for the history.
#[tokio::test(start_paused = true)]
async fn entries_behind_the_seal_of_one_who_led_are_left_out_and_told() {
    for order in [[0, 1], [1, 0]] {
        let mut world = World::new(&[6, 12], 0).await;
        let base = world.frames()[5].position();
        fence(&world.archives[0], 9).seal(base, epoch(2, 90)).await.unwrap();
        let mut led = Source::new();
        led.frames(6, 3);
        let mut led = led.taken_over(epoch(2, 90));
        led.wait(5);
        let end = put(&world.stores[0], &led.frames(1, 2)).await;
        world.archives = order.iter().map(|at| world.archives[*at].clone()).collect();
        let (none, zone) = (BTreeSet::new(), jiff::tz::TimeZone::UTC);
        let plan = plan_restore(&world.archives, Target::Latest, &none, &zone).await.unwrap();
        assert_eq!(plan.route.end, end);
        let [problem] = &plan.problems[..] else { panic!("{:?}", plan.problems) };
        assert!(problem.contains("up to lsn 37") && problem.contains("left out"), "{problem}");
    }
}

/// The fear: a copy of the source's directory has shipped to one archive, the source to the other: a promotion takes the one that it asks first, and
/// refuses then.
#[tokio::test(start_paused = true)]
async fn a_promotion_does_not_decide_between_two_archives_that_disagree() {
    for (shorter, is_settled) in [(3, false), (6, false), (3, true)] {
        let mut world = World::new(&[6, 12, 6], 6).await;
        let tail = world.log.read(Lsn::FIRST).unwrap().map(Result::unwrap).nth(5).unwrap().position();
        let mut copy = Source::new();
        copy.frames(6, 3);
        copy.wait(77);
        put(&world.stores[2], &copy.frames(shorter, 3)).await;
        if is_settled {
            world.attempts.push(epoch(2, 40));
            fence(&world.archives[0], MIRROR).seal(tail, epoch(2, 40)).await.unwrap();
        }
        let refused = world.promote(&[]).await.unwrap_err();
        assert!(
            matches!(&refused, TakeOverError::Fence { error: FenceError::Forked { .. }, .. }),
            "{shorter} {is_settled}: {refused}"
        );
        assert_eq!(world.mirror.tail().position, tail, "{shorter} {is_settled}: nothing was appended");
    }
}

/// The fear: a pack was lost with the source, one archive lags, and that one cannot be brought up when another one is sealed already.
#[tokio::test(start_paused = true)]
async fn a_lost_pack_does_not_keep_a_lagging_archive_from_being_taken_over() {
    let mut world = World::new(&[12, 6], 0).await;
    let base =
        put(&world.stores[0], &[world.source.frame_with_pack(&crate::testing::pack(1, b"lost").1)]).await;
    let (fences, _) = world.restored().await;
    assert_eq!(world.take_over_restored(&fences, base).await, Ok(base.lsn));
    for held in world.held().await {
        assert_eq!(held, (base.lsn, base.hash, epoch(2, 80)));
    }
}

/// The fear: one archive takes nothing, and that is found out when the others are sealed.
#[tokio::test(start_paused = true)]
async fn a_restore_seals_nothing_before_every_archive_has_everything() {
    let world = World::new(&[12, 6], 0).await;
    let (fences, base) = world.restored().await;
    world.stores[1].fail("log/", crate::testing::Fault::PutFails, usize::MAX);
    world.take_over_restored(&fences, base).await.unwrap_err();
    assert_eq!(world.sealers().await, Vec::new());
}

/// The fear: two accounts have lost slots in different places. A restore puts the history together from both, and no take-over brings up either:
/// what one lacks the other has behind its own gap.
#[tokio::test(start_paused = true)]
async fn archives_that_have_what_the_other_lacks_behind_gaps_bring_each_other_up() {
    for (first, second) in [(2, 1), (1, 2), (0, 3), (3, 0)] {
        let context = format!("the archives have lost slots {first} and {second}");
        let world = World::new(&[12, 12], 0).await;
        let logged = world.logged().await;
        for (account, lost) in [(0, first), (1, second)] {
            let slots: Vec<_> = logged.iter().filter(|(number, _)| *number == account).collect();
            world.stores[account].remove(&slots[lost].1).await;
        }
        let (fences, base) = world.restored().await;
        world.take_over_restored(&fences, base).await.unwrap_or_else(|error| panic!("{context}: {error}"));
        for fence in &fences {
            let held = fence.adopt().await.unwrap();
            assert_eq!((held.end, held.epoch), (base, epoch(2, 80)), "{context}");
        }
    }
}
