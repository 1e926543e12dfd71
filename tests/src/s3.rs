//! An S3 endpoint over HTTP on this machine, that does what it is told, or something else when it is told so.
//!
//! Objects are plain files below a directory, so that a test can look at them and change them behind the endpoint's back.
//!
//! Invariants:
//! - One request with a condition is served at a time: of two creators of one name exactly one wins, as in the real S3.
//! - A misdeed is counted when it is done: a test that meant to meet one can see that it did.
//! - The endpoint ends when its handle is dropped; it outlives every process under test.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hyper::{Method, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use parking_lot::Mutex;
use s3s::{Body, auth::SimpleAuth, service::S3Service, service::S3ServiceBuilder};
use tokio::{net::TcpListener, runtime::Runtime};

use crate::wait::{PATIENCE, pause_task, until};

/// What an endpoint does in place of what it should.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Misdeed {
    /// Answers 503.
    Fail,
    /// Hangs up without having done anything.
    HangUp,
    /// Does it, and hangs up before it says so.
    LoseAnswer,
    /// Waits first.
    Delay(Duration),
    /// Waits until it is told to behave, and does it then.
    Hold,
    /// Changes one byte in the middle of what is read.
    ChangeByte,
    /// Reads and writes as if there were no condition: a second creator of a name replaces the first one's object.
    IgnoreCondition,
    /// Says that it is done, and has done nothing.
    Pretend,
}

/// Which requests, and what becomes of them.
#[derive(Clone, Debug)]
struct Rule {
    method: Option<Method>,
    /// What their path has in it.
    part: String,
    misdeed: Misdeed,
}

/// A running endpoint.
pub struct S3Endpoint {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Dropped last, with everything that runs on it.
    _runtime: Runtime,
}

struct Shared {
    root: PathBuf,
    service: S3Service,
    rule: Mutex<Option<Rule>>,
    misdeeds: AtomicU64,
    requests: AtomicU64,
    conditional: tokio::sync::Mutex<()>,
}

impl S3Endpoint {
    /// Begins to serve the buckets in `root`, each a directory.
    ///
    /// # Panics
    /// If the system has no port or no thread for it.
    pub fn start(root: &Path, buckets: &[&str]) -> S3Endpoint {
        for bucket in buckets {
            fs::create_dir_all(root.join(bucket)).expect("a directory for the bucket");
        }
        let credentials = format!("AWS_ACCESS_KEY_ID={KEY}\nAWS_SECRET_ACCESS_KEY={SECRET}\n");
        fs::write(root.join(CREDENTIALS), credentials).expect("a file for the credentials");
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).expect("a directory to serve"));
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            service: builder.build(),
            rule: Mutex::default(),
            misdeeds: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            conditional: tokio::sync::Mutex::default(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("threads for the endpoint");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("the port's number");
        runtime.spawn(serve(listener, Arc::clone(&shared)));
        S3Endpoint { address, shared, _runtime: runtime }
    }

    /// The URL of `prefix` in `bucket`, in the failure domain `domain`, for commands of the program.
    pub fn url(&self, bucket: &str, prefix: &str, domain: &str) -> String {
        let credentials = self.shared.root.join(CREDENTIALS);
        let endpoint = self.address;
        format!(
            "s3://{bucket}/{prefix}?endpoint=http://{endpoint}&domain={domain}&credentials=file:{}",
            credentials.display()
        )
    }

    /// Where the objects of `bucket` are.
    pub fn bucket(&self, bucket: &str) -> PathBuf {
        self.shared.root.join(bucket)
    }

    /// From now on, requests of this kind whose path has `part` in it are treated so.
    pub fn misbehave(&self, method: Option<&str>, part: &str, misdeed: Misdeed) {
        let method = method.map(|name| name.parse().expect("a method"));
        *self.shared.rule.lock() = Some(Rule { method, part: part.to_owned(), misdeed });
        self.shared.misdeeds.store(0, Ordering::SeqCst);
    }

    /// From now on everything is as it should be.
    pub fn behave(&self) {
        *self.shared.rule.lock() = None;
    }

    /// Misdeeds since it was last told to misbehave.
    pub fn misdeeds(&self) -> u64 {
        self.shared.misdeeds.load(Ordering::SeqCst)
    }

    /// Requests since it was started.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::SeqCst)
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move { shared.answer(request).await }
            });
            let builder = Builder::new(TokioExecutor::new());
            // A client that hangs up, or is killed, is nothing to complain about.
            let _ended = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

impl Shared {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, HungUp> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let misdeed = self.misdeed(&request);
        let writes = request.method() != Method::GET && request.method() != Method::HEAD;
        match &misdeed {
            Some(Misdeed::Fail) => return Ok(plain(StatusCode::SERVICE_UNAVAILABLE)),
            Some(Misdeed::HangUp) => return Err(HungUp),
            Some(Misdeed::Pretend) => return Ok(plain(StatusCode::OK)),
            Some(Misdeed::Delay(span)) => pause_task(*span).await,
            Some(Misdeed::Hold) => {
                until("to be told to behave", PATIENCE, || self.rule.lock().is_none()).await;
            }
            Some(Misdeed::IgnoreCondition) => self.forget(request.uri().path()),
            Some(Misdeed::LoseAnswer | Misdeed::ChangeByte) | None => {}
        }
        let conditional = writes && request.headers().contains_key("if-none-match");
        let _alone = if conditional { Some(self.conditional.lock().await) } else { None };
        let answer = hyper::service::Service::call(&self.service, request).await.map_err(|_| HungUp)?;
        match misdeed {
            Some(Misdeed::LoseAnswer) => Err(HungUp),
            Some(Misdeed::ChangeByte) => change_byte(answer).await,
            _ => Ok(answer),
        }
    }

    /// Makes an object's name free: the condition itself is signed and cannot be taken out of a request.
    fn forget(&self, path: &str) {
        match fs::remove_file(self.root.join(path.trim_start_matches('/'))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{path}: {error}"),
            _ => {}
        }
    }

    /// What is to be done to this request, counted.
    fn misdeed(&self, request: &Request<Incoming>) -> Option<Misdeed> {
        let rule = self.rule.lock().clone()?;
        let is_meant = rule.method.is_none_or(|method| request.method() == method)
            && request.uri().path().contains(&rule.part);
        // A condition can only be ignored where there is one.
        let is_meant = is_meant
            && (rule.misdeed != Misdeed::IgnoreCondition || request.headers().contains_key("if-none-match"));
        if !is_meant {
            return None;
        }
        self.misdeeds.fetch_add(1, Ordering::SeqCst);
        Some(rule.misdeed)
    }
}

fn plain(status: StatusCode) -> Response<Body> {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = status;
    // Clients want one of every object that was written.
    answer.headers_mut().insert("etag", hyper::header::HeaderValue::from_static("\"none\""));
    answer
}

/// The same length, and another byte in the middle.
async fn change_byte(answer: Response<Body>) -> Result<Response<Body>, HungUp> {
    let (parts, mut body) = answer.into_parts();
    let bytes = body.store_all_limited(BODY_BYTES_MAX).await.map_err(|_| HungUp)?;
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 0x20;
    }
    Ok(Response::from_parts(parts, Body::from(bytes::Bytes::from(bytes))))
}

/// The connection is closed without an answer.
#[derive(Debug)]
struct HungUp;

impl std::fmt::Display for HungUp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("told to hang up")
    }
}

impl std::error::Error for HungUp {}

const KEY: &str = "murphy";
const SECRET: &str = "not-a-secret";
const CREDENTIALS: &str = "credentials";
/// A larger answer is not changed but cut off.
const BODY_BYTES_MAX: usize = 64 << 20;
