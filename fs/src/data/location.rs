//! Where a store is: `file:///dir`, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, with options.
//!
//! | option | meaning |
//! |---|---|
//! | `region` | of an S3 bucket |
//! | `endpoint` | of a store other than the cloud's own |
//! | `account` | of Azure; elsewhere only part of the failure domain |
//! | `domain` | the failure domain, in place of what is derived from the URL |
//! | `credentials` | `env:PREFIX_` or `file:PATH` in place of the cloud's usual environment |
//! | `allow_http` | `true` permits an endpoint without TLS that is not on this machine |
//!
//! TLS uses rustls without a built-in provider: `main` installs one before the first store is opened, with
//! `rustls::crypto::ring::default_provider().install_default()`.
//!
//! Invariants:
//! - A URL holds no secret, so it may stand in settings, logs and arguments. One that does is refused, and its text is not
//!   repeated in the error.
//! - An option that is not known is refused, never passed over.
//! - Two places are in different failure domains only if the URL proves or declares it.

mod bounded;
mod claim;
mod credentials;
mod durable_folders;
mod layer;
mod open;
mod probe;
mod same_directory;

use std::{
    fmt,
    path::{Path as FilePath, PathBuf},
    str::FromStr,
};

use object_store::path::Path;
use url::Url;

pub use claim::{ClaimPrefixError, adopt_prefix, check_prefix, claim_prefix, release_prefix, remove_object};
pub use credentials::CredentialsError;
use credentials::CredentialsSource;
pub use durable_folders::DurableFolders;
pub use layer::{LayeredStore, StoreLayer};
pub use open::{OpenStoreError, OpenedStore};
pub use probe::{PROBE_FOLDER, ProbeError, probe_put_if_absent};

/// A place in object storage or in a file system. It prints as the URL that it was parsed from, options in a fixed order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct StoreUrl {
    place: Place,
    region: Option<String>,
    endpoint: Option<Url>,
    account: Option<String>,
    domain: Option<String>,
    credentials: CredentialsSource,
    allow_http: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Place {
    /// A directory of this machine.
    File(PathBuf),
    /// A bucket or container of a cloud, and a prefix in it.
    Cloud { cloud: Cloud, bucket: String, prefix: Path },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Cloud {
    S3,
    Gcs,
    Azure,
}

impl Cloud {
    const fn scheme(self) -> &'static str {
        match self {
            Cloud::S3 => "s3",
            Cloud::Gcs => "gs",
            Cloud::Azure => "az",
        }
    }
}

impl StoreUrl {
    /// The URL of a directory; it is absolute.
    pub fn from_directory(path: &FilePath) -> Result<StoreUrl, ParseStoreUrlError> {
        let url = Url::from_directory_path(path).map_err(|()| ParseStoreUrlError::RelativeFile)?;
        StoreUrl::from_url(&url)
    }

    /// Whether the store is a directory of this machine, which no disk cache is put above.
    pub fn is_file(&self) -> bool {
        matches!(self.place, Place::File(_))
    }

    /// The directory of a `file://` store.
    pub fn directory(&self) -> Option<&FilePath> {
        match &self.place {
            Place::File(directory) => Some(directory),
            Place::Cloud { .. } => None,
        }
    }

    /// What dies together with this store: the machine, or scheme, endpoint and account, or what `domain` says.
    ///
    /// An account that the URL does not name is not guessed from credentials, so two buckets of one cloud count as one
    /// domain until `account` or `domain` tells them apart.
    pub fn failure_domain(&self) -> FailureDomain {
        if let Some(domain) = &self.domain {
            return FailureDomain(domain.clone());
        }
        FailureDomain(match &self.place {
            Place::File(_) => format!("machine {}", this_machine()),
            Place::Cloud { cloud, .. } => {
                let endpoint =
                    self.endpoint.as_ref().map(|url| (url.host_str(), url.port_or_known_default()));
                let endpoint = match endpoint {
                    Some((Some(host), Some(port))) => format!("//{host}:{port}"),
                    _ => String::new(),
                };
                let account = self.account.as_deref().unwrap_or_default();
                format!("{}:{endpoint}/{account}", cloud.scheme())
            }
        })
    }

    fn from_url(url: &Url) -> Result<StoreUrl, ParseStoreUrlError> {
        if !url.username().is_empty() || url.password().is_some() {
            return Err(ParseStoreUrlError::Secret { place: "before the @".to_owned() });
        }
        if url.fragment().is_some() {
            return Err(ParseStoreUrlError::Fragment);
        }
        let cloud = match url.scheme() {
            "file" => None,
            "s3" => Some(Cloud::S3),
            "gs" => Some(Cloud::Gcs),
            "az" => Some(Cloud::Azure),
            scheme => return Err(ParseStoreUrlError::Scheme { scheme: scheme.to_owned() }),
        };
        let place = match cloud {
            None => parse_file(url)?,
            Some(cloud) => parse_cloud(url, cloud)?,
        };
        let mut store = StoreUrl {
            place,
            region: None,
            endpoint: None,
            account: None,
            domain: None,
            credentials: CredentialsSource::Environment(String::new()),
            allow_http: false,
        };
        let mut seen: Vec<String> = Vec::new();
        for (option, value) in url.query_pairs() {
            if seen.iter().any(|name| *name == option) {
                return Err(ParseStoreUrlError::Twice { option: option.into_owned() });
            }
            store.set(&option, &value)?;
            seen.push(option.into_owned());
        }
        store.check_endpoint()?;
        Ok(store)
    }

    fn set(&mut self, option: &str, value: &str) -> Result<(), ParseStoreUrlError> {
        let lower = option.to_ascii_lowercase();
        if option != "credentials" && SECRET_WORDS.iter().any(|word| lower.contains(word)) {
            return Err(ParseStoreUrlError::Secret { place: format!("in the option {option}") });
        }
        if !OPTIONS.contains(&option) {
            return Err(ParseStoreUrlError::UnknownOption { option: option.to_owned() });
        }
        if self.is_file() && option != "domain" {
            return Err(ParseStoreUrlError::NotForFiles { option: option.to_owned() });
        }
        let bad = |wanted| ParseStoreUrlError::Value { option: option.to_owned(), wanted };
        let printable =
            !value.is_empty() && value.len() <= VALUE_BYTES_MAX && !value.contains(char::is_control);
        if !printable {
            return Err(bad("1 to 1024 printable characters"));
        }
        let text = || Some(value.to_owned());
        match option {
            "region" => self.region = text(),
            "account" => self.account = text(),
            "domain" => self.domain = text(),
            "endpoint" => {
                let endpoint = parse_endpoint(value)?;
                // It is kept as it prints, with escapes, and has to be read again.
                if shown_endpoint(&endpoint).len() > VALUE_BYTES_MAX {
                    return Err(bad("at most 1024 characters long with its escapes"));
                }
                self.endpoint = Some(endpoint);
            }
            "credentials" => {
                self.credentials =
                    value.parse().map_err(|_| bad("env:PREFIX_ or file:PATH with an absolute path"))?;
            }
            _ => self.allow_http = value.parse().map_err(|_| bad("true or false"))?,
        }
        Ok(())
    }

    /// Without TLS everybody on the way can read and change requests; on the machine itself there is nobody.
    fn check_endpoint(&self) -> Result<(), ParseStoreUrlError> {
        let Some(endpoint) = &self.endpoint else { return Ok(()) };
        let local = match endpoint.host() {
            Some(url::Host::Domain(name)) => name == "localhost",
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        };
        if endpoint.scheme() == "https" || local || self.allow_http {
            return Ok(());
        }
        Err(ParseStoreUrlError::PlainHttp)
    }

    fn to_url(&self) -> Url {
        let mut url = match &self.place {
            // Both were made from a URL that was parsed, so they go back into one.
            Place::File(path) => Url::from_file_path(path).expect("the path of a file store is absolute"),
            Place::Cloud { cloud, bucket, prefix } => {
                let mut url: Url =
                    format!("{}://{bucket}", cloud.scheme()).parse().expect("a bucket is a host");
                // Signs of the path itself that would be taken for the beginning of an escape, a query or a fragment.
                let path = prefix.as_ref().replace('%', "%25").replace('?', "%3F").replace('#', "%23");
                url.set_path(&path);
                url
            }
        };
        let endpoint = self.endpoint.as_ref().map(|url| shown_endpoint(url).to_owned());
        let options = [
            ("region", self.region.clone()),
            ("endpoint", endpoint),
            ("account", self.account.clone()),
            ("domain", self.domain.clone()),
            ("credentials", self.credentials.to_option()),
            ("allow_http", self.allow_http.then(|| "true".to_owned())),
        ];
        if options.iter().any(|(_, value)| value.is_some()) {
            let mut query = url.query_pairs_mut();
            for (option, value) in options {
                if let Some(value) = value {
                    query.append_pair(option, &value);
                }
            }
        }
        url
    }
}

fn shown_endpoint(endpoint: &Url) -> &str {
    endpoint.as_str().trim_end_matches('/')
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_url().fmt(f)
    }
}

impl FromStr for StoreUrl {
    type Err = ParseStoreUrlError;

    fn from_str(text: &str) -> Result<StoreUrl, ParseStoreUrlError> {
        StoreUrl::from_url(&text.parse::<Url>().map_err(ParseStoreUrlError::Url)?)
    }
}

/// What dies together. Equal domains are lost at once.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct FailureDomain(String);

impl fmt::Display for FailureDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A text that is not the URL of a store. The text itself is not repeated: it may hold a secret.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseStoreUrlError {
    /// Not a URL at all.
    #[error(
        "not a store URL ({0}): expected file:///dir, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
    )]
    Url(url::ParseError),
    /// A URL of something else.
    #[error("a store cannot be reached by {scheme}: only by file, s3, gs and az")]
    Scheme {
        /// The scheme.
        scheme: String,
    },
    /// A secret in the URL.
    #[error(
        "a store URL must not hold a secret ({place}): it is kept in settings and logs; put the cloud's usual \
         variables into a file and say credentials=file:PATH, or into the environment and say credentials=env:PREFIX_"
    )]
    Secret {
        /// Where in the URL.
        place: String,
    },
    /// A misspelt option, or one of a later version.
    #[error(
        "unknown option {option} in a store URL: known are region, endpoint, account, domain, credentials, allow_http"
    )]
    UnknownOption {
        /// The option.
        option: String,
    },
    /// An option that only clouds have.
    #[error("the option {option} means nothing for a file store")]
    NotForFiles {
        /// The option.
        option: String,
    },
    /// An option with a value that it cannot have.
    #[error("the option {option} of a store URL must be {wanted}")]
    Value {
        /// The option.
        option: String,
        /// What it can be.
        wanted: &'static str,
    },
    /// Which of the two counts?
    #[error("the option {option} stands twice in a store URL")]
    Twice {
        /// The option.
        option: String,
    },
    /// `#` ends a URL; in a path it is written `%23`.
    #[error("a store URL has no part after #; in a path it is written %23")]
    Fragment,
    /// `file://dir` names a host.
    #[error("a file store is named by an absolute path with three slashes: file:///dir")]
    RelativeFile,
    /// No bucket, or no possible one.
    #[error(
        "a store URL names a bucket or container of letters, digits, dots, dashes and underscores after {scheme}://"
    )]
    Bucket {
        /// The scheme.
        scheme: &'static str,
    },
    /// A prefix that no store can have.
    #[error(
        "the prefix of a store URL is not a valid object path: no empty parts, no . and .., no control characters"
    )]
    Prefix,
    /// Everybody on the way could read and change the data.
    #[error(
        "an http endpoint on another machine is not protected by TLS; say allow_http=true if that is meant"
    )]
    PlainHttp,
}

fn parse_file(url: &Url) -> Result<Place, ParseStoreUrlError> {
    if url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err(ParseStoreUrlError::RelativeFile);
    }
    let path = url.to_file_path().map_err(|()| ParseStoreUrlError::RelativeFile)?;
    // Without this, /dir and /dir/ would be two places.
    Ok(Place::File(path.components().collect()))
}

fn parse_cloud(url: &Url, cloud: Cloud) -> Result<Place, ParseStoreUrlError> {
    let possible = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let bucket =
        url.host_str().filter(|host| !host.is_empty() && host.bytes().all(possible) && url.port().is_none());
    let Some(bucket) = bucket else { return Err(ParseStoreUrlError::Bucket { scheme: cloud.scheme() }) };
    let prefix = Path::from_url_path(url.path()).map_err(|_| ParseStoreUrlError::Prefix)?;
    Ok(Place::Cloud { cloud, bucket: bucket.to_owned(), prefix })
}

fn parse_endpoint(value: &str) -> Result<Url, ParseStoreUrlError> {
    let bad =
        || ParseStoreUrlError::Value { option: "endpoint".to_owned(), wanted: "http://HOST or https://HOST" };
    let mut url: Url = value.parse().map_err(|_| bad())?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(ParseStoreUrlError::Secret { place: "in the option endpoint".to_owned() });
    }
    let plain = matches!(url.scheme(), "http" | "https") && url.query().is_none() && url.fragment().is_none();
    // One place has one URL: clients take a slash at the end for nothing.
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    if plain { Ok(url) } else { Err(bad()) }
}

/// What tells this machine from others: its id, or else its name.
fn this_machine() -> String {
    let read = |path| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let known = ["/etc/machine-id", "/proc/sys/kernel/hostname"].into_iter().filter_map(read);
    let mut known = known.filter(|text| !text.is_empty());
    // All machines that have neither count as one: too many warnings are better than too few.
    known.next().unwrap_or_else(|| "unknown".to_owned())
}

const OPTIONS: [&str; 6] = ["region", "endpoint", "account", "domain", "credentials", "allow_http"];

/// An option whose name has one of these in it is taken for a secret, whatever other tools call it.
const SECRET_WORDS: [&str; 8] = ["key", "secret", "token", "password", "passwd", "sas", "sig", "credential"];

const VALUE_BYTES_MAX: usize = 1024;

#[cfg(test)]
mod tests;
