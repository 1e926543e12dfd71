//! Who a node is: an Ed25519 key, the self-signed certificate that carries it, and the checks that pin it.
//!
//! Invariants:
//! - A node is its public key; names, addresses and certificate dates prove nothing and are not looked at.
//! - A client accepts exactly the key it was told. A server accepts any Ed25519 key as an identity, and decides by the member book
//!   what that identity may do.
//! - The private key is written once, with mode 0600, and refused if others could read it.

use std::{
    fmt, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use murphy_log::{Files, NodeId, OsFiles, replace_file, replace_private_file};
use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};
use rustls::{
    DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::{
        ParsedCertificate,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

/// An Ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The key with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> PublicKey {
        PublicKey(bytes)
    }

    /// The bytes of the key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The node that has this key.
    pub fn node(&self) -> NodeId {
        let hash = blake3::derive_key(PURPOSE_NODE, &self.0);
        let mut id = [0; 16];
        id.copy_from_slice(&hash[..16]);
        NodeId::from_bytes(id)
    }

    /// Whether the owner of this key has signed `text`.
    pub(crate) fn has_signed(&self, text: &[u8], signature: &[u8; 64]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(text, signature).is_ok()
    }

    /// The key that a certificate carries; `None` if it is not an Ed25519 key.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Option<PublicKey> {
        let parsed = ParsedCertificate::try_from(certificate).ok()?;
        let info = parsed.subject_public_key_info();
        let key = info.as_ref().strip_prefix(&ED25519_KEY_INFO)?;
        Some(PublicKey(key.try_into().ok()?))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::str::FromStr for PublicKey {
    type Err = murphy_log::ParseIdError;

    fn from_str(text: &str) -> Result<PublicKey, murphy_log::ParseIdError> {
        // A hash has the same length and the same text form.
        Ok(PublicKey(*text.parse::<murphy_log::ChainHash>()?.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.node())
    }
}

/// A node's key and certificate.
pub struct Identity {
    pair: Ed25519KeyPair,
    key: PrivatePkcs8KeyDer<'static>,
    certificate: CertificateDer<'static>,
    public_key: PublicKey,
}

impl Identity {
    /// A new random identity.
    pub fn generate() -> Result<Identity, IdentityError> {
        let bad = |error: rcgen::Error| IdentityError::Generate(error.to_string());
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(bad)?;
        Identity::of_pair(&pair)
    }

    /// The identity with the Ed25519 key of this seed: the same in every run of a simulation, and a secret to nobody.
    pub fn of_seed(seed: [u8; 32]) -> Result<Identity, IdentityError> {
        let key = PrivatePkcs8KeyDer::from([&PKCS8_SEED[..], &seed].concat());
        let pair = rcgen::KeyPair::try_from(&key);
        Identity::of_pair(&pair.map_err(|error| IdentityError::Generate(error.to_string()))?)
    }

    /// Reads the identity of the node at `directory`; makes one if there is none yet.
    pub fn load_or_create(directory: &Path) -> Result<Identity, IdentityError> {
        if let Some(identity) = Identity::load_existing(directory)? {
            return Ok(identity);
        }
        let (folder, key_path, cert_path) = paths(directory);
        let identity = Identity::generate()?;
        OsFiles.create_dir(&folder).map_err(failed(&folder))?;
        // The key last: a node with a key is complete.
        replace_file(&OsFiles, &cert_path, &identity.certificate).map_err(failed(&cert_path))?;
        let key = identity.key.secret_pkcs8_der();
        replace_private_file(&OsFiles, &key_path, key).map_err(failed(&key_path))?;
        Ok(identity)
    }

    /// Reads the identity of the node at `directory`; `None` if there is none.
    pub fn load_existing(directory: &Path) -> Result<Option<Identity>, IdentityError> {
        let (_, key_path, cert_path) = paths(directory);
        match fs::read(&key_path) {
            Ok(key) => Identity::load(&key_path, key, &cert_path).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(&key_path)(error)),
        }
    }

    fn load(key_path: &Path, key: Vec<u8>, cert_path: &Path) -> Result<Identity, IdentityError> {
        let mode = fs::metadata(key_path).map_err(failed(key_path))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(IdentityError::Permissions { path: key_path.to_owned(), mode: mode & 0o777 });
        }
        let damaged = |path: &Path| IdentityError::Damaged { path: path.to_owned() };
        let key = PrivatePkcs8KeyDer::from(key);
        let pair = rcgen::KeyPair::try_from(&key).map_err(|_| damaged(key_path))?;
        let made = Identity::of_pair(&pair).map_err(|_| damaged(key_path))?;
        let certificate = CertificateDer::from(fs::read(cert_path).map_err(failed(cert_path))?);
        if PublicKey::of_certificate(&certificate) != Some(made.public_key) {
            return Err(damaged(cert_path));
        }
        Ok(Identity { certificate, ..made })
    }

    fn of_pair(pair: &rcgen::KeyPair) -> Result<Identity, IdentityError> {
        let bad = |error: rcgen::Error| IdentityError::Generate(error.to_string());
        let params = rcgen::CertificateParams::new(vec![SERVER_NAME.to_owned()]).map_err(bad)?;
        let certificate = params.self_signed(pair).map_err(bad)?.der().clone();
        let unusable = || IdentityError::Generate("the key is not an Ed25519 key".to_owned());
        let public_key = PublicKey::of_certificate(&certificate).ok_or_else(unusable)?;
        let key = PrivatePkcs8KeyDer::from(pair.serialize_der());
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_pkcs8_der());
        Ok(Identity { pair: pair.map_err(|_| unusable())?, key, certificate, public_key })
    }

    /// Signs `text`, which begins with what it is for.
    pub(crate) fn sign(&self, text: &[u8]) -> [u8; 64] {
        let signature = self.pair.sign(text);
        signature.as_ref().try_into().expect("an Ed25519 signature has 64 bytes")
    }

    /// The node.
    pub fn node(&self) -> NodeId {
        self.public_key.node()
    }

    /// Its public key.
    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// How this node accepts connections: with its key, from anybody who proves a key.
    pub(crate) fn server_config(&self) -> Result<rustls::ServerConfig, rustls::Error> {
        let provider = provider();
        let verifier = Arc::new(NodeVerifier::new(&provider, None));
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate.clone()], self.private_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    /// How this node connects: with its key, to exactly the node with the key `pinned`.
    pub(crate) fn client_config(&self, pinned: PublicKey) -> Result<rustls::ClientConfig, rustls::Error> {
        let provider = provider();
        let verifier = Arc::new(NodeVerifier::new(&provider, Some(pinned)));
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(vec![self.certificate.clone()], self.private_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }
}

/// The folder of a node's identity, its key and its certificate.
fn paths(directory: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let folder = directory.join(IDENTITY_FOLDER);
    let (key, certificate) = (folder.join(KEY_FILE), folder.join(CERTIFICATE_FILE));
    (folder, key, certificate)
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.node())
    }
}

/// Accepts certificates by the key in them: one key, or every Ed25519 key, where that key then decides what the node may do.
#[derive(Debug)]
struct NodeVerifier {
    pinned: Option<PublicKey>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl NodeVerifier {
    fn new(provider: &CryptoProvider, pinned: Option<PublicKey>) -> NodeVerifier {
        NodeVerifier { pinned, algorithms: provider.signature_verification_algorithms }
    }

    fn accept(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let key = PublicKey::of_certificate(certificate);
        if key.is_some() && (self.pinned.is_none() || self.pinned == key) {
            return Ok(());
        }
        Err(rustls::CertificateError::ApplicationVerificationFailure.into())
    }
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.accept(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Signed {
        Err(rustls::PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Signed {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// A client proves its key as a server does.
impl ClientCertVerifier for NodeVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.accept(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Signed {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Signed {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

/// Whether a signature is that of the key in a certificate.
type Signed = Result<HandshakeSignatureValid, rustls::Error>;

/// Why a node has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No key could be made.
    #[error("cannot make a node key: {0}")]
    Generate(String),
    /// A file cannot be read or written.
    #[error("{path}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A file is not what was written there.
    #[error("{path} is damaged or does not belong to this node", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Others than the owner can read the key.
    #[error("{path} has mode {mode:o}, the key of a node must have 600", path = path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

fn failed(path: &Path) -> impl Fn(io::Error) -> IdentityError + '_ {
    |error| IdentityError::Io { path: path.to_owned(), error }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Every node answers to this name; who it is, its key says.
pub(crate) const SERVER_NAME: &str = "node.murphy.internal";
const ALPN: &[u8] = b"murphy/0";
const IDENTITY_FOLDER: &str = "identity";
const KEY_FILE: &str = "key.der";
const CERTIFICATE_FILE: &str = "cert.der";
/// What stands before the seed of an Ed25519 key in its PKCS#8 form (RFC 8410).
const PKCS8_SEED: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
const PURPOSE_NODE: &str = "murphy 2026 node id v0";
/// What comes before the 32 bytes of a key in the DER of a subject public key info (RFC 8410).
const ED25519_KEY_INFO: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_the_same_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(directory.path()).unwrap();
        let second = Identity::load_or_create(directory.path()).unwrap();
        assert_eq!(first.public_key(), second.public_key());
        assert_eq!(first.certificate, second.certificate);
        let other = Identity::generate().unwrap();
        assert_ne!(first.node(), other.node());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        Identity::load_or_create(directory.path()).unwrap();
        let key = directory.path().join("identity/key.der");
        let mode = fs::metadata(&key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = Identity::load_or_create(directory.path()).unwrap_err();
        assert!(matches!(refused, IdentityError::Permissions { mode: 0o640, .. }), "{refused}");
    }

    /// A node that silently got a new key would be locked out of every volume it belongs to.
    #[test]
    fn a_damaged_identity_is_refused_and_not_replaced() {
        for name in ["key.der", "cert.der"] {
            let directory = tempfile::tempdir().unwrap();
            Identity::load_or_create(directory.path()).unwrap();
            let path = directory.path().join("identity").join(name);
            let mut bytes = fs::read(&path).unwrap();
            bytes.truncate(bytes.len() / 2);
            fs::write(&path, bytes).unwrap();
            let refused = Identity::load_or_create(directory.path()).unwrap_err();
            assert!(matches!(refused, IdentityError::Damaged { .. }), "{refused}");
        }
    }

    #[test]
    fn a_key_that_cannot_be_read_is_named_and_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let key = directory.path().join("identity/key.der");
        fs::create_dir_all(&key).unwrap();
        let refused = Identity::load_or_create(directory.path()).unwrap_err();
        assert!(refused.to_string().contains("identity/key.der"), "{refused}");
        assert!(key.is_dir() && !directory.path().join("identity/cert.der").exists());
    }

    /// A simulation is repeated from its seed only if its nodes are the same.
    #[test]
    fn one_seed_is_one_identity_and_a_key_is_the_same_after_text() {
        let of = |byte| Identity::of_seed([byte; 32]).unwrap().public_key();
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        assert_eq!(of(1).to_string().parse::<PublicKey>().unwrap(), of(1));
        assert!("zz".parse::<PublicKey>().is_err());
    }
}
