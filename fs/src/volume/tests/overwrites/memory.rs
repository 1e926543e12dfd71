//! What dirty data takes in memory, also when it is not to be stored any more.

use super::*;

/// The fear: whoever writes files and empties them over a store that does not answer fills the memory: what is on its way is held, and
/// counted no more.
#[tokio::test]
async fn what_was_cut_off_on_its_way_counts_until_nobody_holds_it() {
    const LIMIT: u64 = 1 << 20;
    let options = VolumeOptions { dirty_bytes: LIMIT, ..VolumeOptions::default() };
    let scene = Scene::new(options, 0).await;
    scene.store.puts.send_replace(Puts::Hold);
    let mut random = Random(1);
    let bytes: Vec<u8> = (0..LIMIT / 2).map(|_| random.below(256) as u8).collect();
    let bytes = Bytes::from(bytes);
    let mut waiting = None;
    for number in 0..4 {
        let name = Name::new(format!("file {number}")).unwrap();
        let created = scene.volume.create(&Caller::default(), Ino::ROOT, &name, 0o644, READ_WRITE);
        let (attr, opened) = created.wait().await.unwrap();
        let written = scene.volume.write(&Caller::default(), attr.ino, opened.handle, 0, bytes.clone());
        if let Answer::Later(written) = written {
            waiting = Some(written);
            break;
        }
        scene.volume.flush(attr.ino, opened.handle).wait().await.unwrap();
        scene.begun(number + 1).await;
        let empty = SetAttr { size: Some(0), ..SetAttr::default() };
        scene.volume.setattr(&Caller::default(), attr.ino, None, empty).wait().await.unwrap();
        assert_eq!(scene.volume.dirty_bytes(), 0);
    }
    scene.store.puts.send_replace(Puts::Succeed);
    waiting.expect("a writer waits").await.unwrap();
    scene.volume.sync_all().wait().await.unwrap();
    until("everything to be let go", || scene.volume.shared.files.memory.bytes() == 0).await;
}
