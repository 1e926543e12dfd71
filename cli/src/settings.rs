//! The settings that all nodes of a volume share: entries of its log, by name.
//!
//! Invariants:
//! - A setting that is missing has its default; one that cannot be read is an error.
//! - No secret, and no place of one, is shared.

use std::{fmt, str::FromStr};

use bytes::Bytes;
use murphy_backup::Archive;
use murphy_fs::{IndexSnapshot, RowKey, SettingRow, StoreUrl, Volume};
use serde::{Deserialize, Serialize};

use crate::error::{CliError, failed};

/// What an fsync waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Ack {
    /// The node's own disk.
    Local,
    /// As many mirrors.
    Mirrors(u32),
    /// An archive outside the source's failure domain.
    Archive,
}

impl fmt::Display for Ack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ack::Local => f.write_str("local"),
            Ack::Mirrors(count) => write!(f, "mirror={count}"),
            Ack::Archive => f.write_str("archive"),
        }
    }
}

impl FromStr for Ack {
    type Err = String;

    fn from_str(text: &str) -> Result<Ack, String> {
        match text {
            "local" => Ok(Ack::Local),
            "archive" => Ok(Ack::Archive),
            _ => {
                let count = text.strip_prefix("mirror=").and_then(|count| count.parse().ok());
                let count = count.filter(|count| (1..=ACK_MIRRORS_MAX).contains(count));
                count.map(Ack::Mirrors).ok_or_else(|| format!("{text:?} is not local, mirror=W or archive"))
            }
        }
    }
}

impl TryFrom<String> for Ack {
    type Error = String;

    fn try_from(text: String) -> Result<Ack, String> {
        text.parse()
    }
}

impl From<Ack> for String {
    fn from(ack: Ack) -> String {
        ack.to_string()
    }
}

impl Ack {
    /// Whether whatever it promises is promised by `other` too.
    pub(crate) fn is_kept_by(self, other: Ack) -> bool {
        match (self, other) {
            (Ack::Local, _) | (Ack::Archive, Ack::Archive) => true,
            (Ack::Mirrors(before), Ack::Mirrors(after)) => before <= after,
            (Ack::Mirrors(_), Ack::Local | Ack::Archive) | (Ack::Archive, Ack::Local | Ack::Mirrors(_)) => {
                false
            }
        }
    }
}

/// An archive of the volume, as its log names it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SharedArchive {
    /// Where it is.
    pub(crate) url: String,
    /// Whether it holds no packs.
    #[serde(default)]
    pub(crate) log_only: bool,
    /// It acknowledges nothing yet: none of those before it is known to have the entry that names it, and a successor that knows only
    /// those would not seal it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) joining: bool,
    /// Whoever may take over has the entry that names it, or gets it with everything else when he joins: it needs nobody's word any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) known: bool,
}

impl SharedArchive {
    /// One that waits for nobody, and of which not everybody is known to know.
    pub(crate) fn new(url: String, log_only: bool) -> SharedArchive {
        SharedArchive { url, log_only, joining: false, known: false }
    }

    /// Whether it may acknowledge an fsync, as far as the volume knows.
    pub(crate) fn may_acknowledge(&self) -> bool {
        !self.log_only && !self.joining
    }
}

/// The shared settings that this program knows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) ack: Ack,
    /// Every operation waits as fsync does.
    pub(crate) sync: bool,
    /// The span in which every moment can be restored, in its text form.
    pub(crate) window: String,
    pub(crate) archives: Vec<SharedArchive>,
}

impl Settings {
    /// What a volume with these settings begins with.
    pub(crate) fn genesis(&self) -> Result<Vec<(String, String)>, CliError> {
        let archives = serde_json::to_string(&self.archives).map_err(failed)?;
        let settings = [
            (NAME, self.name.clone()),
            (ACK, self.ack.to_string()),
            (SYNC, self.sync.to_string()),
            (WINDOW, self.window.clone()),
            (ARCHIVES, archives),
        ];
        Ok(settings.map(|(name, text)| (name.to_owned(), text)).to_vec())
    }

    /// What a copy of a volume, which is called `name`, changes about its settings: it has no archive until one is given, and waits for nobody.
    pub(crate) fn of_copy(name: &str) -> Vec<(String, Option<String>)> {
        let set = |setting: &str, text: String| (setting.to_owned(), Some(text));
        vec![set(NAME, name.to_owned()), set(ARCHIVES, "[]".to_owned()), set(ACK, Ack::Local.to_string())]
    }

    /// The change that sets what fsync waits for.
    pub(crate) fn set_ack(ack: Ack) -> (String, Option<String>) {
        (ACK.to_owned(), Some(ack.to_string()))
    }

    /// The change that sets the archives.
    pub(crate) fn set_archives(
        archives: &[SharedArchive],
    ) -> Result<Vec<(String, Option<String>)>, CliError> {
        Ok(vec![(ARCHIVES.to_owned(), Some(serde_json::to_string(archives).map_err(failed)?))])
    }

    /// The settings of a volume. One that is missing has its default; one that cannot be read is an error.
    pub(crate) fn of(volume: &Volume) -> Result<Settings, CliError> {
        Settings::read(|name| volume.setting(name).map_err(failed))
    }

    /// The settings in a tree.
    pub(crate) fn in_tree(tree: &dyn IndexSnapshot) -> Result<Settings, CliError> {
        Settings::read(|name| {
            let row = tree.get(&RowKey::setting(name)).map_err(failed)?;
            row.map(|row| setting_text(&row)).transpose()
        })
    }

    /// The settings of which `read` gives each by its name.
    pub(crate) fn read(
        read: impl Fn(&str) -> Result<Option<String>, CliError>,
    ) -> Result<Settings, CliError> {
        let bad = |name: &str, text: &str| CliError::new(format!("the shared setting {name} is {text:?}"));
        let ack = read(ACK)?.map(|text| text.parse().map_err(|_| bad(ACK, &text))).transpose()?;
        let sync = read(SYNC)?.map(|text| text.parse().map_err(|_| bad(SYNC, &text))).transpose()?;
        let archives =
            read(ARCHIVES)?.map(|text| serde_json::from_str(&text).map_err(|_| bad(ARCHIVES, &text)));
        Ok(Settings {
            name: read(NAME)?.unwrap_or_default(),
            ack: ack.unwrap_or(Ack::Local),
            sync: sync.unwrap_or(false),
            window: read(WINDOW)?.unwrap_or_else(|| DEFAULT_WINDOW.to_owned()),
            archives: archives.transpose()?.unwrap_or_default(),
        })
    }
}

impl Settings {
    /// The name of the volume; as its archive has it if the log has none.
    pub(crate) fn name_or(&self, archive: &Archive) -> String {
        match self.name.is_empty() {
            true => archive.descriptor().name.clone(),
            false => self.name.clone(),
        }
    }
}

/// The text of a setting's row.
pub(crate) fn setting_text(row: &Bytes) -> Result<String, CliError> {
    let row = SettingRow::decode(row).map_err(|error| failed(format!("a shared setting: {error}")))?;
    Ok(String::from_utf8_lossy(&row.text).into_owned())
}

/// The form of a store's URL that all nodes share: how each proves who it is, is its own matter.
pub(crate) fn shared_form(url: &StoreUrl) -> String {
    let text = url.to_string();
    let Some((place, options)) = text.split_once('?') else { return text };
    let shared: Vec<_> = options.split('&').filter(|option| !option.starts_with("credentials=")).collect();
    if shared.is_empty() { place.to_owned() } else { format!("{place}?{}", shared.join("&")) }
}

/// A name of a volume: letters, digits, `-`, `_` and `.`.
pub(crate) fn parse_name(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(plain) {
        return Err(format!("{text:?}: a name has 1 to {NAME_BYTES_MAX} letters, digits, '-', '_' and '.'"));
    }
    Ok(text.to_owned())
}

const NAME: &str = "name";
const ACK: &str = "ack";
pub(crate) const SYNC: &str = "sync";
const WINDOW: &str = "window";
pub(crate) const ARCHIVES: &str = "archives";
pub(crate) const DEFAULT_WINDOW: &str = "30d";
const ACK_MIRRORS_MAX: u32 = 64;
const NAME_BYTES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_level_survives_its_text() {
        for ack in [Ack::Local, Ack::Archive, Ack::Mirrors(2)] {
            assert_eq!(ack.to_string().parse(), Ok(ack));
        }
        for bad in ["", "mirror", "mirror=0", "mirror=x", "mirror=65", "remote"] {
            assert!(bad.parse::<Ack>().is_err(), "{bad:?}");
        }
    }

    /// The fear: an order that gives a promise up is taken for one that gives more, and nobody is asked.
    #[test]
    fn a_level_keeps_another_one_only_if_it_promises_all_of_it() {
        let levels = [Ack::Local, Ack::Mirrors(1), Ack::Mirrors(2), Ack::Archive];
        let kept = levels.map(|before| levels.map(|after| before.is_kept_by(after)));
        assert_eq!(
            kept,
            [
                [true, true, true, true],
                [false, true, true, false],
                [false, false, true, false],
                [false, false, false, true],
            ]
        );
    }

    /// The fear: the list of a volume that was made before archives were noted to be known is not read, or everybody is taken to know them.
    #[test]
    fn an_archive_of_which_nothing_is_said_is_not_known_to_everybody() {
        let listed: Vec<SharedArchive> = serde_json::from_str(r#"[{"url":"s3://b"}]"#).unwrap();
        assert_eq!(listed, [SharedArchive::new("s3://b".to_owned(), false)]);
        assert!(!listed[0].known && listed[0].may_acknowledge());
        let known = SharedArchive { known: true, ..listed[0].clone() };
        let text = serde_json::to_string(&known).unwrap();
        assert_eq!(serde_json::from_str::<SharedArchive>(&text).unwrap(), known);
    }

    /// A secret's place is local; another node reaches the same archive with its own.
    #[test]
    fn the_shared_form_of_a_url_has_no_credentials() {
        let url: StoreUrl = "s3://b/p?region=x&credentials=env:B_&domain=d".parse().unwrap();
        let shared = shared_form(&url);
        assert!(!shared.contains("credentials"), "{shared}");
        assert_eq!(shared_form(&shared.parse().unwrap()), shared);
        assert_eq!(shared_form(&"s3://b?credentials=env:B_".parse().unwrap()), "s3://b");
    }

    #[test]
    fn names_that_a_mount_table_cannot_show_are_refused() {
        assert!(parse_name("home-1.x").is_ok());
        for bad in ["", "a b", "a/b", "\u{e9}", &"x".repeat(65)] {
            assert!(parse_name(bad).is_err(), "{bad:?}");
        }
    }
}
