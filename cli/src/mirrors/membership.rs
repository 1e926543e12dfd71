//! A member's own side of its membership: where it listens, what its copy dies with, and what it shows to members that do not know it yet.
//!
//! Invariants:
//! - The source hears where this mirror listens once for every connection to it, and vouches for the mirror each time.
//! - What the source has vouched for is in the node's directory: a mirror that was started anew after its source was lost still shows it.

use std::{fs, path::Path, sync::Arc, time::Duration};

use murphy_log::{OsFiles, replace_file};
use murphy_mirror::Proof;

use super::{Mirroring, following::Followed, lock};
use crate::error::{CliError, at};

impl Mirroring {
    /// Tells the source, whenever it is reached, where this mirror listens and what its copy dies with.
    pub(super) fn begin_announcing(self: &Arc<Mirroring>) -> Result<(), CliError> {
        let Some(source) = self.config().source.clone() else { return Ok(()) };
        let (dialer, domains) = (self.dialer.clone(), self.domains()?);
        // The source puts the address from which it sees this node in place of one that means all of them.
        let addresses: Vec<String> = self.listen.iter().map(ToString::to_string).collect();
        if addresses.is_empty() {
            tracing::warn!("nobody can reach this mirror to seal it: serve it with --listen HOST:PORT");
        }
        let followed = lock(&self.followed);
        let Some(followed) = followed.as_ref() else { return Ok(()) };
        let (mut status, mut stopped) = (followed.status.clone(), followed.stopping());
        let this = Arc::downgrade(self);
        let announcing = async move {
            while status.wait_for(|status| status.connected).await.is_ok() {
                let said = dialer.announce(&source.addresses, source.key, addresses.clone(), domains.clone());
                match said.await {
                    Ok(admitted) => {
                        let Some(mirroring) = this.upgrade() else { return };
                        mirroring.vouched_for(admitted.proof).await;
                        drop(mirroring);
                        if status.wait_for(|status| !status.connected).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the source does not know yet where this mirror listens");
                        tokio::time::sleep(ANNOUNCE_AGAIN).await;
                    }
                }
            }
        };
        followed.run(self.runtime.spawn(async move {
            tokio::select! {
                () = announcing => {}
                _ = stopped.wait_for(|stop| *stop) => {}
            }
        }));
        followed.run(self.runtime.spawn(self.heed(followed)));
        Ok(())
    }

    /// Notes whether the source says that this node is a member.
    fn heed(self: &Arc<Mirroring>, followed: &Followed) -> impl Future<Output = ()> + use<> {
        let (mut status, mut stopped) = (followed.status.clone(), followed.stopping());
        let this = Arc::downgrade(self);
        let heeding = async move {
            while status.changed().await.is_ok() {
                let (revoked, connected) = {
                    let status = status.borrow_and_update();
                    (status.revoked, status.connected)
                };
                let Some(mirroring) = this.upgrade() else { return };
                if revoked == mirroring.config().removed || !(revoked || connected) {
                    continue;
                }
                let noted = murphy_log::spawn_blocking(move || {
                    mirroring.change_config(|config| config.removed = revoked)
                });
                match noted.await {
                    Ok(Ok(())) if revoked => tracing::error!("this node was removed from the volume"),
                    Ok(Ok(())) => tracing::info!("this node is a member again"),
                    Ok(Err(error)) => tracing::warn!(%error, "whether this node is a member is not noted"),
                    Err(error) => tracing::warn!(%error, "whether this node is a member is not noted"),
                }
            }
        };
        async move {
            tokio::select! {
                () = heeding => {}
                _ = stopped.wait_for(|stop| *stop) => {}
            }
        }
    }

    /// Keeps what the source has vouched for.
    async fn vouched_for(&self, proof: Proof) {
        if proof == self.services.proof() {
            return;
        }
        let (directory, kept) = (self.directory.clone(), proof.clone());
        let kept = murphy_log::spawn_blocking(move || keep_proof(&directory, &kept)).await;
        match kept {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "what the source vouches for is not kept"),
            Err(error) => tracing::warn!(%error, "what the source vouches for is not kept"),
        }
        self.services.set_proof(proof);
    }
}

/// What the node in `directory` shows to members that do not know it; nothing if the file is damaged, which is said.
pub(super) fn load_proof(directory: &Path) -> Result<Proof, CliError> {
    let path = directory.join(PROOF);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Proof::default()),
        Err(error) => return Err(at(&path)(error)),
    };
    Ok(Proof::decode(&bytes).unwrap_or_else(|error| {
        tracing::warn!(%error, "{} is damaged; the source gives another one", path.display());
        Proof::default()
    }))
}

/// Keeps what a source has vouched for; durable when it returns.
pub(crate) fn keep_proof(directory: &Path, proof: &Proof) -> Result<(), CliError> {
    let path = directory.join(PROOF);
    replace_file(&OsFiles, &path, &proof.encode()).map_err(at(&path))
}

const PROOF: &str = "vouched";
const ANNOUNCE_AGAIN: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    /// A proof is a convenience; a node that cannot read it must still be served.
    #[test]
    fn a_proof_that_is_missing_or_damaged_is_none() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(load_proof(directory.path()), Ok(Proof::default()));
        keep_proof(directory.path(), &Proof::default()).unwrap();
        assert_eq!(load_proof(directory.path()), Ok(Proof::default()));
        for bad in [&b""[..], b"\x01", b"\xff\xff", &[3; 5000]] {
            fs::write(directory.path().join(PROOF), bad).unwrap();
            assert_eq!(load_proof(directory.path()), Ok(Proof::default()));
        }
    }
}
