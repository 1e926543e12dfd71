//! Create, lookup and getattr through the library: `cargo bench -p murphy-benches --bench create [-- FILES]`.
//!
//! Prints creates a second (until durable and indexed), the CPU time of each, lookup + getattr a second on hot names, and the bytes that
//! a created file takes in the index.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use bytes::Bytes;
use murphy_benches::{
    cpu::{process_cpu_nanos, thread_cpu_nanos},
    engine::new_volume,
    history::bytes_on_disk,
};
use murphy_fs::{Answer, Caller, FileSystem, Ino, Kind, Name, NewNode, Volume, VolumeOptions};

const DIRECTORY: u64 = 1000;

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let files: u64 = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    let directory = tempfile::tempdir_in(".").expect("the current directory takes a directory");
    let path = directory.path().canonicalize().expect("it exists");
    let volume = new_volume(&path, VolumeOptions::default());
    let (start, cpu) = (Instant::now(), process_cpu_nanos());
    let creating = volume.clone();
    let creator = tokio::task::spawn_blocking(move || {
        let cpu = thread_cpu_nanos();
        (create(&creating, files), thread_cpu_nanos() - cpu)
    });
    let (names, creator_cpu) = creator.await.expect("creating does not panic");
    let submitted = start.elapsed();
    volume.sync_all().wait().await.expect("the log takes everything");
    let durable = start.elapsed();
    let closing = volume.clone();
    tokio::task::spawn_blocking(move || closing.settle_index())
        .await
        .expect("no panic")
        .expect("the index takes everything");
    let indexed = start.elapsed();
    let cpu = process_cpu_nanos() - cpu;
    println!(
        "creates:            {:>10.0} /s submitted, {:.0} /s durable, {:.0} /s indexed",
        rate(files, submitted),
        rate(files, durable),
        rate(files, indexed)
    );
    let each = |nanos: u128| nanos as f64 / 1000.0 / files as f64;
    println!("CPU a create:       {:>10.2} us, {:.2} in the thread that asks", each(cpu), each(creator_cpu));
    println!("index bytes a file: {:>10.1}", bytes_on_disk(&path.join("index")) as f64 / files as f64);

    let hot = names.len().min(10_000);
    let rounds = 1_000_000 / hot;
    let (start, cpu) = (Instant::now(), thread_cpu_nanos());
    for _ in 0..rounds {
        for (parent, name) in &names[..hot] {
            let attr = now(volume.lookup(&Caller::default(), *parent, name));
            assert_eq!(now(volume.getattr(attr.ino)).ino, attr.ino);
        }
    }
    let (pairs, cpu) = ((rounds * hot) as u64, thread_cpu_nanos() - cpu);
    println!(
        "lookup + getattr:   {:>10.0} pairs/s hot, one thread; {:.2} us of CPU each",
        rate(pairs, start.elapsed()),
        cpu as f64 / 1000.0 / pairs as f64
    );
    ExitCode::SUCCESS
}

fn create(volume: &Volume, files: u64) -> Vec<(Ino, Name)> {
    let caller = Caller::default();
    let mut parent = Ino::ROOT;
    let mut names = Vec::new();
    for number in 0..files {
        if number % DIRECTORY == 0 {
            let name = Name::new(format!("dir{number}").into_bytes()).expect("a name");
            parent = wait(volume.mkdir(&caller, Ino::ROOT, &name, 0o755)).ino;
        }
        let name = Name::new(Bytes::from(format!("file{number:08}.txt"))).expect("a name");
        let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
        wait(volume.mknod(&caller, parent, &name, node));
        names.push((parent, name));
    }
    names
}

fn wait<T>(answer: Answer<T>) -> T {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(later) => tokio::runtime::Handle::current().block_on(later),
    }
    .expect("nothing stands in the way")
}

fn now<T>(answer: Answer<T>) -> T {
    match answer {
        Answer::Now(result) => result.expect("it is there"),
        Answer::Later(_) => panic!("a hot row is answered at once"),
    }
}

fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}
