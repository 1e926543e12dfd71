//! What a store URL must say, must refuse to say, and what opening it must do.

use std::fs;

use object_store::{ObjectStoreExt, memory::InMemory};
use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> StoreUrl {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refused(text: &str) -> ParseStoreUrlError {
    text.parse::<StoreUrl>().expect_err(text)
}

fn install_tls() {
    // The second test of a process finds it installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[test]
fn a_url_prints_as_it_was_written() {
    for text in [
        "file:///srv/blocks",
        "file:///srv/with%20space%23",
        "file:///srv/blocks?domain=rack-7",
        "s3://bucket",
        "s3://Bucket.with-all_of.it/a/b%20c/100%25",
        "s3://bucket/p?region=eu-central-1&endpoint=https%3A%2F%2Fs3.example.org%3A9000&domain=x&credentials=env%3AB_",
        "gs://bucket/prefix?account=project-1",
        "az://container/prefix?account=acme&credentials=file%3A%2Fetc%2Fmurphy%2Fazure",
    ] {
        let shown = parse(text).to_string();
        assert_eq!(shown.trim_end_matches('/'), text);
        assert_eq!(parse(&shown), parse(text));
    }
    assert_eq!(parse("file:///srv/blocks/"), parse("file:///srv/blocks"));
    assert_eq!(parse("s3://b/p/"), parse("s3://b/p"));
    assert_eq!(parse("s3://b?endpoint=https://h/p//"), parse("s3://b?endpoint=https://h/p"));
    assert_eq!(StoreUrl::from_directory("/srv/a b".as_ref()).unwrap().to_string(), "file:///srv/a%20b");
}

proptest! {
    #[test]
    fn every_url_that_parses_survives_its_text(path in "[ -~äß]{0,20}", domain in "[!-~ ä]{1,10}") {
        for scheme in ["file:///d", "s3://bucket", "az://c"] {
            let mut url: Url = scheme.parse().unwrap();
            url.set_path(&path);
            url.query_pairs_mut().append_pair("domain", &domain);
            if let Ok(store) = url.as_str().parse::<StoreUrl>() {
                prop_assert_eq!(&parse(&store.to_string()), &store);
            }
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in ".{0,60}", tail in "[ -~]{0,40}") {
        let _ = text.parse::<StoreUrl>();
        let _ = format!("s3://b/{tail}").parse::<StoreUrl>();
        let _ = format!("file://{tail}").parse::<StoreUrl>();
    }
}

/// A secret in a URL ends up in settings, process lists, logs and screenshots.
#[test]
fn a_secret_in_a_url_is_refused_and_not_repeated() {
    for text in [
        "s3://AKIA:hunter2@bucket/prefix",
        "s3://hunter2@bucket/prefix",
        "s3://bucket?access_key=hunter2",
        "s3://bucket?AWS_SECRET_ACCESS_KEY=hunter2",
        "s3://bucket?session_token=hunter2",
        "az://bucket?sas_token=hunter2",
        "gs://bucket?service_account_key=hunter2",
        "s3://bucket?password=hunter2",
        "s3://bucket?endpoint=https://me:hunter2@example.org",
        "file:///dir?secret=hunter2",
    ] {
        let error = refused(text);
        assert!(matches!(error, ParseStoreUrlError::Secret { .. }), "{text}: {error}");
        let said = format!("{error} {error:?}");
        assert!(!said.contains("hunter2") && said.contains("credentials=file:PATH"), "{said}");
    }
    // Nor the value of an option that was meant to say where the secret is.
    let error = refused("s3://bucket?credentials=hunter2");
    assert!(!format!("{error} {error:?}").contains("hunter2"));
}

#[test]
fn what_is_misspelt_is_refused_by_name() {
    assert_eq!(refused("s3://b?regoin=x"), ParseStoreUrlError::UnknownOption { option: "regoin".to_owned() });
    assert_eq!(
        refused("s3://b?domain=x&domain=y"),
        ParseStoreUrlError::Twice { option: "domain".to_owned() }
    );
    assert_eq!(
        refused("file:///d?region=x"),
        ParseStoreUrlError::NotForFiles { option: "region".to_owned() }
    );
    assert_eq!(refused("ftp://b/p"), ParseStoreUrlError::Scheme { scheme: "ftp".to_owned() });
    assert_eq!(refused("file://d/e"), ParseStoreUrlError::RelativeFile);
    assert_eq!(refused("s3://b/p#x"), ParseStoreUrlError::Fragment);
    for text in ["s3://", "s3:///p", "s3://b:80/p", "s3://b%20c/p"] {
        assert_eq!(refused(text), ParseStoreUrlError::Bucket { scheme: "s3" }, "{text}");
    }
    assert_eq!(refused("s3://b//p"), ParseStoreUrlError::Prefix);
    for text in
        ["s3://b?allow_http=yes", "s3://b?domain=", "s3://b?credentials=file:rel", "s3://b?endpoint=ftp://x"]
    {
        assert!(matches!(refused(text), ParseStoreUrlError::Value { .. }), "{text}");
    }
    assert!(matches!(refused("/srv/blocks"), ParseStoreUrlError::Url(_)));
}

#[test]
fn an_endpoint_without_tls_on_another_machine_must_be_meant() {
    assert_eq!(refused("s3://b?endpoint=http://10.0.0.1:9000"), ParseStoreUrlError::PlainHttp);
    parse("s3://b?endpoint=http://10.0.0.1:9000&allow_http=true");
    for local in
        ["http://127.0.0.1:9000", "http://localhost:9000", "http://[::1]:9000", "https://example.org"]
    {
        parse(&format!("s3://b?endpoint={local}"));
    }
}

/// Counting one domain as two would call a copy safe that dies with the original.
#[test]
fn what_dies_together_is_one_failure_domain_unless_the_url_says_otherwise() {
    let domain = |text: &str| parse(text).failure_domain();
    for (a, b) in [
        ("file:///a", "file:///b"),
        ("s3://a", "s3://b/p?region=us-west-2"),
        ("s3://a?credentials=env:A_", "s3://a?credentials=env:B_"),
        ("s3://a?endpoint=https://x", "s3://b?endpoint=https://X:443/"),
        ("file:///a?domain=x", "s3://b?domain=x"),
    ] {
        assert_eq!(domain(a), domain(b), "{a} {b}");
    }
    for (a, b) in [
        ("file:///a", "s3://a"),
        ("s3://a", "gs://a"),
        ("s3://a", "s3://a?endpoint=https://x"),
        ("s3://a?account=1", "s3://a?account=2"),
        ("file:///a", "file:///a?domain=x"),
    ] {
        assert_ne!(domain(a), domain(b), "{a} {b}");
    }
}

#[tokio::test]
async fn a_file_store_is_there_again_when_it_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let url = StoreUrl::from_directory(&folder.path().join("not/yet there")).unwrap();
    assert!(url.is_file());
    let opened = url.open().unwrap();
    probe_put_if_absent(opened.store.as_ref(), &opened.prefix).await.unwrap();
    let path = opened.prefix.clone().join("a").join("b");
    opened.store.put(&path, "kept".into()).await.unwrap();
    drop(opened);
    let again = parse(&url.to_string()).open().unwrap();
    assert_eq!(again.store.get(&path).await.unwrap().bytes().await.unwrap(), "kept");
    assert_eq!(fs::read(url.directory().unwrap().join("a/b")).unwrap(), b"kept");
    let leftovers: Vec<_> = fs::read_dir(url.directory().unwrap().join(PROBE_FOLDER)).unwrap().collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

#[test]
fn a_file_store_whose_directory_cannot_be_made_says_so() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let error = StoreUrl::from_directory(&folder.path().join("file/below")).unwrap().open().unwrap_err();
    assert!(matches!(error, OpenStoreError::Directory { .. }), "{error}");
}

#[test]
fn every_cloud_opens_with_credentials_from_a_file() {
    install_tls();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let s3 = write("s3", "AWS_ACCESS_KEY_ID=id\nAWS_SECRET_ACCESS_KEY=hunter2\n");
    let gs = write("gs", "GOOGLE_SKIP_SIGNATURE=true\n");
    let az = write("az", "AZURE_STORAGE_ACCOUNT_KEY=aHVudGVyMg==\n");
    for text in [
        format!("s3://b/p/q?region=eu-west-1&credentials=file:{s3}"),
        format!("s3://b/p/q?endpoint=http://127.0.0.1:1&credentials=file:{s3}"),
        format!("gs://b/p/q?credentials=file:{gs}"),
        format!("az://b/p/q?account=acme&credentials=file:{az}"),
    ] {
        let opened = parse(&text).open().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(opened.prefix.as_ref(), "p/q");
        let shown = format!("{opened:?} {}", opened.store);
        assert!(!shown.contains("hunter2") && !shown.contains("aHVudGVyMg"), "{shown}");
    }
}

/// Else the client would quietly go on with whatever credentials the machine has, into somebody's other account.
#[test]
fn credentials_that_were_named_and_are_not_there_are_an_error() {
    install_tls();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s3");
    let open =
        || parse(&format!("s3://b?credentials=file:{}", path.display())).open().unwrap_err().to_string();
    assert!(open().starts_with("cannot read the credentials in /"), "{}", open());
    fs::write(&path, "OTHER=1\n").unwrap();
    assert!(open().ends_with("expected names such as AWS_ACCESS_KEY_ID"), "{}", open());
    fs::write(&path, "AWS_REGION=eu-west-1\n").unwrap();
    assert!(open().ends_with("expected names such as AWS_ACCESS_KEY_ID"), "{}", open());
    fs::write(&path, "A".repeat(1 << 20)).unwrap();
    assert!(open().ends_with("is too large to be a file of credentials"), "{}", open());
    let error = parse("s3://b?credentials=env:MURPHY_TEST_NOT_SET_").open().unwrap_err().to_string();
    assert!(error.contains("MURPHY_TEST_NOT_SET_") && error.contains("AWS_ACCESS_KEY_ID"), "{error}");
}

/// A store that answers every request with what credentials came with it.
async fn credentials_echo() -> (u16, tokio::task::JoinHandle<()>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 8192];
            let read = stream.read(&mut request).await.unwrap_or_default();
            let request = String::from_utf8_lossy(&request[..read]).into_owned();
            let id =
                request.split("Credential=").nth(1).and_then(|rest| rest.split('/').next()).unwrap_or("none");
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\nlast-modified: Sat, 21 Nov 2026 10:00:00 GMT\r\netag: x";
            let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{id}", id.len());
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    };
    (port, tokio::spawn(serve))
}

#[tokio::test]
async fn credentials_in_a_file_are_read_again_when_it_changes() {
    install_tls();
    let (port, server) = credentials_echo().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s3");
    let write =
        |id: &str| fs::write(&path, format!("AWS_ACCESS_KEY_ID={id}\nAWS_SECRET_ACCESS_KEY=x\n")).unwrap();
    write("first");
    let text = format!("s3://b?endpoint=http://127.0.0.1:{port}&credentials=file:{}", path.display());
    let opened = parse(&text).open().unwrap();
    let ask = async || opened.store.get(&Path::from("x")).await.unwrap().bytes().await.unwrap();
    assert_eq!(ask().await, "first");
    write("second-one");
    assert_eq!(ask().await, "second-one");
    fs::write(&path, "half a li").unwrap();
    assert_eq!(ask().await, "second-one");
    fs::remove_file(&path).unwrap();
    assert_eq!(ask().await, "second-one");
    server.abort();
}

#[tokio::test]
async fn a_store_that_overwrites_fails_the_probe() {
    let honest = InMemory::new();
    probe_put_if_absent(&honest, &Path::from("p")).await.unwrap();
    let objects = crate::data::store::overwriting();
    let error = probe_put_if_absent(objects.as_ref(), &Path::from("p")).await.unwrap_err();
    assert!(matches!(error, ProbeError::NotHonoured { .. }), "{error}");
    assert_eq!(objects.list_with_delimiter(Some(&Path::from("p/probe"))).await.unwrap().objects.len(), 0);
}

/// The fear: a store that is accepted once is refused at the next start, because its URL is longer as it prints.
#[test]
fn an_endpoint_that_is_too_long_with_its_escapes_is_refused_at_once() {
    let url = |count: usize| format!("s3://a/b?endpoint=https://h/{}", "\u{e9}".repeat(count));
    // Two bytes each as they are written, six as they print.
    let longest = (1024 - "https://h/".len()) / 6;
    let store: StoreUrl = url(longest).parse().unwrap();
    assert_eq!(store.to_string().parse::<StoreUrl>().unwrap(), store);
    let refused = url(longest + 1).parse::<StoreUrl>().unwrap_err();
    assert!(
        matches!(&refused, ParseStoreUrlError::Value { option, .. } if option == "endpoint"),
        "{refused}"
    );
}

/// The fear: one directory is taken for two copies, or what is written into a store comes back to it through another one.
#[test]
fn a_place_that_lies_in_another_one_is_found_whatever_it_is_called() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    fs::create_dir(path("there")).unwrap();
    std::os::unix::fs::symlink("there", path("link")).unwrap();
    let file = |name: &str| parse(&format!("file://{}", path(name).display()));
    for (a, b) in [
        (file("there"), parse(&format!("file://{}?domain=x", path("there").display()))),
        (file("there"), file("link")),
        (file("there/not/yet"), file("link")),
        (file("link/not"), file("there/not/yet")),
        (parse("s3://a/p"), parse("s3://a/p?domain=x&region=us-west-2")),
        (parse("s3://a"), parse("s3://a/p/q")),
    ] {
        assert!(a.overlaps(&b) && b.overlaps(&a), "{a} {b}");
    }
    for (a, b) in [
        (file("there"), file("other")),
        (file("there/a"), file("link/b")),
        (file("there"), file("there2")),
        (parse("s3://a/p"), parse("s3://a/pq")),
        (parse("s3://a/p"), parse("gs://a/p")),
        (parse("s3://a/p"), parse("s3://a/p?endpoint=https://x")),
        (file("there"), parse("s3://a")),
    ] {
        assert!(!a.overlaps(&b) && !b.overlaps(&a), "{a} {b}");
    }
    assert!(file("there/a").lies_in(&path("link")) && !file("there2").lies_in(&path("there")));
    assert!(!parse("s3://a").lies_in(&path("there")));
}
