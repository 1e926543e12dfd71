//! The first entry of a volume, sessions, and the settings that all nodes share.

use bytes::Bytes;

use super::{Draft, EntryKind, Operation, Refusal};
use crate::{DirectoryRow, Ino, InodeRow, Kind, RowKey, SessionRow, SettingRow};

/// Makes the root directory and the settings of a new volume.
#[derive(Clone, Debug)]
pub(crate) struct Genesis {
    pub(crate) settings: Vec<(String, String)>,
}

impl Operation for Genesis {
    type Reply = ();
    const KIND: EntryKind = EntryKind::Genesis;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(), Refusal> {
        let now = draft.now();
        let root = InodeRow {
            mode: 0o755,
            uid: draft.caller().uid,
            gid: draft.caller().gid,
            generation: draft.epoch(),
            ..InodeRow::empty(Kind::Directory, now)
        };
        let directory = DirectoryRow { mtime: now, ctime: now, ..DirectoryRow::default() };
        draft.put(RowKey::inode(Ino::ROOT), Some(root.encode()))?;
        draft.put(RowKey::directory(Ino::ROOT), Some(directory.encode()))?;
        draft.count_inode();
        for (name, text) in &self.settings {
            draft.put(RowKey::setting(name), Some(setting(text)))?;
        }
        Ok(())
    }
}

/// Begins the session of a process that decides, and ends those that it follows.
#[derive(Clone, Debug)]
pub(crate) struct BeginSession {
    /// The writer half of the names of its packs.
    pub(crate) writer: u64,
    /// Earlier sessions that are over.
    pub(crate) ended: Vec<u64>,
}

impl Operation for BeginSession {
    type Reply = ();
    const KIND: EntryKind = EntryKind::Session;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(), Refusal> {
        draft.need(self.ended.iter().map(|id| RowKey::session(*id)))?;
        for id in &self.ended {
            let key = RowKey::session(*id);
            let row = draft.decoded(&key, |row| SessionRow::decode(row))?.ok_or(Refusal::Stale)?;
            draft.put(key, Some(SessionRow { ended: true, ..row }.encode()))?;
        }
        let row = SessionRow { writer: self.writer, pack_floor: 0, ended: false };
        draft.put_newborn(RowKey::session(draft.newborn().get()), row.encode());
        Ok(())
    }
}

/// Sets or removes shared settings.
#[derive(Clone, Debug)]
pub(crate) struct ChangeSettings {
    pub(crate) settings: Vec<(String, Option<String>)>,
}

impl Operation for ChangeSettings {
    type Reply = ();
    const KIND: EntryKind = EntryKind::Setting;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(), Refusal> {
        for (name, text) in &self.settings {
            draft.mention(Bytes::copy_from_slice(name.as_bytes()));
            draft.put(RowKey::setting(name), text.as_deref().map(setting))?;
        }
        Ok(())
    }
}

fn setting(text: &str) -> Bytes {
    SettingRow { text: Bytes::copy_from_slice(text.as_bytes()) }.encode()
}
