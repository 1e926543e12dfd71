//! Opening a store by its URL, and opening it again when its credentials change.
//!
//! Invariants:
//! - Every request has a time-out, and retries end after [`RETRY_TIMEOUT`]: nothing hangs because a store does.
//! - A credentials file that cannot be used for the moment (it is being written) leaves the last good one in force.

use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};

use murphy_log::{Files, OsFiles};
use object_store::{
    BackoffConfig, ClientConfigKey, Error as ObjectError, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    local::LocalFileSystem,
    path::Path,
};
use parking_lot::Mutex;

use super::{
    Cloud, DurableFolders, Place, StoreUrl,
    bounded::Bounded,
    credentials::{CredentialsError, CredentialsSource, Settings, Stamp},
    layer::{LayeredStore, StoreLayer},
    same_directory::SameDirectory,
};

/// A store that was opened, and the prefix that everything in it has.
#[derive(Clone, Debug)]
pub struct OpenedStore {
    /// The store, the whole bucket of it.
    pub store: Arc<dyn ObjectStore>,
    /// What the URL names in it.
    pub prefix: Path,
    /// The URL, for messages.
    pub label: String,
}

impl StoreUrl {
    /// Opens the store; the directory of a file store is created. No request is made: see
    /// [`probe_put_if_absent`](super::probe_put_if_absent).
    ///
    /// A TLS provider must be installed before, for clouds. Credentials in a file are read again when it changes.
    pub fn open(&self) -> Result<OpenedStore, OpenStoreError> {
        let label = self.to_string();
        match &self.place {
            Place::File(directory) => {
                let failed = |source| OpenStoreError::Directory { path: directory.clone(), source };
                OsFiles.create_dir(directory).map_err(failed)?;
                let store =
                    LocalFileSystem::new_with_prefix(directory).map_err(|source| self.refused(source))?;
                let store = Arc::new(store.with_fsync(true));
                let store = DurableFolders::new(store, Arc::new(OsFiles), directory.clone());
                let store = SameDirectory::new(Arc::new(LayeredStore(store)), directory).map_err(failed)?;
                let store = Bounded::new(Arc::new(LayeredStore(store)));
                Ok(OpenedStore { store: Arc::new(LayeredStore(store)), prefix: Path::default(), label })
            }
            Place::Cloud { prefix, .. } => {
                let store = self.connect()?;
                let store = match self.credentials {
                    CredentialsSource::Environment(_) => store,
                    CredentialsSource::File(_) => Arc::new(LayeredStore(Reopening::new(self.clone(), store))),
                };
                Ok(OpenedStore { store, prefix: prefix.clone(), label })
            }
        }
    }

    /// A client of the cloud, with the credentials of this moment.
    fn connect(&self) -> Result<Arc<dyn ObjectStore>, OpenStoreError> {
        let Place::Cloud { cloud, bucket, .. } = &self.place else {
            return Err(OpenStoreError::NotACloud { url: self.to_string() });
        };
        let settings = self.credentials.read()?;
        let built = match cloud {
            Cloud::S3 => self
                .connect_s3(bucket, &settings)?
                .build()
                .map(|store| Arc::new(store) as Arc<dyn ObjectStore>),
            Cloud::Gcs => self.connect_gcs(bucket, &settings)?.build().map(|store| Arc::new(store) as _),
            Cloud::Azure => self.connect_azure(bucket, &settings)?.build().map(|store| Arc::new(store) as _),
        };
        built.map_err(|source| self.refused(source))
    }

    fn connect_s3(&self, bucket: &str, settings: &Settings) -> Result<AmazonS3Builder, OpenStoreError> {
        let mut builder = AmazonS3Builder::new();
        for (key, value) in client_defaults() {
            builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
        }
        for (key, value) in self.recognised::<AmazonS3ConfigKey>(settings, &["AWS_"], "AWS_ACCESS_KEY_ID")? {
            builder = builder.with_config(key, value);
        }
        if let Some(region) = &self.region {
            builder = builder.with_region(region);
        }
        if let Some((endpoint, http)) = self.endpoint_text() {
            builder = builder.with_endpoint(endpoint).with_allow_http(http);
        }
        let builder = builder.with_bucket_name(bucket).with_retry(retries());
        Ok(builder.with_conditional_put(S3ConditionalPut::ETagMatch))
    }

    fn connect_gcs(
        &self,
        bucket: &str,
        settings: &Settings,
    ) -> Result<GoogleCloudStorageBuilder, OpenStoreError> {
        let mut builder = GoogleCloudStorageBuilder::new();
        for (key, value) in client_defaults() {
            builder = builder.with_config(GoogleConfigKey::Client(key), value);
        }
        let names = ["GOOGLE_", "SERVICE_ACCOUNT"];
        for (key, value) in self.recognised::<GoogleConfigKey>(settings, &names, "GOOGLE_SERVICE_ACCOUNT")? {
            builder = builder.with_config(key, value);
        }
        if let Some((endpoint, _)) = self.endpoint_text() {
            builder = builder.with_base_url(&endpoint);
        }
        Ok(builder.with_bucket_name(bucket).with_retry(retries()))
    }

    fn connect_azure(
        &self,
        container: &str,
        settings: &Settings,
    ) -> Result<MicrosoftAzureBuilder, OpenStoreError> {
        let mut builder = MicrosoftAzureBuilder::new();
        for (key, value) in client_defaults() {
            builder = builder.with_config(AzureConfigKey::Client(key), value);
        }
        let names = ["AZURE_", "IDENTITY_ENDPOINT"];
        for (key, value) in
            self.recognised::<AzureConfigKey>(settings, &names, "AZURE_STORAGE_ACCOUNT_KEY")?
        {
            builder = builder.with_config(key, value);
        }
        if let Some(account) = &self.account {
            builder = builder.with_account(account);
        }
        if let Some((endpoint, http)) = self.endpoint_text() {
            builder = builder.with_endpoint(endpoint).with_allow_http(http);
        }
        Ok(builder.with_container_name(container).with_retry(retries()))
    }

    /// The endpoint as clients want it, and whether it is without TLS.
    fn endpoint_text(&self) -> Option<(String, bool)> {
        let endpoint = self.endpoint.as_ref()?;
        Some((endpoint.as_str().trim_end_matches('/').to_owned(), endpoint.scheme() == "http"))
    }

    /// The settings that the cloud knows, of those whose names begin as `names`. Where the user said where the credentials
    /// are, there must be some: else the client would quietly take those of the machine.
    fn recognised<Key: std::str::FromStr>(
        &self,
        settings: &Settings,
        names: &[&str],
        example: &str,
    ) -> Result<Vec<(Key, String)>, CredentialsError> {
        let own = settings.0.iter().filter(|(name, _)| names.iter().any(|begin| name.starts_with(begin)));
        let mut credentials = false;
        let mut recognised = Vec::new();
        for (name, value) in own {
            let name = name.to_ascii_lowercase();
            if let Ok(key) = name.parse() {
                credentials |= CREDENTIAL_WORDS.iter().any(|word| name.contains(word));
                recognised.push((key, value.clone()));
            }
        }
        if !credentials && self.credentials.is_explicit() {
            let source_name = self.credentials.to_string();
            return Err(CredentialsError::Missing { source_name, example: example.to_owned() });
        }
        Ok(recognised)
    }

    fn refused(&self, source: ObjectError) -> OpenStoreError {
        OpenStoreError::Refused { url: self.to_string(), source }
    }
}

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    /// The directory of a file store cannot be made or entered.
    #[error("cannot use the directory {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The credentials cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The settings do not fit together, or something that a cloud needs is missing.
    #[error("cannot open {url}: {source}")]
    Refused {
        /// The store.
        url: String,
        /// What is wrong.
        source: ObjectError,
    },
    /// A directory was taken for a cloud.
    #[error("{url} is not in a cloud")]
    NotACloud {
        /// The store.
        url: String,
    },
}

fn client_defaults() -> [(ClientConfigKey, String); 3] {
    [
        (ClientConfigKey::Timeout, format!("{} seconds", REQUEST_TIMEOUT.as_secs())),
        (ClientConfigKey::ConnectTimeout, format!("{} seconds", CONNECT_TIMEOUT.as_secs())),
        (ClientConfigKey::PoolMaxIdlePerHost, IDLE_CONNECTIONS.to_string()),
    ]
}

fn retries() -> RetryConfig {
    let backoff = BackoffConfig { init_backoff: BACKOFF_FIRST, max_backoff: BACKOFF_MAX, base: 2.0 };
    RetryConfig { backoff, max_retries: RETRIES, retry_timeout: RETRY_TIMEOUT }
}

/// A store that is opened anew when its credentials file changes.
struct Reopening {
    url: StoreUrl,
    current: Mutex<(Option<Stamp>, Arc<dyn ObjectStore>)>,
}

impl Reopening {
    /// The stamp is left out: the file may have changed since `store` was opened, so the first request looks.
    fn new(url: StoreUrl, store: Arc<dyn ObjectStore>) -> Reopening {
        Reopening { url, current: Mutex::new((None, store)) }
    }

    fn current(&self) -> Arc<dyn ObjectStore> {
        let stamp = self.url.credentials.stamp();
        let mut current = self.current.lock();
        if stamp.is_some() && stamp != current.0 {
            // Whatever comes of it, a file that does not change is not read twice.
            current.0 = stamp;
            match self.url.connect() {
                Ok(store) => current.1 = store,
                Err(error) => {
                    tracing::warn!(url = %self.url, %error, "the new credentials cannot be used; the old ones stay");
                }
            }
        }
        Arc::clone(&current.1)
    }
}

impl fmt::Display for Reopening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.url.fmt(f)
    }
}

impl fmt::Debug for Reopening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reopening({})", self.url)
    }
}

impl StoreLayer for Reopening {
    fn below(&self) -> Arc<dyn ObjectStore> {
        self.current()
    }
}

/// What the names of the settings have in them that are, or lead to, credentials; region and endpoint do not.
const CREDENTIAL_WORDS: [&str; 8] =
    ["key", "secret", "token", "credential", "service_account", "identity", "skip_signature", "use_"];

const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the retries of one request may go on; a file system's request waits 60 s at most.
const RETRY_TIMEOUT: Duration = Duration::from_secs(20);
const RETRIES: usize = 4;
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// As many as packs are put or read at once.
const IDLE_CONNECTIONS: usize = 64;
