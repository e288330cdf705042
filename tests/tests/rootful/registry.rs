//! Pulls from a real registry on the daemon's host.

use std::fs;

use anyhow::{Context as _, Result};
use berth_tests::census::Census;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::forge::{Image, Layer, sha256};
use berth_tests::pod::container;
use berth_tests::registry::Registry;
use tonic::{Code, Status};

/// An image other than the demo image that shares its layer.
fn image(note: &str) -> Result<Image> {
    Ok(Image::demo()?.on_top(Layer::of_files(&[("note", note.as_bytes())])))
}

/// Asserts that a pull fails, and that nothing of it is listed or kept.
fn refused(daemon: &Daemon, reference: &str) -> Result<Status> {
    let census = Census::take(daemon)?;
    let images = daemon.client().images()?;
    let status = daemon.client().pull(reference).err().with_context(|| format!("{reference} is refused"))?;
    assert_eq!(daemon.client().images()?, images);
    census.stays(daemon).with_context(|| format!("after {status}"))?;
    Ok(status)
}

#[test]
fn an_image_is_pulled_by_tag_and_by_digest_and_runs() -> Result<()> {
    rootful(|daemon| {
        let registry = Registry::start(daemon, 5000)?;
        let sealed = image("pulled")?.seal();
        let reference = registry.push("team/app", "v1", &sealed)?;
        let client = daemon.client();
        assert_eq!(client.pull(&reference)?, sealed.id, "the answer is the image's id");
        let by_tag = client.image(&reference)?.context("it is there")?;
        assert_eq!(
            (by_tag.id.as_str(), by_tag.repo_tags.as_slice()),
            (sealed.id.as_str(), std::slice::from_ref(&reference))
        );
        let digest = format!("{}/team/app@{}", registry.address, sealed.digest);
        assert_eq!(by_tag.repo_digests, std::slice::from_ref(&digest));
        let mut config = container("main", &["cat", "/note"]);
        config.image = Some(berth_tests::cri::image_spec(&reference));
        assert_eq!(daemon.pod("web")?.run_container(config)?.stdout, "pulled");

        client.remove_image_of(&reference)?;
        assert_eq!(client.pull(&digest)?, sealed.id);
        let by_digest = client.image(&digest)?.context("it is there")?;
        assert!(by_digest.repo_tags.is_empty(), "{by_digest:?}");
        assert_eq!(by_digest.repo_digests, [digest]);
        Ok(())
    })
}

#[test]
fn a_tag_that_moved_is_followed() -> Result<()> {
    rootful(|daemon| {
        let registry = Registry::start(daemon, 5000)?;
        let client = daemon.client();
        let (old, new) = (image("old")?.seal(), image("new")?.seal());
        let reference = registry.push("app", "v1", &old)?;
        client.pull(&reference)?;
        registry.push("app", "v1", &new)?;
        assert_eq!(client.pull(&reference)?, new.id);
        assert_eq!(client.image(&reference)?.map(|image| image.id), Some(new.id));
        let before = client.image(&old.id)?.context("the old image stays, without the name")?;
        assert!(before.repo_tags.is_empty(), "{before:?}");
        Ok(())
    })
}

#[test]
fn mirrors_are_asked_as_the_rules_say() -> Result<()> {
    rootful(|daemon| {
        let first = Registry::start(daemon, 5001)?;
        let other = Registry::start(daemon, 5002)?;
        let (of_first, of_other) = (image("first")?.seal(), image("other")?.seal());
        first.push("team/app", "v1", &of_first)?;
        other.push("team/app", "v1", &of_other)?;
        other.push("only/here", "v1", &of_other)?;
        let rules = |address: &str| {
            format!(
                "server = \"https://registry.example\"\n[host.\"http://{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
            )
        };
        daemon.mirror("registry.example", &rules(&first.address))?;
        daemon.mirror("_default", &rules(&other.address))?;
        let client = daemon.client();
        assert_eq!(client.pull("registry.example/team/app:v1")?, of_first.id);
        assert_eq!(
            client.pull("elsewhere.example/team/app:v1")?,
            of_other.id,
            "the rules of every other host"
        );
        let image =
            client.image("elsewhere.example/team/app:v1")?.context("by the name that was asked for")?;
        assert_eq!(image.repo_tags, ["elsewhere.example/team/app:v1"]);
        Ok(())
    })
}

#[test]
fn rules_that_are_garbage_are_told_with_their_file_and_hold_nobody_up() -> Result<()> {
    rootful(|daemon| {
        let file = daemon.dir().join("certs.d/registry.example/hosts.toml");
        let path = file.display().to_string();
        let cases = [
            ("\u{0}\u{1}", "line 1 is not TOML"),
            ("server = \"https://a\"\nhost = [\n", "line 2 is not TOML"),
            ("server = 5", "invalid value of 'server'"),
            ("server = \"ftp://a\"", "invalid value of 'ftp://a'"),
            ("[host.\"::::\"]\n", "invalid value of '::::'"),
        ];
        let long = "# x\n".repeat(300_000);
        for (rules, words) in cases.into_iter().chain([(long.as_str(), "larger than 1 MiB")]) {
            daemon.mirror("registry.example", rules)?;
            let message = refused(daemon, "registry.example/app:v1")?.message().to_owned();
            assert!(message.contains(&path) && message.contains(words), "{words}: {message}");
        }
        fs::remove_file(&file)?;
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRUSR)?;
        let message = refused(daemon, "registry.example/app:v1")?.message().to_owned();
        assert!(message.contains(&path) && message.contains("not a regular file"), "{message}");
        Ok(())
    })
}

#[test]
fn what_is_not_there_is_not_found_and_a_registry_that_is_away_is_told_as_that() -> Result<()> {
    rootful(|daemon| {
        let registry = Registry::start(daemon, 5000)?;
        let status = refused(daemon, &format!("{}/no/such:tag", registry.address))?;
        assert_eq!(status.code(), Code::NotFound, "{status}");
        assert!(status.message().contains("no/such"), "{status}");
        let absent = format!("{}/no/such@{}", registry.address, sha256(b"absent"));
        assert_eq!(refused(daemon, &absent)?.code(), Code::NotFound);
        let away = refused(daemon, "127.0.0.1:1/app:v1")?;
        // A kubelet checks this code and this beginning.
        assert_eq!(away.code(), Code::Unknown, "{away}");
        assert!(away.message().starts_with("RegistryUnavailable"), "{away}");
        for name in [
            "host.example/UPPER/case",
            "a b",
            "",
            "app:",
            "app@sha256:short",
            "../../etc/passwd",
            "http://host/app",
        ] {
            assert_eq!(refused(daemon, name)?.code(), Code::InvalidArgument, "{name:?}");
        }
        Ok(())
    })
}

#[test]
fn damaged_images_leave_nothing() -> Result<()> {
    rootful(|daemon| {
        let registry = Registry::start(daemon, 5000)?;
        let damage = |name: &str, change: &dyn Fn(&mut Vec<u8>)| -> Result<Status> {
            let image = image(&format!("the note of {name}"))?;
            let reference = registry.push("damaged", name, &image.seal())?;
            let layer = image.layers.last().context("a layer")?;
            registry.corrupt(&layer.digest, change)?;
            refused(daemon, &reference)
        };
        let flipped = damage("flipped", &|bytes| bytes[600] ^= 1)?;
        assert!(flipped.message().contains("digest"), "{flipped}");
        let cut = damage("cut", &|bytes| bytes.truncate(700))?;
        assert!(!cut.message().is_empty());
        let longer = damage("longer", &|bytes| bytes.push(0))?;
        assert!(!longer.message().is_empty());
        // The layer matches the manifest, but not the configuration.
        let mut lying = image("lying")?;
        lying.config["rootfs"]["diff_ids"][1] = serde_json::json!(sha256(b"something else"));
        let reference = registry.push("damaged", "lying", &lying.seal())?;
        let status = refused(daemon, &reference)?;
        assert!(status.message().contains("uncompressed"), "{status}");
        // A layer that ends within a file, by its own digest.
        let mut short = Layer::of_files(&[("note", &[7; 4096])]);
        short.bytes.truncate(1500);
        (short.digest, short.size) = (sha256(&short.bytes), short.bytes.len());
        let reference = registry.push("damaged", "short", &Image::demo()?.on_top(short).seal())?;
        refused(daemon, &reference)?;
        // And after all of these a good one still succeeds.
        let good = image("good")?.seal();
        let reference = registry.push("good", "v1", &good)?;
        assert_eq!(daemon.client().pull(&reference)?, good.id);
        Ok(())
    })
}

#[test]
fn a_path_that_climbs_out_reaches_nothing() -> Result<()> {
    rootful(|daemon| {
        let registry = Registry::start(daemon, 5000)?;
        let canary = daemon.dir().join("canary");
        fs::write(&canary, "alive")?;
        let absolute = canary.to_string_lossy().into_owned();
        let up = "../".repeat(12) + absolute.trim_start_matches('/');
        for (number, path) in
            ["../canary", "a/../../canary", absolute.as_str(), up.as_str()].iter().enumerate()
        {
            let image = Image::demo()?.on_top(Layer::of_files(&[(path, b"dead")]));
            let reference = registry.push("climbing", &format!("v{number}"), &image.seal())?;
            let images = daemon.client().images()?;
            match daemon.client().pull(&reference) {
                Ok(_) => daemon.client().remove_image_of(&reference)?,
                Err(status) => {
                    assert!(!status.message().is_empty());
                    assert_eq!(daemon.client().images()?, images);
                }
            }
            assert_eq!(fs::read_to_string(&canary)?, "alive", "{path}");
        }
        Ok(())
    })
}
