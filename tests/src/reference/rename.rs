//! The model's rename, in all its modes.
//!
//! Invariants:
//! - No directory ever becomes its own ancestor.
//! - The checks stand in the order of `docs/semantics.md`; nothing changes before the last of them.

use murphy_fs::{Caller, Errno, Ino, Kind, Name, RenameMode, Timespec};

use super::{Body, State};

impl State {
    pub(super) fn rename(
        &mut self,
        now: Timespec,
        caller: &Caller,
        from: (Ino, &Name),
        to: (Ino, &Name),
        mode: RenameMode,
    ) -> Result<(), Errno> {
        self.directory(from.0)?;
        self.directory(to.0)?;
        let source = self.entry(from.0, from.1)?;
        let target = self.entry(to.0, to.1).ok();
        match (mode, target) {
            (RenameMode::NoReplace, Some(_)) => return Err(Errno::EEXIST),
            (RenameMode::Exchange, None) => return Err(Errno::ENOENT),
            _ => {}
        }
        if target == Some(source) {
            return Ok(());
        }
        if self.is_at_or_below(to.0, source)? {
            return Err(Errno::EINVAL);
        }
        match target {
            Some(target) if mode == RenameMode::Exchange => {
                if self.is_at_or_below(from.0, target)? {
                    return Err(Errno::EINVAL);
                }
                self.may_remove(caller, from.0, source)?;
                self.may_remove(caller, to.0, target)?;
                self.exchange(now, from, to, (source, target))
            }
            _ => {
                self.may_remove(caller, from.0, source)?;
                if let Some(target) = target {
                    self.may_remove(caller, to.0, target)?;
                    self.may_replace(source, target)?;
                }
                self.replace(now, from, to, (source, target))?;
                if mode == RenameMode::Whiteout {
                    self.add(now, caller, from, Body::Special(Kind::CharDevice, 0), 0)?;
                }
                Ok(())
            }
        }
    }

    fn exchange(
        &mut self,
        now: Timespec,
        from: (Ino, &Name),
        to: (Ino, &Name),
        (source, target): (Ino, Ino),
    ) -> Result<(), Errno> {
        self.put_name(now, from.0, from.1, target)?;
        self.put_name(now, to.0, to.1, source)?;
        self.node_mut(source)?.ctime = now;
        self.node_mut(target)?.ctime = now;
        Ok(())
    }

    fn replace(
        &mut self,
        now: Timespec,
        from: (Ino, &Name),
        to: (Ino, &Name),
        (source, target): (Ino, Option<Ino>),
    ) -> Result<(), Errno> {
        self.take_name(now, from.0, from.1)?;
        if let Some(target) = target {
            self.take_name(now, to.0, to.1)?;
            self.lose_name(now, target)?;
        }
        self.put_name(now, to.0, to.1, source)?;
        self.node_mut(source)?.ctime = now;
        Ok(())
    }

    fn may_replace(&self, source: Ino, target: Ino) -> Result<(), Errno> {
        match (self.directory(source), self.directory(target)) {
            (Ok(_), Err(_)) => Err(Errno::ENOTDIR),
            (Err(_), Ok(_)) => Err(Errno::EISDIR),
            (Ok(_), Ok(replaced)) if !replaced.entries.is_empty() => Err(Errno::ENOTEMPTY),
            _ => Ok(()),
        }
    }

    /// Whether `directory` is `above` or lies somewhere below it.
    fn is_at_or_below(&self, directory: Ino, above: Ino) -> Result<bool, Errno> {
        let mut at = directory;
        while at != above {
            if at == Ino::ROOT {
                return Ok(false);
            }
            at = self.directory(at)?.parent;
        }
        Ok(true)
    }
}
