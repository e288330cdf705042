//! Pulls from a real registry (Debian's `docker-registry`) on loopback. Needs root.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use berth_image::{Credentials, Digest, PullError, Reference, StoreOptions};

use support::*;

/// Starts the registry, or says why the test does not run.
macro_rules! registry_or_skip {
    () => {
        match Registry::start() {
            Some(registry) => registry,
            None => {
                skip_without("docker-registry");
                return;
            }
        }
    };
}

fn reference(registry: &Registry, rest: &str) -> Reference {
    Reference::parse(&format!("{}/{rest}", registry.address)).unwrap()
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        Layer::new().dir("d", 0o711).file("d/one", b"one").file("two", &[7; 200_000]).tar(),
        Layer::new().file("d/three", b"three").file(".wh.two", b"").tar(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_packing_and_family_gives_the_same_tree() {
    let registry = registry_or_skip!();
    let mut trees = BTreeSet::new();
    for (packing, family) in [
        (Packing::Gzip, Family::Oci),
        (Packing::Zstd, Family::Oci),
        (Packing::Plain, Family::Oci),
        (Packing::Gzip, Family::Docker),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let image = Built::new(&layers(), packing, family, "same");
        registry.push("a/b", "v1", &image);
        let store = store(dir.path());
        let reference = reference(&registry, "a/b:v1");
        let pulled = store.pull(&reference, &Credentials::Anonymous, quiet()).await.unwrap();
        assert_eq!(pulled.id(), image.config);
        assert_eq!(pulled.raw_config(), image.bytes(image.config));
        assert_eq!(pulled.raw_manifest(), image.bytes(image.manifest));
        assert_eq!(pulled.repo_tags(), [reference.to_string()]);
        assert_eq!(pulled.repo_digests(), [format!("{}/a/b@{}", registry.address, image.manifest)]);
        assert_eq!((pulled.user(), pulled.config().stop_signal.as_str()), ("1000:5", "SIGINT"));
        assert_eq!(pulled.config().volumes, ["/v"]);
        assert!(pulled.size_bytes() > 200_000);
        trees.insert(describe_overlay(&directories(store.stored_layers(&pulled)).unwrap(), dir.path()));
    }
    assert_eq!(trees.len(), 1, "{trees:#?}");
    let tree = trees.first().unwrap();
    assert!(tree.contains("|d|d|711|") && tree.contains("|d/three|") && !tree.contains("|two|"), "{tree}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_leads_to_this_machines_image_and_gives_its_own_digest() {
    let registry = registry_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let image = Built::simple("amd64");
    let other = Built::simple("other");
    registry.push("multi", "other", &other);
    registry.push("multi", "amd64", &image);
    let entry = |image: &Built, architecture: &str| {
        serde_json::json!({
            "mediaType": image.manifest_type, "digest": image.manifest.to_string(),
            "size": image.bytes(image.manifest).len(), "platform": {"os": "linux", "architecture": architecture},
        })
    };
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry(&other, "s390x"), entry(&image, "amd64")],
    })
    .to_string();
    registry.put_manifest("multi", "v1", "application/vnd.oci.image.index.v1+json", index.as_bytes());
    let store = store(dir.path());
    let pulled =
        store.pull(&reference(&registry, "multi:v1"), &Credentials::Anonymous, quiet()).await.unwrap();
    assert_eq!(pulled.id(), image.config);
    let by_digest = format!("{}/multi@{}", registry.address, Digest::of(index.as_bytes()));
    assert_eq!(pulled.repo_digests(), std::slice::from_ref(&by_digest));
    for text in [&by_digest, &pulled.id().to_string(), &pulled.id().hex(), &pulled.id().hex()[..12]] {
        assert_eq!(store.find(text).map(|found| found.id()), Some(image.config), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_images_and_silent_registries_are_told_apart() {
    let registry = registry_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let pull = async |reference: Reference| {
        store.pull(&reference, &Credentials::Anonymous, quiet()).await.unwrap_err()
    };
    assert!(matches!(pull(reference(&registry, "no/such:tag")).await, PullError::NotFound { .. }));
    let digest = format!("no/such@{}", Digest::of(b"x"));
    assert!(matches!(pull(reference(&registry, &digest)).await, PullError::NotFound { .. }));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = Reference::parse(&format!("{free}/a:b")).unwrap();
    assert!(matches!(pull(nobody).await, PullError::Unreachable { .. }));
    assert!(store.list().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_moves_with_the_registry_and_many_pulls_share_their_layers() {
    let registry = registry_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let common = Layer::new().file("common", &[1; 500_000]).tar();
    let first =
        Built::new(&[common.clone(), Layer::new().file("a", b"1").tar()], Packing::Gzip, Family::Oci, "1");
    let second = Built::new(&[common, Layer::new().file("a", b"2").tar()], Packing::Gzip, Family::Oci, "2");
    registry.push("app", "latest", &first);
    registry.push("app", "second", &second);
    let pulls = ["app", "app:second", "app", "app:second", "app"].map(|name| {
        let (store, reference) = (store.clone(), reference(&registry, name));
        tokio::spawn(
            async move { store.pull(&reference, &Credentials::Anonymous, quiet()).await.unwrap().id() },
        )
    });
    for pull in pulls {
        pull.await.unwrap();
    }
    assert_eq!(store.list().len(), 2);
    assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 3);

    registry.push("app", "latest", &second);
    let tag = reference(&registry, "app");
    store.pull(&tag, &Credentials::Anonymous, quiet()).await.unwrap();
    assert_eq!(store.find(&tag.to_string()).map(|image| image.id()), Some(second.config));
    assert_eq!(store.find(&first.config.to_string()).unwrap().repo_tags(), [""; 0]);
    drop(store);
    let store = support::store(dir.path());
    assert_eq!(store.find(&tag.to_string()).map(|image| image.id()), Some(second.config));
    assert_eq!(store.list().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_of_the_configuration_serves_another_registrys_name() {
    let registry = registry_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let image = Built::simple("mirrored");
    registry.push("library/busybox", "latest", &image);
    let hosts = dir.path().join("certs.d/docker.io");
    fs::create_dir_all(&hosts).unwrap();
    // The first host is dead; the server at the end must never be asked.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    fs::write(
        hosts.join("hosts.toml"),
        format!(
            "server = \"http://{dead}\"\n[host.\"http://{dead}\"]\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
            registry.address
        ),
    )
    .unwrap();
    let options = StoreOptions { registry_config_path: Some(dir.path().join("certs.d")), ..options() };
    let store = berth_image::Store::open(&dir.path().join("store"), options).unwrap();
    let pulled =
        store.pull(&Reference::parse("busybox").unwrap(), &Credentials::Anonymous, quiet()).await.unwrap();
    assert_eq!(pulled.repo_tags(), ["docker.io/library/busybox:latest"]);
    assert_eq!(store.find("busybox").map(|found| found.id()), Some(image.config));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_is_down_is_asked_once_for_a_pull() {
    let registry = registry_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let tars: Vec<Vec<u8>> = (0..6).map(|number| Layer::new().file("n", &[number]).tar()).collect();
    let image = Built::new(&tars, Packing::Gzip, Family::Oci, "down");
    registry.push("library/down", "latest", &image);
    // It takes connections and ends them before TLS is there, so that they can be counted.
    let down = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = down.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let counting = asked.clone();
    std::thread::spawn(move || {
        for connection in down.incoming() {
            counting.fetch_add(1, Ordering::Relaxed);
            drop(connection);
        }
    });
    let hosts = dir.path().join("certs.d/docker.io");
    fs::create_dir_all(&hosts).unwrap();
    let rules = format!("server = \"http://{}\"\n[host.\"https://{address}\"]\n", registry.address);
    fs::write(hosts.join("hosts.toml"), rules).unwrap();
    let options = StoreOptions { registry_config_path: Some(dir.path().join("certs.d")), ..options() };
    let store = berth_image::Store::open(&dir.path().join("store"), options).unwrap();
    let name = Reference::parse("down").unwrap();
    for pulls in 1..=2 {
        let pulled = store.pull(&name, &Credentials::Anonymous, quiet()).await.unwrap();
        assert_eq!(pulled.id(), image.config);
        // The next pull looks whether it is there again.
        assert_eq!(asked.load(Ordering::Relaxed), pulls);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_pull_leaves_nothing() {
    let registry = registry_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut noise = vec![0_u8; 3_000_000];
    let mut state = 1_u32;
    for byte in &mut noise {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_be_bytes()[0];
    }
    let tars: Vec<Vec<u8>> =
        (0..5).map(|i| Layer::new().file("noise", &noise).file("n", &[i]).tar()).collect();
    registry.push("big", "v", &Built::new(&tars, Packing::Gzip, Family::Oci, "big"));
    let reference = reference(&registry, "big:v");
    for millis in [1, 5, 10, 20, 40, 80] {
        let pull = store.pull(&reference, &Credentials::Anonymous, quiet());
        let cut = tokio::time::timeout(std::time::Duration::from_millis(millis), pull).await;
        assert!(cut.is_err() || !store.list().is_empty());
        if cut.is_ok() {
            break;
        }
        assert!(store.list().is_empty());
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        // A commit that has begun is finished, also after its pull was cancelled.
        store.remove(&reference.to_string(), nobody).await.unwrap();
        let left: Vec<_> =
            fs::read_dir(dir.path().join("layers")).unwrap().map(|e| e.unwrap().file_name()).collect();
        if left.is_empty() {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{left:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    store.pull(&reference, &Credentials::Anonymous, quiet()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked_against_the_configured_authorities() {
    let dir = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("openssl")
        .current_dir(dir.path())
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"])
        .args([
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ])
        .output();
    let Ok(made) = made else {
        skip_without("openssl");
        return;
    };
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let Some(registry) = Registry::start_tls(&dir.path().join("cert.pem"), &dir.path().join("key.pem"))
    else {
        skip_without("docker-registry");
        return;
    };
    let address = registry.address.clone();
    let port = address.rsplit_once(':').unwrap().1.to_owned();
    // Nothing is pushed over TLS: what is asked for is absent, and to say so the registry must have
    // been spoken to.
    for (name, settings, spoken) in [
        ("authority", format!("[host.\"https://{address}\"]\nca = \"cert.pem\"\n"), true),
        ("no check", format!("[host.\"https://{address}\"]\nskip_verify = true\n"), true),
        ("system's authorities", format!("[host.\"https://{address}\"]\n"), false),
        ("another name", format!("[host.\"https://localhost:{port}\"]\nca = \"cert.pem\"\n"), false),
    ] {
        let config = dir.path().join("certs.d/tls.example");
        fs::create_dir_all(&config).unwrap();
        fs::copy(dir.path().join("cert.pem"), config.join("cert.pem")).unwrap();
        // The only host is also the server, so that no name of the outside is looked up.
        let server = settings.lines().next().unwrap().replace("[host.", "server = ").replace(']', "");
        fs::write(config.join("hosts.toml"), format!("{server}\n{settings}")).unwrap();
        let options = StoreOptions { registry_config_path: Some(dir.path().join("certs.d")), ..options() };
        let store = berth_image::Store::open(&dir.path().join("store"), options).unwrap();
        let reference = Reference::parse("tls.example/a:b").unwrap();
        let failed = store.pull(&reference, &Credentials::Anonymous, quiet()).await.unwrap_err();
        let heard = matches!(failed, PullError::NotFound { .. });
        let refused = matches!(failed, PullError::Unreachable { .. });
        assert!(if spoken { heard } else { refused }, "{name}: {failed:?}");
    }
}
