//! `DIR/murphy.toml`: what is local to a node. What all nodes of a volume share is in its log.
//!
//! Invariants:
//! - The file is replaced as a whole and durably; it is the old one or the new one.
//! - A file of another format version is refused before anything else in it is looked at, an unknown key too.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use murphy_fs::StoreUrl;
use murphy_log::{BranchId, OsFiles, VolumeId, replace_file};
use murphy_mirror::PublicKey;
use serde::{Deserialize, Serialize};

use crate::{
    error::{CliError, at},
    settings::Ack,
};

/// What `murphy.toml` says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeConfig {
    /// The version of this file and of the directory around it.
    pub(crate) format: u32,
    #[serde(with = "text")]
    pub(crate) volume: VolumeId,
    #[serde(with = "text")]
    pub(crate) branch: BranchId,
    /// The name of the volume, for people.
    pub(crate) name: String,
    pub(crate) role: Role,
    /// Where new packs go, and where packs are read first.
    #[serde(with = "text")]
    pub(crate) blocks: StoreUrl,
    /// Where packs are read that are not there: the archives that this copy was made of, or that had more than a promoted mirror.
    #[serde(default, with = "texts", skip_serializing_if = "Vec::is_empty")]
    pub(crate) packs_from: Vec<StoreUrl>,
    /// Archives that this node reaches by another URL than the shared one: with credentials of its own.
    #[serde(default, with = "texts", skip_serializing_if = "Vec::is_empty")]
    pub(crate) archives: Vec<StoreUrl>,
    #[serde(default, skip_serializing_if = "MountDefaults::is_empty")]
    pub(crate) mount: MountDefaults,
    /// Whom a mirror follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<Upstream>,
    /// The source has removed this mirror: it is no member any more, and takes over from nobody.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) removed: bool,
    /// How a former mirror became the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) promoted: Option<Promoted>,
    /// Archives, in the shared form of their URLs, that were given up when this node took over: whoever has sealed one of them for an epoch that does
    /// not come after this node's own has not replaced it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) archives_given_up: BTreeSet<String>,
    /// A level of `--ack` that the log names and that is not in force yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ack_pending: Option<PendingAck>,
    /// Who took over from this source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fenced: Option<Fenced>,
    /// Ends of histories that lost, and are kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) branches: Vec<KeptBranch>,
}

/// A source, as a mirror reaches it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Upstream {
    /// Where it listens, `host:port`, best first.
    pub(crate) addresses: Vec<String>,
    /// The key that it proves.
    #[serde(with = "text")]
    pub(crate) key: PublicKey,
}

/// What a promotion found, and from whom it took over.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Promoted {
    /// The number of the epoch that began.
    pub(crate) epoch: u32,
    /// The last entry before it.
    pub(crate) metadata_lsn: u64,
    /// The chain hash after it.
    pub(crate) hash: String,
    /// Up to where every byte was here.
    pub(crate) data_lsn: u64,
    /// The source before.
    pub(crate) from: Upstream,
    /// Members that were given up: nobody waits for packs that only they may have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) given_up: Vec<String>,
    /// Whether the tree says of every byte behind `data_lsn` whether it is here or missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_gathered: bool,
    /// Every mirror that acknowledges has what made the others members.
    #[serde(default)]
    pub(crate) is_settled: bool,
}

impl Promoted {
    /// Whether it is still open which bytes up to `metadata_lsn` are here.
    pub(crate) fn lacks_bytes(&self) -> bool {
        !self.is_gathered && self.data_lsn < self.metadata_lsn
    }
}

/// A level that counts once everybody who may take over has heard of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PendingAck {
    /// What an fsync waits for until then.
    pub(crate) before: Ack,
    /// What it waits for then. It means nothing if the log names another level.
    pub(crate) to: Ack,
}

/// The epoch that ended this source's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fenced {
    /// Its number.
    pub(crate) epoch: u32,
    /// The node that began it, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) by: Option<String>,
}

impl Fenced {
    /// Who has taken over.
    pub(crate) fn text(&self) -> String {
        let by = self.by.as_ref().map_or_else(String::new, |by| format!(", begun by node {by},"));
        format!("epoch {}{by} has taken over", self.epoch)
    }
}

/// Entries of this node's log that are not in the volume's history.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeptBranch {
    /// The number of their epoch.
    pub(crate) epoch: u32,
    /// The last common entry; 0 if it is not known.
    pub(crate) after_lsn: u64,
    /// The last entry of the branch.
    pub(crate) last_lsn: u64,
    /// The chain hash after it.
    pub(crate) hash: String,
    /// Where they are, in the node's directory.
    pub(crate) place: String,
}

impl std::fmt::Display for KeptBranch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let KeptBranch { epoch, after_lsn, last_lsn, hash, place } = self;
        write!(f, "lsn {} to {last_lsn} of epoch {epoch}, hash {hash}, in {place}", after_lsn + 1)
    }
}

/// What a node is to its volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// It decides.
    Source,
    /// It follows.
    Mirror,
}

impl Role {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Mirror => "mirror",
        }
    }
}

/// What `mount` and `serve` take when their options do not say otherwise.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MountDefaults {
    /// As `--flush-after`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) flush_after: Option<String>,
    /// As `--io-timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) io_timeout: Option<String>,
    /// As `--cache-size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cache_size: Option<String>,
    /// As `--cache-dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// As `--scrub-every`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scrub_every: Option<String>,
}

impl MountDefaults {
    fn is_empty(&self) -> bool {
        *self == MountDefaults::default()
    }
}

impl NodeConfig {
    /// A source that has nothing but its store: what a command has more to say about its node it sets.
    pub(crate) fn new(volume: VolumeId, branch: BranchId, name: String, blocks: StoreUrl) -> NodeConfig {
        NodeConfig {
            format: FORMAT,
            volume,
            branch,
            name,
            role: Role::Source,
            blocks,
            packs_from: Vec::new(),
            archives: Vec::new(),
            mount: MountDefaults::default(),
            source: None,
            removed: false,
            promoted: None,
            archives_given_up: BTreeSet::new(),
            ack_pending: None,
            fenced: None,
            branches: Vec::new(),
        }
    }

    /// Whether it is of a history that a mirror has put aside: nobody's copy, to be looked at.
    pub(crate) fn is_branch(&self) -> bool {
        self.role == Role::Mirror && self.removed && self.source.is_none()
    }

    /// Whether `directory` is a node's.
    pub(crate) fn is_in(directory: &Path) -> bool {
        directory.join(FILE).exists()
    }

    /// Reads the file in `directory`.
    pub(crate) fn read(directory: &Path) -> Result<NodeConfig, CliError> {
        let path = directory.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(CliError::new(format!(
                    "{} is not a node: it has no {FILE}",
                    directory.display()
                ))
                .hint("make one with murphy format, join, restore or load"));
            }
            Err(error) => return Err(at(&path)(error)),
        };
        let damaged = |error: toml::de::Error| {
            let mut lines = error.message().lines();
            CliError::new(format!("{} is damaged: {}", path.display(), lines.next().unwrap_or_default()))
                .hint("the log beside it is whole: restore the file from a copy, or write it anew by hand")
        };
        let table: toml::Table = text.parse().map_err(damaged)?;
        match table.get("format").and_then(toml::Value::as_integer) {
            Some(found) if found == i64::from(FORMAT) => {}
            Some(found) => {
                return Err(CliError::new(format!(
                    "{}: format version {found}, this program reads version {FORMAT}",
                    path.display()
                ))
                .hint("use the version of murphy that wrote it, or a later one"));
            }
            None => return Err(CliError::new(format!("{} is damaged: it has no format", path.display()))),
        }
        toml::from_str(&text).map_err(damaged)
    }

    /// Replaces the file in `directory`; durable when it returns.
    pub(crate) fn write(&self, directory: &Path) -> Result<(), CliError> {
        let text = toml::to_string_pretty(self).map_err(CliError::new)?;
        let path = directory.join(FILE);
        replace_file(&OsFiles, &path, format!("{HEADER}{text}").as_bytes()).map_err(at(&path))
    }
}

/// Values in their text form.
mod text {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// Lists of such values.
mod texts {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(values: &[T], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<Vec<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let texts = Vec::<String>::deserialize(from)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}

/// The version of a node's directory that is read and written.
const FORMAT: u32 = 0;
const FILE: &str = "murphy.toml";
const HEADER: &str = "# What is local to this node. Shared settings are in the volume's log.\n\n";

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NodeConfig {
        let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
        let name = "some \"name\"".to_owned();
        NodeConfig {
            archives: vec!["s3://b?credentials=env:X_".parse().unwrap()],
            mount: MountDefaults { io_timeout: Some("5s".to_owned()), ..MountDefaults::default() },
            source: Some(Upstream {
                addresses: vec!["h:7000".to_owned()],
                key: PublicKey::from_bytes([7; 32]),
            }),
            archives_given_up: BTreeSet::from(["s3://gone".to_owned()]),
            fenced: Some(Fenced { epoch: 2, by: None }),
            branches: vec![KeptBranch {
                epoch: 1,
                after_lsn: 5,
                last_lsn: 9,
                hash: "00".to_owned(),
                place: "log".to_owned(),
            }],
            ..NodeConfig::new(volume, branch, name, "file:///x".parse().unwrap())
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        config().write(directory.path()).unwrap();
        assert_eq!(NodeConfig::read(directory.path()), Ok(config()));
    }

    /// A later version may mean anything by its keys.
    #[test]
    fn another_format_version_is_named_before_its_keys_are_read() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), "format = 7\nsurprise = 1\n").unwrap();
        let refused = NodeConfig::read(directory.path()).unwrap_err().to_string();
        assert!(refused.contains("format version 7"), "{refused}");
    }

    #[test]
    fn damage_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let whole = {
            config().write(directory.path()).unwrap();
            fs::read_to_string(directory.path().join(FILE)).unwrap()
        };
        for text in
            ["", "format = ", "format = 0", "\u{0}\u{1}", &whole.replace("role", "rule"), &whole[..90]]
        {
            fs::write(directory.path().join(FILE), text).unwrap();
            let refused = NodeConfig::read(directory.path()).unwrap_err().to_string();
            assert!(refused.contains(FILE), "{refused}");
        }
    }
}
