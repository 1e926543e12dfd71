//! Listings of directories that change while they are read.

use super::*;

/// The fear: every name of a page is removed before its attributes are read, the page is empty, and an empty page is the end of the directory.
#[tokio::test]
async fn a_page_of_names_that_are_all_gone_is_not_the_end_of_a_directory() {
    let (node, volume) = Node::new();
    for number in 0..30 {
        let (name, file) =
            (Name::new(number.to_string()).unwrap(), NewNode { kind: Kind::File, mode: 0o644, rdev: 0 });
        volume.mknod(&Caller::default(), Ino::ROOT, &name, file).wait().await.unwrap();
    }
    let names = volume.readdir(Ino::ROOT, 0, 100).wait().await.unwrap();
    assert_eq!(names.len(), 30);
    let (first, rest) = (names[..24].to_vec(), &names[24..]);
    let removing = volume.clone();
    *node.index.at_scan.lock() = Some(Box::new(move || {
        for entry in first {
            let Answer::Now(removed) = removing.unlink(&Caller::default(), Ino::ROOT, &entry.name) else {
                panic!("an unlink waits")
            };
            removed.unwrap();
        }
    }));
    let page = volume.readdir_plus(Ino::ROOT, 0, 24).wait().await.unwrap();
    let found: Vec<_> = page.iter().map(|plus| plus.entry.name.clone()).collect();
    assert_eq!(found, rest.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>());
    let last = page.last().unwrap().entry.cookie;
    assert_eq!(volume.readdir_plus(Ino::ROOT, last, 24).wait().await.unwrap(), Vec::new());
}
