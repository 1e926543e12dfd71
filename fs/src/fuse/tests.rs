//! The adapter on a real mount. Where `/dev/fuse` is missing or mounting is not allowed, each test says on stderr that it was
//! skipped; with `MURPHY_REQUIRE_FUSE=1` that is a failure instead.

use std::{
    ffi::CString,
    fs::{self, File, FileTimes, OpenOptions},
    io::{self, ErrorKind, Read, Seek, SeekFrom, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use rustix::fs::{CWD, RenameFlags, StatVfs, XattrFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{memory::Memory, *};
use crate::Name;

static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// A mounted [`Memory`] in a directory of its own.
struct World {
    mount: Option<Mount>,
    memory: Arc<Memory>,
    runtime: Runtime,
    directory: TempDir,
}

impl World {
    /// `None` where this machine cannot mount, which is said and counted.
    fn new() -> Option<World> {
        World::with(&MountOptions { allow_other: true, ..MountOptions::new("test") })
    }

    fn with(options: &MountOptions) -> Option<World> {
        let directory = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let memory = Arc::new(Memory::new());
        let fs: Arc<dyn FileSystem> = memory.clone();
        if let Err(error) = try_mount(directory.path()) {
            return skip(&error);
        }
        let mount = Mount::new(fs, directory.path(), options, runtime.handle().clone());
        let mount = mount.unwrap_or_else(|error| panic!("{error}"));
        Some(World { mount: Some(mount), memory, runtime, directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn mount(&self) -> &Mount {
        self.mount.as_ref().unwrap()
    }

    fn count(&self, kind: RequestKind) -> u64 {
        self.mount().requests().get(kind)
    }
}

fn skip(error: &MountError) -> Option<World> {
    assert!(std::env::var_os("MURPHY_REQUIRE_FUSE").is_none(), "a mount is required: {error}");
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    // Not by a print macro, whose output the test harness hides.
    writeln!(io::stderr(), "SKIPPED mount test number {count}: {error}").unwrap();
    None
}

fn name(name: &str) -> Name {
    Name::new(name.as_bytes().to_vec()).unwrap()
}

fn listing(path: &Path) -> Vec<String> {
    fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..PATIENCE.as_millis() / POLL.as_millis() {
        if condition() {
            return;
        }
        std::thread::sleep(POLL);
    }
    panic!("waited {PATIENCE:?} for {what}");
}

/// What a process that was killed leaves.
fn mount_without_a_process(source: &str, path: &Path) {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let data = CString::new(data).unwrap();
    rustix::mount::mount(source, path, "fuse", MountFlags::empty(), data.as_c_str()).unwrap();
    drop(device);
    assert_eq!(fs::metadata(path).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
}

#[test]
fn a_tree_is_made_read_changed_and_removed() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("d")).unwrap();
    let mut file = File::create_new(world.path("d/f")).unwrap();
    file.write_all(b"hello world").unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(fs::read(world.path("d/f")).unwrap(), b"hello world");
    assert_eq!(File::create_new(world.path("d/f")).unwrap_err().kind(), ErrorKind::AlreadyExists);

    fs::rename(world.path("d/f"), world.path("g")).unwrap();
    assert!(fs::metadata(world.path("d/f")).is_err());
    std::os::unix::fs::symlink("g", world.path("s")).unwrap();
    assert_eq!(fs::read_link(world.path("s")).unwrap(), Path::new("g"));
    fs::hard_link(world.path("g"), world.path("h")).unwrap();
    assert_eq!(fs::metadata(world.path("g")).unwrap().nlink(), 2);
    let stat = fs::metadata(world.path("g")).unwrap();
    assert_eq!((stat.size(), stat.is_file()), (11, true));
    assert_eq!(listing(world.directory.path()), ["d", "g", "s", "h"]);

    File::create(world.path("g")).unwrap();
    assert_eq!(fs::metadata(world.path("h")).unwrap().len(), 0, "O_TRUNC is part of the open");
    File::open(world.path("d")).unwrap().sync_all().unwrap();
    for file in ["g", "h", "s"] {
        fs::remove_file(world.path(file)).unwrap();
    }
    fs::remove_dir(world.path("d")).unwrap();
    assert!(listing(world.directory.path()).is_empty());
    assert_eq!(world.count(RequestKind::Fsyncdir), 1);
    world.mount().unmount().unwrap();
    assert!(world.mount().has_ended());
}

#[test]
fn rename_flags_reach_the_file_system() {
    let Some(world) = World::new() else { return };
    fs::write(world.path("a"), b"a").unwrap();
    fs::write(world.path("b"), b"b").unwrap();
    let (a, b) = (world.path("a"), world.path("b"));
    let kept = rustix::fs::renameat_with(CWD, &a, CWD, &b, RenameFlags::NOREPLACE);
    assert_eq!(kept, Err(rustix::io::Errno::EXIST));
    rustix::fs::renameat_with(CWD, &a, CWD, &b, RenameFlags::empty()).unwrap();
    assert_eq!(fs::read(&b).unwrap(), b"a");
}

#[test]
fn attributes_survive_the_way_down_and_up() {
    let Some(world) = World::new() else { return };
    let path = world.path("f");
    let file = File::create(&path).unwrap();
    let before_1970 = UNIX_EPOCH - Duration::from_millis(1500);
    for time in [before_1970, UNIX_EPOCH, UNIX_EPOCH + Duration::new(1 << 33, 999_999_999)] {
        file.set_times(FileTimes::new().set_modified(time)).unwrap();
        world.mount().notifier().attributes(Ino::new(file.metadata().unwrap().ino())).then_some(()).unwrap();
        wait_until("the time comes back", || fs::metadata(&path).unwrap().modified().unwrap() == time);
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4751)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4751);
    file.set_len(5000).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 5000);
    let fifo = rustix::fs::mknodat(CWD, world.path("p"), rustix::fs::FileType::Fifo, 0o600.into(), 0);
    fifo.unwrap();
    assert!(fs::metadata(world.path("p")).unwrap().file_type().is_fifo());
}

#[test]
fn the_kernel_applies_the_umask() {
    let Some(world) = World::new() else { return };
    let script = "umask 027 && touch f && mkdir d && mkfifo p";
    let done = Command::new("sh").args(["-c", script]).current_dir(world.directory.path()).status().unwrap();
    assert!(done.success());
    for (made, mode) in [("f", 0o640), ("d", 0o750), ("p", 0o640)] {
        assert_eq!(fs::metadata(world.path(made)).unwrap().mode() & 0o777, mode, "{made}");
    }
}

#[test]
fn extended_attributes_are_set_listed_and_removed() {
    let Some(world) = World::new() else { return };
    let path = world.path("f");
    File::create(&path).unwrap();
    rustix::fs::setxattr(&path, "user.a", b"value", XattrFlags::CREATE).unwrap();
    let again = rustix::fs::setxattr(&path, "user.a", b"value", XattrFlags::CREATE);
    assert_eq!(again, Err(rustix::io::Errno::EXIST));
    rustix::fs::setxattr(&path, "user.b", b"", XattrFlags::empty()).unwrap();
    let mut room = [0_u8; 64];
    assert_eq!(rustix::fs::getxattr(&path, "user.a", &mut room).unwrap(), 5);
    assert_eq!(rustix::fs::getxattr(&path, "user.a", &mut [0_u8; 2]), Err(rustix::io::Errno::RANGE));
    let c_path = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: both strings end with NUL, and a size of 0 means that nothing is written.
    let size = unsafe { libc::getxattr(c_path.as_ptr(), c"user.a".as_ptr(), std::ptr::null_mut(), 0) };
    assert_eq!(size, 5);
    let length = rustix::fs::listxattr(&path, &mut room).unwrap();
    assert_eq!(&room[..length], b"user.a\0user.b\0");
    rustix::fs::removexattr(&path, "user.a").unwrap();
    assert_eq!(rustix::fs::getxattr(&path, "user.a", &mut room), Err(rustix::io::Errno::NODATA));
}

/// Listings cross many replies, plain and with attributes, and every position can be returned to.
#[test]
fn a_long_listing_has_every_name_once_and_dots() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("d")).unwrap();
    let wanted: Vec<_> = (0..1500).map(|number| format!("{number}-{}", "n".repeat(number % 200))).collect();
    let directory = fs::metadata(world.path("d")).unwrap().ino();
    for file in &wanted {
        world.memory.create_behind(Ino::new(directory), &name(file));
    }
    assert_eq!(listing(&world.path("d")), wanted);
    assert_eq!(listing(&world.path("d")), wanted, "from the kernel's cache of the listing");
    assert!(
        world.count(RequestKind::Readdir) > 1,
        "without lookups in between the kernel asks for names only"
    );
    for entry in fs::read_dir(world.path("d")).unwrap().take(20) {
        entry.unwrap().metadata().unwrap();
    }
    world.memory.create_behind(Ino::new(directory), &name("one more"));
    assert!(world.mount().notifier().data(Ino::new(directory)));
    let wanted: Vec<_> = wanted.into_iter().chain(["one more".to_owned()]).collect();
    wait_until("the new listing", || listing(&world.path("d")) == wanted);
    assert!(world.count(RequestKind::Readdirplus) > 0);
    assert_eq!(world.count(RequestKind::Opendir), 1, "after ENOSYS the kernel asks no more");

    let open = File::open(world.path("d")).unwrap();
    let mut entries = Vec::new();
    for entry in rustix::fs::Dir::read_from(&open).unwrap() {
        let entry = entry.unwrap();
        entries.push((entry.file_name().to_string_lossy().into_owned(), entry.ino()));
    }
    assert_eq!(entries[0], (".".to_owned(), directory));
    assert_eq!(entries[1], ("..".to_owned(), Ino::ROOT.get()));
    assert_eq!(entries.len(), wanted.len() + 2);
}

#[test]
fn answers_may_come_from_the_runtime() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("late")).unwrap();
    for file in 0..60 {
        fs::write(world.path(&format!("late/{file}")), b"x").unwrap();
    }
    world.mount().set_lifetimes(Lifetimes::NONE);
    assert_eq!(listing(&world.path("late")).len(), 60);
    assert!(fs::metadata(world.path("late")).unwrap().is_dir());
}

#[test]
fn repeated_stats_and_missing_names_cost_no_request() {
    let Some(world) = World::new() else { return };
    File::create(world.path("f")).unwrap();
    assert!(fs::metadata(world.path("none")).is_err());
    wait_until("the file is released", || world.count(RequestKind::Release) == 1);
    let before = world.mount().requests();
    for _ in 0..100 {
        assert!(fs::metadata(world.path("f")).is_ok());
        assert!(fs::metadata(world.path("none")).is_err());
    }
    assert_eq!(world.mount().requests().since(&before).to_string(), "none");
    // A name that was missing a moment ago.
    File::create(world.path("none")).unwrap();
    assert!(fs::metadata(world.path("none")).is_ok());
}

#[test]
fn a_panic_is_eio_and_the_mount_goes_on() {
    let Some(world) = World::new() else { return };
    for _ in 0..8 {
        let error = fs::metadata(world.path("panic")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    fs::write(world.path("f"), b"still here").unwrap();
    assert_eq!(fs::read(world.path("f")).unwrap(), b"still here");
}

#[test]
fn an_answer_that_never_comes_is_eio_within_the_limit() {
    let io_timeout = Duration::from_millis(100);
    let Some(world) = World::with(&MountOptions { io_timeout, ..MountOptions::new("test") }) else { return };
    let error = fs::metadata(world.path("never")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    world.mount().unmount().unwrap();
}

/// The kernel believed that the name was free. `open(O_CREAT)` must open what is there; with `O_EXCL` it must fail.
#[test]
fn a_name_made_by_somebody_else_meanwhile_is_opened_or_refused() {
    let Some(world) = World::new() else { return };
    world.memory.taken.store(true, Ordering::Relaxed);
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(world.path("f")).unwrap();
    file.write_all(b"x").unwrap();
    assert_eq!(fs::read(world.path("f")).unwrap(), b"x");
    world.memory.taken.store(true, Ordering::Relaxed);
    assert_eq!(File::create_new(world.path("g")).unwrap_err().kind(), ErrorKind::AlreadyExists);
}

/// A page of a mapping that was opened with O_APPEND must land where it is, and appending must append.
#[test]
fn appends_append_and_mapped_pages_stay_in_place() {
    let Some(world) = World::new() else { return };
    let path = world.path("f");
    fs::write(&path, vec![b'a'; 4096]).unwrap();
    let mut file = OpenOptions::new().read(true).append(true).open(&path).unwrap();
    file.write_all(b"tail").unwrap();
    let script = "import mmap,os,sys\n\
        f=os.open(sys.argv[1],os.O_RDWR|os.O_APPEND)\n\
        m=mmap.mmap(f,4096)\nm[0:5]=b'mmap!'\nm.flush()\nm.close()\nos.close(f)\n";
    match Command::new("python3").args(["-c", script]).arg(&path).status() {
        Ok(status) => assert!(status.success()),
        Err(error) => return writeln!(io::stderr(), "SKIPPED the mapping: no python3 ({error})").unwrap(),
    }
    let bytes = fs::read(&path).unwrap();
    assert_eq!((bytes.len(), &bytes[..6], &bytes[4096..]), (4100, &b"mmap!a"[..], &b"tail"[..]));
}

#[test]
fn what_is_not_implemented_has_a_fallback() {
    let Some(world) = World::new() else { return };
    fs::write(world.path("a"), vec![1_u8; 100_000]).unwrap();
    // std copies by copy_file_range where it can.
    assert_eq!(fs::copy(world.path("a"), world.path("b")).unwrap(), 100_000);
    assert_eq!(fs::read(world.path("b")).unwrap(), vec![1_u8; 100_000]);
    let mut file = File::open(world.path("a")).unwrap();
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap(), 100_000);
    file.seek(SeekFrom::Start(99_999)).unwrap();
    assert_eq!(file.read(&mut [0; 9]).unwrap(), 1);
    let writable = OpenOptions::new().write(true).open(world.path("a")).unwrap();
    let allocated = rustix::fs::fallocate(&writable, rustix::fs::FallocateFlags::empty(), 0, 1 << 20);
    assert_eq!(allocated, Err(rustix::io::Errno::OPNOTSUPP));
    assert!(rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok());
    let unnamed = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(world.directory.path());
    assert_eq!(unnamed.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
    let StatVfs { f_files, f_namemax, .. } = rustix::fs::statvfs(world.directory.path()).unwrap();
    assert!(f_files > 1 << 40 && f_namemax == 255);
}

#[test]
fn closing_a_file_that_was_only_read_sends_no_flush() {
    let Some(world) = World::new() else { return };
    fs::write(world.path("f"), b"x").unwrap();
    let flushes = world.count(RequestKind::Flush);
    assert_eq!(flushes, 1);
    for _ in 0..3 {
        fs::read(world.path("f")).unwrap();
    }
    assert_eq!(world.count(RequestKind::Flush), flushes);
    // The first open after a change drops the pages; an open of unchanged data keeps them.
    let reads = world.count(RequestKind::Read);
    assert!(reads >= 1);
    world.memory.unchanged.store(true, Ordering::Relaxed);
    fs::read(world.path("f")).unwrap();
    assert_eq!(world.count(RequestKind::Read), reads);
}

#[test]
fn changes_from_elsewhere_are_seen_after_a_notification() {
    let Some(world) = World::new() else { return };
    world.memory.unchanged.store(true, Ordering::Relaxed);
    fs::write(world.path("f"), b"old").unwrap();
    assert_eq!(fs::read(world.path("f")).unwrap(), b"old");
    assert!(fs::metadata(world.path("new")).is_err());
    let ino = world.memory.change_behind(Ino::ROOT, &name("f"), b"new");
    world.memory.create_behind(Ino::ROOT, &name("new"));
    assert_eq!(fs::read(world.path("f")).unwrap(), b"old", "the kernel does not know yet");
    assert!(fs::metadata(world.path("new")).is_err());

    assert!(world.mount().notifier().data(ino));
    assert!(world.mount().notifier().entry(Ino::ROOT, &name("new")));
    wait_until("the new bytes", || fs::read(world.path("f")).unwrap() == b"new");
    wait_until("the new name", || fs::metadata(world.path("new")).is_ok());
    assert!(world.mount().notifier().deleted(Ino::ROOT, ino, &name("f")));
    let lookups = world.count(RequestKind::Lookup);
    wait_until("the name is asked for again", || {
        drop(fs::metadata(world.path("f")));
        world.count(RequestKind::Lookup) > lookups
    });
    assert_eq!(world.mount().notifier().dropped(), 0);
}

/// What NFS servers do: a handle is resolved without a path, after the kernel has forgotten the inode.
#[test]
fn a_file_handle_is_resolved_without_a_path() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("d")).unwrap();
    fs::write(world.path("d/f"), b"by handle").unwrap();
    let directory = File::open(world.directory.path()).unwrap();
    let path = CString::new(world.path("d/f").into_os_string().into_string().unwrap()).unwrap();
    let mut handle = FileHandleBuffer { bytes: 128, kind: 0, data: [0; 128] };
    let handle = (&raw mut handle).cast::<libc::file_handle>();
    let mut mount_id = 0;
    // SAFETY: the handle has room for the 128 bytes that it says, the path ends with NUL.
    let made = unsafe { libc::name_to_handle_at(libc::AT_FDCWD, path.as_ptr(), handle, &mut mount_id, 0) };
    assert_eq!(made, 0, "{}", io::Error::last_os_error());
    assert!(world.mount().notifier().entry(Ino::ROOT, &name("d")));
    // SAFETY: as above.
    let opened = unsafe { libc::open_by_handle_at(directory.as_raw_fd(), handle, libc::O_RDONLY) };
    assert!(opened >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor was just opened and belongs to nobody else.
    let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(opened) };
    let mut bytes = [0; 9];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"by handle");
}

#[repr(C)]
struct FileHandleBuffer {
    bytes: u32,
    kind: i32,
    data: [u8; 128],
}

#[test]
fn a_mount_in_use_is_not_unmounted_and_a_second_mount_is_refused() {
    let Some(world) = World::new() else { return };
    let file = File::create(world.path("f")).unwrap();
    assert!(matches!(world.mount().unmount(), Err(UnmountError::Busy { .. })));
    let fs: Arc<dyn FileSystem> = world.memory.clone();
    let again =
        Mount::new(fs, world.directory.path(), &MountOptions::new("test"), world.runtime.handle().clone());
    match again {
        Err(MountError::AlreadyMounted { by, .. }) => assert_eq!(by, "murphy:test"),
        other => panic!("{other:?}"),
    }
    drop(file);
    world.mount().unmount().unwrap();
    world.mount().unmount().unwrap();
}

#[test]
fn an_unmount_from_outside_ends_the_wait() {
    let Some(world) = World::new() else { return };
    let path = world.directory.path().to_owned();
    let outside = std::thread::spawn(move || rustix::mount::unmount(&path, UnmountFlags::empty()));
    world.mount().wait().unwrap();
    outside.join().unwrap().unwrap();
    // Somebody mounts something else there; our end must not take it away.
    let none: Option<&std::ffi::CStr> = None;
    rustix::mount::mount("other", world.directory.path(), "tmpfs", MountFlags::empty(), none).unwrap();
    fs::write(world.path("theirs"), b"x").unwrap();
    world.mount().unmount().unwrap();
    let World { mount, directory, .. } = world;
    drop(mount);
    assert!(directory.path().join("theirs").exists());
    rustix::mount::unmount(directory.path(), UnmountFlags::empty()).unwrap();
}

#[test]
fn dropping_a_mount_in_use_detaches_it() {
    let Some(mut world) = World::new() else { return };
    let file = File::create(world.path("f")).unwrap();
    drop(world.mount.take());
    assert!(listing(world.directory.path()).is_empty(), "the directory below");
    drop(file);
}

#[test]
fn a_dead_mount_of_the_same_volume_is_replaced_and_of_another_is_not() {
    let Some(mut world) = World::new() else { return };
    world.mount.take().unwrap().unmount().unwrap();
    for dead_source in ["murphy:test", "murphy:other"] {
        let path = world.directory.path();
        mount_without_a_process(dead_source, path);
        let fs: Arc<dyn FileSystem> = world.memory.clone();
        let mounted = Mount::new(fs, path, &MountOptions::new("test"), world.runtime.handle().clone());
        if dead_source == "murphy:test" {
            fs::write(world.path("f"), b"x").unwrap();
            mounted.unwrap().unmount().unwrap();
        } else {
            assert!(matches!(&mounted, Err(MountError::DeadMount { by, .. }) if by == "murphy:other"));
            rustix::mount::unmount(path, UnmountFlags::DETACH).unwrap();
        }
    }
}

/// The fear: what says that mounting works has not tried it, or leaves behind what it has tried it with.
#[test]
fn a_trial_leaves_nothing_behind_and_says_why_it_cannot_be() {
    let Some(world) = World::new() else { return };
    let empty = tempfile::tempdir().unwrap();
    try_mount(empty.path()).unwrap();
    assert_eq!(detach_below(&empty.path().canonicalize().unwrap()).unwrap(), 0, "it is still mounted");
    assert!(matches!(try_mount(world.directory.path()), Err(MountError::AlreadyMounted { .. })));
    let missing = try_mount(&empty.path().join("none")).unwrap_err().to_string();
    assert!(missing.contains("none") && !missing.contains('\n'), "{missing}");
}

#[test]
fn everything_below_a_directory_is_detached_dead_or_in_use() {
    let Some(mut world) = World::new() else { return };
    let outside = tempfile::tempdir().unwrap();
    let below = outside.path().join("a b/in-use");
    fs::create_dir_all(&below).unwrap();
    let fs: Arc<dyn FileSystem> = world.memory.clone();
    let mount = Mount::new(fs, &below, &MountOptions::new("test"), world.runtime.handle().clone()).unwrap();
    let open = File::create(below.join("open")).unwrap();
    let dead = outside.path().join("dead");
    fs::create_dir(&dead).unwrap();
    mount_without_a_process("murphy:dead", &dead);
    assert_eq!(detach_below(&outside.path().canonicalize().unwrap()).unwrap(), 2);
    assert!(listing(&below).is_empty() && listing(&dead).is_empty());
    assert!(world.mount.take().unwrap().unmount().is_ok(), "one elsewhere was touched");
    drop((open, mount));
}

#[test]
fn a_read_only_mount_refuses_changes() {
    let Some(world) = World::with(&MountOptions { read_only: true, ..MountOptions::new("test") }) else {
        return;
    };
    let error = File::create(world.path("f")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn a_name_that_would_break_the_mount_table_is_refused() {
    for bad in ["", "a b", "a,rw", "a\n"] {
        assert!(matches!(MountOptions::new(bad).source(), Err(MountError::Name { .. })), "{bad:?}");
    }
}

/// How long anything that happens within moments may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(2);
