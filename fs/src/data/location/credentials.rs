//! Where the credentials of a store come from.
//!
//! Invariants:
//! - No secret is in the text of an error, of a log line or of `Debug`.

use std::{
    ffi::OsString,
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    time::SystemTime,
};

/// Where credentials come from.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum CredentialsSource {
    /// Environment variables, whose names have this before the cloud's usual ones.
    Environment(String),
    /// A file of lines `NAME=value` with the cloud's usual names.
    File(PathBuf),
}

/// Settings by the names that they have in the cloud's usual environment.
pub(super) struct Settings(pub(super) Vec<(String, String)>);

/// What changes when a credentials file does.
pub(super) type Stamp = (Option<SystemTime>, u64, u64);

impl CredentialsSource {
    /// The value of the URL option; `None` for the default.
    pub(super) fn to_option(&self) -> Option<String> {
        match self {
            CredentialsSource::Environment(prefix) if prefix.is_empty() => None,
            CredentialsSource::Environment(prefix) => Some(format!("env:{prefix}")),
            CredentialsSource::File(path) => Some(format!("file:{}", path.display())),
        }
    }

    /// The settings as they are now.
    pub(super) fn read(&self) -> Result<Settings, CredentialsError> {
        match self {
            CredentialsSource::Environment(prefix) => {
                Ok(Settings(from_environment(prefix, std::env::vars_os())))
            }
            CredentialsSource::File(path) => {
                let unreadable = |source| CredentialsError::Unreadable { path: path.clone(), source };
                let size = fs::metadata(path).map_err(unreadable)?.len();
                if size > FILE_BYTES_MAX {
                    return Err(CredentialsError::TooLarge { path: path.clone() });
                }
                parse_file(path, &fs::read_to_string(path).map_err(unreadable)?)
            }
        }
    }

    /// What to compare to know whether the settings must be read again; `None` if they never change.
    pub(super) fn stamp(&self) -> Option<Stamp> {
        use std::os::unix::fs::MetadataExt as _;
        let CredentialsSource::File(path) = self else { return None };
        let meta = fs::metadata(path).ok()?;
        Some((meta.modified().ok(), meta.len(), meta.ino()))
    }

    /// Whether the user said where the credentials are; then they must be there.
    pub(super) fn is_explicit(&self) -> bool {
        self.to_option().is_some()
    }
}

impl FromStr for CredentialsSource {
    type Err = ();

    fn from_str(text: &str) -> Result<CredentialsSource, ()> {
        match text.split_once(':') {
            Some(("env", prefix)) if is_variable(prefix) => {
                Ok(CredentialsSource::Environment(prefix.to_owned()))
            }
            Some(("file", path)) if path.starts_with('/') => Ok(CredentialsSource::File(path.into())),
            _ => Err(()),
        }
    }
}

impl fmt::Display for CredentialsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CredentialsSource::Environment(prefix) if prefix.is_empty() => write!(f, "the environment"),
            CredentialsSource::Environment(prefix) => {
                write!(f, "environment variables that begin with {prefix}")
            }
            CredentialsSource::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Why credentials cannot be used. The text has no secret in it.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file cannot be read.
    #[error("cannot read the credentials in {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{} is too large to be a file of credentials", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A line that says nothing.
    #[error("line {line} of the credentials in {} is not NAME=value", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The number of the line, from 1.
        line: usize,
    },
    /// Nothing of what the cloud calls its settings is there.
    #[error("no credentials in {source_name}: expected names such as {example}")]
    Missing {
        /// Where they were looked for.
        source_name: String,
        /// A name that would do.
        example: String,
    },
}

fn from_environment(
    prefix: &str,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Vec<(String, String)> {
    let own = |(name, value): (OsString, OsString)| {
        Some((name.to_str()?.strip_prefix(prefix)?.to_owned(), value.into_string().ok()?))
    };
    variables.filter_map(own).collect()
}

fn parse_file(path: &Path, text: &str) -> Result<Settings, CredentialsError> {
    let mut settings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line);
        let pair = line.split_once('=').map(|(name, value)| (name.trim(), unquote(value.trim())));
        match pair {
            Some((name, value)) if is_variable(name) => settings.push((name.to_owned(), value.to_owned())),
            _ => return Err(CredentialsError::Line { path: path.to_owned(), line: number + 1 }),
        }
    }
    Ok(Settings(settings))
}

fn unquote(value: &str) -> &str {
    let within = |quote| value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    within('"').or_else(|| within('\'')).unwrap_or(value)
}

fn is_variable(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

const FILE_BYTES_MAX: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_another_prefix_are_not_mixed_in() {
        let variables = [("B_AWS_REGION", "b"), ("AWS_REGION", "a"), ("AB_AWS_REGION", "x")];
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        assert_eq!(
            from_environment("B_", variables.into_iter()),
            [("AWS_REGION".to_owned(), "b".to_owned())]
        );
    }

    #[test]
    fn a_file_reads_as_a_shell_would() {
        let text = "# comment\n\nAWS_A=1\nexport AWS_B = \"two words\"\n AWS_C='x=y' \nAWS_D=\n";
        let settings = parse_file(Path::new("f"), text).unwrap().0;
        let settings: Vec<(&str, &str)> = settings.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(settings, [("AWS_A", "1"), ("AWS_B", "two words"), ("AWS_C", "x=y"), ("AWS_D", "")]);
    }

    #[test]
    fn the_error_about_a_bad_line_does_not_repeat_it() {
        let error = parse_file(Path::new("/f"), "AWS_A=1\nhunter2\n").err().unwrap();
        assert_eq!(error.to_string(), "line 2 of the credentials in /f is not NAME=value");
    }
}
