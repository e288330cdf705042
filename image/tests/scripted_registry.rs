//! A registry that does what a script says: cuts, lies, redirects, demands tokens. Plain HTTP on
//! loopback.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "what cannot be set up fails the test; skips are said aloud"
)]

mod support;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_image::registry::TransportLimits;
use berth_image::{Credentials, Digest, PullError, Reference, Secret, Store, StoreOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use support::*;

#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

#[derive(Default)]
struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Close the connection after so many bytes of the body.
    cut: Option<usize>,
    /// After that, keep the connection for so long first.
    hold: Duration,
    /// Say another length than the body has.
    length: Option<usize>,
    /// One byte each.
    trickle: Option<Duration>,
    /// Before anything is said.
    delay: Duration,
}

impl Reply {
    fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    fn ok(body: &[u8]) -> Self {
        Self { status: 200, body: body.to_vec(), ..Self::default() }
    }

    fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

type Script = dyn Fn(&Request, usize) -> Option<Reply> + Send + Sync;

/// The script is asked first; what it leaves is answered as an honest registry would. The number
/// counts requests of the same path.
struct Scripted {
    address: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Scripted {
    async fn start(
        image: &Built,
        script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (image, script, shared): (_, Arc<Script>, _) =
            (Arc::new(image.clone()), Arc::new(script), Arc::clone(&log));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (image, script, log) = (Arc::clone(&image), Arc::clone(&script), Arc::clone(&shared));
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        match stream.read_u8().await {
                            Ok(byte) => head.push(byte),
                            Err(_) => return,
                        }
                    }
                    let head = String::from_utf8(head).unwrap();
                    let mut lines = head.lines();
                    let mut first = lines.next().unwrap().split(' ');
                    let request = Request {
                        method: first.next().unwrap().to_owned(),
                        path: first.next().unwrap().to_owned(),
                        headers: lines
                            .filter_map(|line| line.split_once(": "))
                            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
                            .collect(),
                    };
                    let nth = {
                        let mut log = log.lock().unwrap();
                        let nth =
                            log.iter().filter(|earlier: &&Request| earlier.path == request.path).count();
                        log.push(request.clone());
                        nth
                    };
                    let reply = script(&request, nth).unwrap_or_else(|| honest(&image, &request));
                    tokio::time::sleep(reply.delay).await;
                    let mut answer = format!(
                        "HTTP/1.1 {} x\r\nConnection: close\r\nContent-Length: {}\r\n",
                        reply.status,
                        reply.length.unwrap_or(reply.body.len())
                    );
                    for (name, value) in &reply.headers {
                        answer += &format!("{name}: {value}\r\n");
                    }
                    answer += "\r\n";
                    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
                    let _ = stream.write_all(answer.as_bytes()).await;
                    match reply.trickle {
                        None => drop(stream.write_all(body).await),
                        Some(pause) => {
                            for byte in body {
                                if stream.write_all(&[*byte]).await.is_err() {
                                    return;
                                }
                                tokio::time::sleep(pause).await;
                            }
                        }
                    }
                    tokio::time::sleep(reply.hold).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { address, log }
    }

    fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    fn reference(&self) -> Reference {
        Reference::parse(&format!("{}/app:v", self.address)).unwrap()
    }
}

fn honest(image: &Built, request: &Request) -> Reply {
    let path = request.path.split('?').next().unwrap();
    let name = path.rsplit('/').next().unwrap();
    let digest = if name == "v" { Some(image.manifest) } else { Digest::parse(name).ok() };
    let Some(bytes) = digest.and_then(|digest| image.blobs.get(&digest)) else { return Reply::status(404) };
    if path.contains("/manifests/") {
        return Reply::ok(bytes).header("Content-Type", image.manifest_type);
    }
    match request
        .header("range")
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok())
    {
        Some(from) => Reply { status: 206, ..Reply::ok(&bytes[from..]) }
            .header("Content-Range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())),
        None => Reply::ok(bytes),
    }
}

struct Run {
    dir: tempfile::TempDir,
    store: Store,
}

impl Run {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let transport = TransportLimits {
            header_timeout: Duration::from_millis(500),
            stall_window: Duration::from_millis(500),
            stall_bytes: 1000,
            backoff: Duration::from_millis(5),
            ..TransportLimits::default()
        };
        let store = Store::open(dir.path(), StoreOptions { transport, ..options() }).unwrap();
        Self { dir, store }
    }

    async fn pull(&self, registry: &Scripted, credentials: &Credentials) -> Result<Digest, PullError> {
        let pulled = self.store.pull(&registry.reference(), credentials, quiet()).await;
        let layers = std::fs::read_dir(self.dir.path().join("layers")).unwrap().count();
        if pulled.is_err() {
            assert!(self.store.list().is_empty(), "half an image is listed");
            assert_eq!(layers, 0, "bytes of a failed pull stay");
        }
        pulled.map(|image| image.id())
    }
}

fn anonymous() -> Credentials {
    Credentials::Anonymous
}

fn ann() -> Credentials {
    Credentials::Basic { username: "ann".into(), password: Secret::new("hunter2".into()) }
}

/// An image of one layer of about 300 KB that does not compress.
fn image() -> Built {
    let noise: Vec<u8> =
        (0..300_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_be_bytes()[3]).collect();
    Built::new(&[Layer::new().file("noise", &noise).tar()], Packing::Plain, Family::Oci, "scripted")
}

fn is_layer(request: &Request, image: &Built) -> bool {
    request.path.ends_with(&image.layers[0].to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_body_goes_on_where_it_ended() {
    let image = image();
    let (copy, size) = (image.clone(), image.bytes(image.layers[0]).len());
    let registry = Scripted::start(&image, move |request, nth| {
        (is_layer(request, &copy) && nth < 3).then(|| {
            let reply = honest(&copy, request);
            let cut = reply.body.len() / 3;
            Reply { cut: Some(cut), ..reply }
        })
    })
    .await;
    Run::new().pull(&registry, &anonymous()).await.unwrap();
    let ranges: Vec<usize> = registry
        .requests()
        .iter()
        .filter_map(|r| r.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
        .collect();
    assert_eq!(ranges.len(), 3);
    assert!(ranges.windows(2).all(|pair| pair[0] < pair[1]) && ranges[0] >= size / 3 - 65536, "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_that_are_ignored_or_wrong_do_not_spoil_the_layer() {
    for lie in ["whole", "shifted", "refused"] {
        let image = image();
        let copy = image.clone();
        let registry = Scripted::start(&image, move |request, nth| {
            if !is_layer(request, &copy) {
                return None;
            }
            let whole = copy.bytes(copy.layers[0]);
            if nth == 0 {
                return Some(Reply { cut: Some(100_000), ..Reply::ok(whole) });
            }
            request.header("range")?;
            Some(match lie {
                "whole" => Reply::ok(whole),
                "shifted" => Reply { status: 206, ..Reply::ok(&whole[1..]) }
                    .header("Content-Range", format!("bytes 1-{}/{}", whole.len() - 1, whole.len())),
                _ => Reply::status(416),
            })
        })
        .await;
        Run::new().pull(&registry, &anonymous()).await.unwrap_or_else(|error| panic!("{lie}: {error:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn temporary_errors_are_tried_again_and_lasting_ones_end() {
    let image = image();
    let registry =
        Scripted::start(&image, |_, nth| (nth < 2).then(|| Reply::status(if nth == 0 { 500 } else { 429 })))
            .await;
    Run::new().pull(&registry, &anonymous()).await.unwrap();
    let registry = Scripted::start(&image, |_, _| Some(Reply::status(503))).await;
    let failed = Run::new().pull(&registry, &anonymous()).await.unwrap_err();
    assert!(matches!(failed, PullError::Unreachable { .. }), "{failed:?}");
    assert_eq!(registry.requests().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_about_content_and_length_are_noticed() {
    let image = image();
    let whole = image.bytes(image.layers[0]).to_vec();
    let mut wrong = whole.clone();
    wrong[150_000] ^= 1;
    let longer = [&whole[..], b"x"].concat();
    let shorter = whole[..whole.len() - 1].to_vec();
    for (name, body, length) in [
        ("wrong byte", wrong, None),
        ("longer", longer.clone(), None),
        ("longer with the right length", longer, Some(whole.len())),
        ("shorter", shorter.clone(), None),
        ("shorter with the right length", shorter, Some(whole.len())),
        ("empty", Vec::new(), None),
    ] {
        let copy = image.clone();
        let registry = Scripted::start(&image, move |request, _| {
            is_layer(request, &copy).then(|| Reply { length, ..Reply::ok(&body) })
        })
        .await;
        let pulled = Run::new().pull(&registry, &anonymous()).await;
        match name {
            // Bytes beyond the stated length are not part of the body.
            "longer with the right length" => drop(pulled.unwrap()),
            "wrong byte" => assert!(matches!(pulled, Err(PullError::DigestMismatch { .. })), "{pulled:?}"),
            _ => assert!(pulled.is_err(), "{name}"),
        }
    }
    let registry = Scripted::start(&image, |request, _| {
        request.path.contains("/manifests/").then(|| Reply::ok(&vec![b' '; 5 << 20]))
    })
    .await;
    assert!(Run::new().pull(&registry, &anonymous()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_trickle_end_in_time() {
    let image = image();
    for trickle in [false, true] {
        let copy = image.clone();
        let registry = Scripted::start(&image, move |request, _| {
            is_layer(request, &copy).then(|| {
                let reply = honest(&copy, request);
                if trickle {
                    Reply { trickle: Some(Duration::from_millis(20)), ..reply }
                } else {
                    Reply { delay: Duration::from_secs(60), ..reply }
                }
            })
        })
        .await;
        let started = Instant::now();
        let failed = Run::new().pull(&registry, &anonymous()).await.unwrap_err();
        assert!(matches!(failed, PullError::Unreachable { .. }), "{failed:?}");
        assert!(started.elapsed() < Duration::from_secs(10), "{trickle}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_fetched_with_the_credentials_and_used_for_all() {
    let image = image();
    let registry = Scripted::start(&image, |request, _| {
        if request.path.starts_with("/token") {
            let right = request.header("authorization") == Some("Basic YW5uOmh1bnRlcjI=")
                && request.path.contains("scope=repository%3Aapp%3Apull")
                && request.path.contains("service=s");
            return Some(if right {
                Reply::ok(br#"{"token":"abc","expires_in":1e18}"#)
            } else {
                Reply::status(401)
            });
        }
        if request.header("authorization") == Some("Bearer abc") {
            return None;
        }
        let realm = format!("http://{}/token", request.header("host").unwrap());
        Some(Reply::status(401).header(
            "WWW-Authenticate",
            format!("Bearer realm=\"{realm}\",service=\"s\",scope=\"everything\""),
        ))
    })
    .await;
    Run::new().pull(&registry, &ann()).await.unwrap();
    assert_eq!(registry.requests().iter().filter(|r| r.path.starts_with("/token")).count(), 1);
    let failed = Run::new().pull(&registry, &anonymous()).await.unwrap_err();
    assert!(matches!(failed, PullError::Unauthorized { .. }), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_never_content_gets_two_answers() {
    let image = image();
    let registry = Scripted::start(&image, |_, _| {
        Some(Reply::status(401).header("WWW-Authenticate", "Basic realm=\"x\""))
    })
    .await;
    let failed = Run::new().pull(&registry, &ann()).await.unwrap_err();
    assert!(matches!(failed, PullError::Unauthorized { .. }), "{failed:?}");
    assert_eq!(registry.requests().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_token_and_a_broken_one_end_the_pull() {
    let image = image();
    for token in [vec![b'"'; 2 << 20], br#"{"token":"a\r\nX: y"}"#.to_vec(), b"{}".to_vec(), b"".to_vec()] {
        let registry = Scripted::start(&image, move |request, _| {
            if request.path.starts_with("/token") {
                return Some(Reply::ok(&token));
            }
            let realm = format!("http://{}/token", request.header("host").unwrap());
            Some(Reply::status(401).header("WWW-Authenticate", format!("Bearer realm=\"{realm}\"")))
        })
        .await;
        let failed = Run::new().pull(&registry, &ann()).await.unwrap_err();
        assert!(matches!(failed, PullError::Unauthorized { .. }), "{failed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_get_no_authorization_and_lead_to_allowed_places_only() {
    let image = image();
    // The same host by another port is another origin.
    let copy = image.clone();
    let cdn = Scripted::start(&image, move |request, _| {
        assert_eq!(request.method, "GET");
        Some(Reply::ok(copy.bytes(Digest::parse(request.path.rsplit('/').next().unwrap()).unwrap())))
    })
    .await;
    let target = cdn.address.clone();
    let registry = Scripted::start(&image, move |request, _| {
        if request.header("authorization").is_none() {
            return Some(Reply::status(401).header("WWW-Authenticate", "Basic realm=\"x\""));
        }
        request.path.contains("/blobs/").then(|| {
            let blob = request.path.rsplit('/').next().unwrap();
            Reply::status(307).header("Location", format!("http://{target}/cdn/{blob}"))
        })
    })
    .await;
    Run::new().pull(&registry, &ann()).await.unwrap();
    let seen = cdn.requests();
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|request| request.header("authorization").is_none()));

    for location in [
        "http://169.254.169.254/latest/meta-data",
        "http://127.0.0.2:1/x",
        "https://169.254.169.254/",
        "https://[64:ff9b::a9fe:a9fe]/",
        "https://[::a9fe:a9fe]/",
        "https://[::ffff:169.254.169.254]/",
        "file:///etc/passwd",
        "unix:///run/x.sock",
        "http://user:pw@127.0.0.1/",
        "/v2/again",
        "",
    ] {
        let registry = Scripted::start(&image, move |request, _| {
            (request.path.contains("/blobs/") || request.path.contains("again"))
                .then(|| Reply::status(302).header("Location", location))
        })
        .await;
        let failed = Run::new().pull(&registry, &anonymous()).await.unwrap_err();
        assert!(matches!(failed, PullError::Registry { .. }), "{location}: {failed:?}");
        assert!(registry.requests().len() < 10, "{location}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_do_not_go_to_a_foreign_token_service_and_show_up_nowhere() {
    let image = image();
    for realm in [
        "https://evil.example/token",
        "http://127.0.0.2:9/token",
        "https://169.254.169.254/token",
        "not a url",
    ] {
        let registry = Scripted::start(&image, move |_, _| {
            Some(Reply::status(401).header("WWW-Authenticate", format!("Bearer realm=\"{realm}\"")))
        })
        .await;
        let failed = Run::new().pull(&registry, &ann()).await.unwrap_err();
        assert!(matches!(failed, PullError::Unauthorized { .. }), "{realm}: {failed:?}");
        let mut text = format!("{failed:?}");
        let mut cause: Option<&dyn std::error::Error> = Some(&failed);
        while let Some(error) = cause {
            text += &error.to_string();
            cause = error.source();
        }
        assert!(!text.contains("hunter2") && !text.contains("YW5u"), "{text}");
    }
}

/// A store that asks these hosts for `registry.test`, in this order; the last is the registry
/// itself.
fn with_hosts(dir: &std::path::Path, hosts: &[&Scripted]) -> (Store, Reference) {
    let config = dir.join("certs.d/registry.test");
    std::fs::create_dir_all(&config).unwrap();
    let (server, mirrors) = hosts.split_last().unwrap();
    let mut text = format!("server = \"http://{}\"\n", server.address);
    for mirror in mirrors {
        text += &format!("[host.\"http://{}\"]\n", mirror.address);
    }
    std::fs::write(config.join("hosts.toml"), text).unwrap();
    let options = StoreOptions { registry_config_path: Some(dir.join("certs.d")), ..options() };
    (Store::open(&dir.join("store"), options).unwrap(), Reference::parse("registry.test/app:v").unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_with_damaged_content_is_passed_over() {
    let image = image();
    for damaged in ["layer", "configuration"] {
        for fault in ["bit", "longer", "shorter", "junk"] {
            let copy = image.clone();
            let mirror = Scripted::start(&image, move |request, _| {
                let digest = if damaged == "layer" { copy.layers[0] } else { copy.config };
                if !request.path.split('?').next().unwrap().ends_with(&digest.to_string()) {
                    return None;
                }
                let mut bytes = copy.bytes(digest).to_vec();
                let middle = bytes.len() / 2;
                match fault {
                    "bit" => bytes[middle] ^= 1,
                    "longer" => bytes.push(0),
                    "shorter" => drop(bytes.pop()),
                    _ => bytes.fill(0xff),
                }
                Some(Reply::ok(&bytes))
            })
            .await;
            let server = Scripted::start(&image, |_, _| None).await;
            let dir = tempfile::tempdir().unwrap();
            let (store, reference) = with_hosts(dir.path(), &[&mirror, &server]);
            let pulled = store.pull(&reference, &anonymous(), quiet()).await;
            assert_eq!(
                pulled.unwrap_or_else(|error| panic!("{damaged} {fault}: {error:?}")).id(),
                image.config
            );
            // Only what was damaged was asked of the registry itself.
            let asked: Vec<String> = server.requests().into_iter().map(|request| request.path).collect();
            assert_eq!(asked.len(), 1, "{damaged} {fault}: {asked:?}");
        }
    }
    // What a tag means has no digest; but no manifest is no answer.
    let mirror = Scripted::start(&image, |request, _| {
        request.path.contains("/manifests/").then(|| Reply::ok(b"<html>").header("Content-Type", "text/html"))
    })
    .await;
    let server = Scripted::start(&image, |_, _| None).await;
    let dir = tempfile::tempdir().unwrap();
    let (store, reference) = with_hosts(dir.path(), &[&mirror, &server]);
    assert_eq!(store.pull(&reference, &anonymous(), quiet()).await.unwrap().id(), image.config);

    // If all have the same damage, the pull ends, and each was asked once.
    let copy = image.clone();
    let mut wrong = image.bytes(image.layers[0]).to_vec();
    wrong[150_000] ^= 1;
    let script = move |request: &Request, _| {
        request.path.contains(&copy.layers[0].to_string()).then(|| Reply::ok(&wrong))
    };
    let (mirror, server) =
        (Scripted::start(&image, script.clone()).await, Scripted::start(&image, script).await);
    let dir = tempfile::tempdir().unwrap();
    let (store, reference) = with_hosts(dir.path(), &[&mirror, &server]);
    let failed = store.pull(&reference, &anonymous(), quiet()).await.unwrap_err();
    assert!(matches!(failed, PullError::DigestMismatch { .. }), "{failed:?}");
    for host in [mirror, server] {
        let count = host
            .requests()
            .iter()
            .filter(|request| request.path.contains(&image.layers[0].to_string()))
            .count();
        assert_eq!(count, 1);
    }
}

/// An image of so many layers of noise.
fn layers(label: &str, count: usize) -> Built {
    let tars: Vec<Vec<u8>> =
        (0..count).map(|n| Layer::new().file(&format!("{label}{n}"), &[7; 100_000]).tar()).collect();
    Built::new(&tars, Packing::Plain, Family::Oci, label)
}

fn trickling(image: &Built) -> impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static {
    let copy = image.clone();
    move |request, _| {
        let is_layer = copy.layers.iter().any(|layer| request.path.ends_with(&layer.to_string()));
        is_layer.then(|| Reply { trickle: Some(Duration::from_millis(100)), ..honest(&copy, request) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_registry_holds_up_no_other_pull() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let slow_images: Vec<Built> = (0..4).map(|n| layers(&format!("slow{n}"), 3)).collect();
    let mut pulls = Vec::new();
    for image in &slow_images {
        let slow = Scripted::start(image, trickling(image)).await;
        let (store, reference) = (store.clone(), slow.reference());
        pulls
            .push(tokio::spawn(async move { store.pull(&reference, &anonymous(), quiet()).await.map(drop) }));
        // All that may run at once is under way.
        let deadline = Instant::now() + Duration::from_secs(10);
        while slow.requests().len() < 5 {
            assert!(Instant::now() < deadline, "{:?}", slow.requests());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let image = layers("fast", 5);
    let fast = Scripted::start(&image, |_, _| None).await;
    let started = Instant::now();
    store.pull(&fast.reference(), &anonymous(), quiet()).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(pulls.iter().all(|pull| !pull.is_finished()));
    for pull in pulls {
        pull.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_names_a_layer_first_and_sends_it_slowly_does_not_keep_it_from_others() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let image = layers("shared", 2);
    let slow = Scripted::start(&image, trickling(&image)).await;
    let (other, reference) = (store.clone(), slow.reference());
    let pull = tokio::spawn(async move { other.pull(&reference, &anonymous(), quiet()).await });
    while slow.requests().len() < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let fast = Scripted::start(&image, |_, _| None).await;
    let pulled =
        tokio::time::timeout(Duration::from_secs(30), store.pull(&fast.reference(), &anonymous(), quiet()))
            .await;
    assert_eq!(pulled.expect("the pull waits for a slow registry").unwrap().id(), image.config);
    assert!(!pull.is_finished());
    pull.abort();
    let _ = pull.await;
    // The layers are the store's, whole, and what the other pull had of them is gone.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let names: Vec<String> = std::fs::read_dir(dir.path().join("layers"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        if names.len() == 2 {
            assert!(names.iter().all(|name| !name.ends_with(".partial")), "{names:?}");
            break;
        }
        assert!(Instant::now() < deadline, "{names:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_none_is_told_although_its_host_stops_sending() {
    let image = image();
    let copy = image.clone();
    let registry = Scripted::start(&image, move |request, _| {
        is_layer(request, &copy).then(|| {
            let length = copy.bytes(copy.layers[0]).len();
            let hold = Duration::from_secs(600);
            Reply { cut: Some(100_000), hold, ..Reply::ok(&vec![0xff; length]) }
        })
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let started = Instant::now();
    let failed = store.pull(&registry.reference(), &anonymous(), quiet()).await.unwrap_err();
    assert!(matches!(failed, PullError::Content { .. }), "{failed:?}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_challenges_and_token_answers_are_understood() {
    let image = image();
    for (answer, more) in [
        (r#"{"token":"","access_token":"abc"}"#, ""),
        (r#"{"token":null,"access_token":"abc"}"#, r#",error=a:b"#),
        (r#"{"token":"abc","access_token":""}"#, r#",error="caf\u{e9}""#),
        (r#"{"token":"abc"}"#, r#" ,error_description=not quoted, x="open"#),
    ] {
        let registry = Scripted::start(&image, move |request, _| {
            if request.path.starts_with("/token") {
                return Some(Reply::ok(answer.as_bytes()));
            }
            if request.header("authorization") == Some("Bearer abc") {
                return None;
            }
            let realm = format!("http://{}/token", request.header("host").unwrap());
            let challenge = format!("Bearer service=\"s\",realm=\"{realm}\"{more}");
            Some(Reply::status(401).header("WWW-Authenticate", challenge))
        })
        .await;
        let pulled = Run::new().pull(&registry, &anonymous()).await;
        assert!(pulled.is_ok(), "{answer} {more}: {pulled:?}");
    }
}

/// This test is its own child: the variables of a proxy are read from the environment.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_on_this_machine_serves_registries_and_their_redirects() {
    const INSIDE: &str = "BERTH_TEST_BEHIND_A_PROXY";
    let image = image();
    if std::env::var_os(INSIDE).is_some() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("certs.d/registry.test");
        std::fs::create_dir_all(&config).unwrap();
        std::fs::write(config.join("hosts.toml"), "server = \"http://registry.invalid\"\n").unwrap();
        let options = StoreOptions { registry_config_path: Some(dir.path().join("certs.d")), ..options() };
        let store = Store::open(&dir.path().join("store"), options).unwrap();
        let reference = Reference::parse("registry.test/app:v").unwrap();
        let pulled = store.pull(&reference, &anonymous(), quiet()).await;
        assert_eq!(pulled.unwrap().id(), image.config);
        return;
    }
    let copy = image.clone();
    let proxy = Scripted::start(&image, move |request, _| {
        let path = request.path.split('?').next().unwrap();
        let path = path.strip_prefix("http://registry.invalid").expect("a request for the registry");
        if path.starts_with("/v2/") && path.contains("/blobs/") {
            let blob = path.rsplit('/').next().unwrap();
            // The same host on another port: the only plain HTTP that is followed.
            return Some(
                Reply::status(307).header("Location", format!("http://registry.invalid:8080/cdn/{blob}")),
            );
        }
        path.starts_with(":8080/").then(|| {
            let digest = Digest::parse(path.rsplit('/').next().unwrap()).unwrap();
            Reply::ok(copy.bytes(digest))
        })
    })
    .await;
    let port = proxy.address.rsplit(':').next().unwrap();
    for address in ["localhost", "127.0.0.1"] {
        let before = proxy.requests().len();
        let output = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_proxy_on_this_machine_serves_registries_and_their_redirects"])
            .env(INSIDE, "1")
            .env("http_proxy", format!("http://{address}:{port}"))
            .env_remove("no_proxy")
            .env_remove("NO_PROXY")
            .output()
            .await
            .unwrap();
        assert!(output.status.success(), "{address}: {}", String::from_utf8_lossy(&output.stdout));
        assert_eq!(proxy.requests().len() - before, 5, "{address}");
    }
}
