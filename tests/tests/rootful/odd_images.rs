//! Images that builders create and that are odd where it does not matter; and text of images and
//! requests in output.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::cri::image_spec;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::forge::{Image, Layer, sha256};
use berth_tests::pod::{container, security, volume};
use serde_json::{Value, json};

/// Writes an image layout with this configuration and manifest, whose `config` is filled in, and
/// imports it.
fn import_odd(daemon: &Daemon, name: &str, config: &str, mut manifest: Value) -> Result<()> {
    let directory = daemon.directory(name)?;
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let put = |bytes: &[u8]| {
        let digest = sha256(bytes);
        fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes).map(|()| digest)
    };
    manifest["config"] = json!({
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": put(config.as_bytes())?, "size": config.len(),
    });
    let manifest = manifest.to_string();
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": put(manifest.as_bytes())?, "size": manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": format!("localhost/odd:{name}")},
        }],
    });
    fs::write(directory.join("index.json"), index.to_string())?;
    daemon.client().import(&directory)?;
    Ok(())
}

/// The demo image's programs, as one file.
fn busybox(daemon: &Daemon) -> Result<std::path::PathBuf> {
    let directory = daemon.directory("tools")?;
    let layer = Image::demo()?.layers.pop().context("the demo image's layer")?;
    let archive = directory.join("layer");
    fs::write(&archive, layer.bytes)?;
    let status =
        Command::new("tar").arg("-C").arg(&directory).arg("-xf").arg(&archive).arg("bin/busybox").status()?;
    ensure!(status.success(), "tar ended with {status}");
    Ok(directory.join("bin"))
}

#[test]
fn an_image_without_layers_runs_the_program_of_a_mount() -> Result<()> {
    rootful(|daemon| {
        let tools = busybox(daemon)?;
        let pod = daemon.pod("pod")?;
        for (name, config, manifest) in [
            ("empty", r#"{"rootfs":{"type":"layers","diff_ids":[]}}"#, json!({"layers": []})),
            ("null", r#"{"rootfs":{"diff_ids":null},"os":""}"#, json!({"layers": null})),
            ("absent", r#"{"config":{"Labels":{"a":null},"User":null}}"#, json!({})),
        ] {
            import_odd(daemon, name, config, manifest)?;
            let mut config =
                container(name, &["/tools/busybox", "sh", "-c", "echo ran; /tools/busybox ls /"]);
            config.image = Some(image_spec(&format!("localhost/odd:{name}")));
            config.mounts = vec![v1::Mount { readonly: true, ..volume(&tools, "/tools") }];
            let said = pod.run_container(config)?.stdout;
            ensure!(said.starts_with("ran\n") && said.contains("tools"), "{name}: {said}");
            ensure!(!said.contains("home"), "{name}: {said}");
        }
        Ok(())
    })
}

#[test]
fn volumes_of_any_spelling_are_writable() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("volumes")?;
        Image::demo()?
            .with("Volumes", json!({"data": null, "../srv/x/": {}, "/a/../b//c": {}, ".": {}, "/": {}}))
            .write_layout(&directory, "localhost/odd:volumes")?;
        daemon.client().import(&directory)?;
        let mut config = container(
            "volumes",
            &["sh", "-c", "touch /data/f /srv/x/f /b/c/f && echo made; touch /f || echo refused"],
        );
        config.image = Some(image_spec("localhost/odd:volumes"));
        security(&mut config).readonly_rootfs = true;
        let ended = daemon.pod("pod")?.run_container(config)?;
        // The root itself keeps the mode that the request wants.
        ensure!(ended.stdout == "made\nrefused\n", "{}{}", ended.stdout, ended.stderr);
        Ok(())
    })
}

#[test]
fn packed_archives_are_imported_and_run() -> Result<()> {
    rootful(|daemon| {
        let archive = daemon.dir().join("packed.tar");
        Image::demo()?.write_docker_archive(&archive, "localhost/odd:packed")?;
        ensure!(Command::new("gzip").arg(&archive).status()?.success(), "gzip failed");
        daemon.client().import(&daemon.dir().join("packed.tar.gz"))?;
        let mut config = container("packed", &["echo", "unpacked"]);
        config.image = Some(image_spec("localhost/odd:packed"));
        assert_eq!(daemon.pod("pod")?.run_container(config)?.stdout, "unpacked\n");
        Ok(())
    })
}

#[test]
fn text_of_images_and_requests_leaves_escaped() -> Result<()> {
    const HOSTILE: &str = "x\u{202e}y\u{2028}z\nERROR forged\u{1b}[2J";
    rootful(|daemon| {
        let client = daemon.client();
        let directory = daemon.directory("hostile")?;
        let path = format!("{HOSTILE}/../up");
        Image::demo()?
            .on_top(Layer::of_files(&[(&path, b"")]))
            .write_layout(&directory, "localhost/odd:hostile")?;
        let mut told =
            vec![client.import(&directory).err().context("the image is taken")?.message().to_owned()];
        let mut config = container("hostile", &["true"]);
        config.image = Some(image_spec(&format!("localhost/{HOSTILE}")));
        config.working_dir = HOSTILE.to_owned();
        told.push(daemon.pod("pod")?.create(config).err().context("the name is taken")?.message().to_owned());
        told.push(client.pull(&format!("localhost/{HOSTILE}")).err().context("pulled")?.message().to_owned());
        // A request for something absent is reported only to the client; other errors are in the
        // log too.
        let log = daemon.log()?;
        ensure!(log.contains("up"), "the import is not in the log:\n{log}");
        told.push(log);
        for text in told {
            for forbidden in ["\u{202e}", "\u{2028}", "\nERROR forged", "\u{1b}[2J"] {
                ensure!(!text.contains(forbidden), "{forbidden:?} in {text:?}");
            }
        }
        Ok(())
    })
}
