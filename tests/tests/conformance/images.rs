//! The images that critest pulls, made from Debian packages and served by a registry on loopback.
//!
//! Names and tags are constants of critest v1.37.0 (`pkg/validate/consts.go`, `consts_linux.go`,
//! `multi_container_linux.go`, `security_context_linux.go`); the required content of each image is
//! in its `images/`. A mirror rule for all hosts makes this registry stand in for those that
//! critest names.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_tests::daemon::Daemon;
use berth_tests::forge::{Image, Layer, Sealed};
use berth_tests::registry::Registry;
use serde_json::json;

/// Where layers are kept between runs.
const LAYERS: &str = "../.cache/conformance";

/// The file systems that `tests/conformance/build-layers` makes.
struct Layers {
    busybox: Layer,
    nginx: Layer,
    nginx_on_12003: Layer,
    nonewprivs: Layer,
}

impl Layers {
    /// Builds those that are missing, and reads them.
    fn build() -> Result<Self> {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
        let directory = tests.join(LAYERS);
        let status = Command::new(tests.join("conformance/build-layers"))
            .arg(&directory)
            .status()
            .context("running build-layers")?;
        ensure!(status.success(), "tests/conformance/build-layers failed; the lines above say why");
        let layer = |name: &str| -> Result<Layer> {
            let path = directory.join(name);
            Ok(Layer::of_tar(fs::read(&path).with_context(|| format!("reading {}", path.display()))?))
        };
        Ok(Self {
            busybox: layer("busybox.tar")?,
            nginx: layer("nginx.tar")?,
            nginx_on_12003: layer("nginx-host.tar")?,
            nonewprivs: layer("nonewprivs.tar")?,
        })
    }

    /// busybox with a file that has the image's name, so that no two images have the same id.
    fn busybox(&self, name: &str) -> Image {
        let marker = Layer::of_files(&[("image", name.as_bytes())]);
        image(&[&self.busybox, &marker]).with("Cmd", json!(["sh"]))
    }

    /// nginx with more layers on top and this command.
    fn web(&self, more: &[&Layer], command: &[&str]) -> Image {
        image(&[&[&self.busybox, &self.nginx], more].concat()).with("Cmd", json!(command))
    }
}

/// An image of these layers, lowest first, for the machine that runs this.
fn image(layers: &[&Layer]) -> Image {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let empty = Image {
        config: json!({
            "architecture": architecture, "os": "linux", "config": {"Env": ["PATH=/bin:/usr/sbin"]},
            "rootfs": {"type": "layers", "diff_ids": []},
        }),
        layers: Vec::new(),
    };
    layers.iter().fold(empty, |image, layer| image.on_top((*layer).clone()))
}

/// Pushes every image to `registry`, and makes it the daemon's mirror of all registries.
///
/// # Errors
/// When an image cannot be built, or the registry refuses it.
pub(crate) fn provide(daemon: &Daemon, registry: &Registry<'_>) -> Result<()> {
    let layers = Layers::build()?;
    let e2e = |name: &str, tag: &str, image: &Image| push(registry, "e2e-test-images", name, tag, image);
    e2e("busybox", "1.29-2", &layers.busybox("busybox"))?;
    e2e("nginx", "1.14-2", &layers.web(&[], &["nginx"]))?;
    e2e("httpd", "2.4.39-4", &layers.web(&[], &["sh", "-c", "echo httpd; exec nginx"]))?;
    e2e("nonewprivs", "1.3", &image(&[&layers.nonewprivs]).with("Entrypoint", json!(["/nonewprivs"])))?;

    let own =
        |name: &str, tag: &str, image: &Image| push(registry, "k8s-staging-cri-tools", name, tag, image);
    own("test-image-latest", "latest", &layers.busybox("latest"))?;
    own("test-image-tag", "test", &layers.busybox("tag:test"))?;
    own("test-image-tag", "all", &layers.busybox("tag:all"))?;
    for name in ["test-image-1", "test-image-2", "test-image-3"] {
        own(name, "latest", &layers.busybox(name))?;
    }
    let tags = layers.busybox("tags");
    for tag in ["1", "2", "3"] {
        own("test-image-tags", tag, &tags)?;
    }
    for (name, user) in [
        ("test-image-user-uid", "1002"),
        ("test-image-user-username", "www-data"),
        ("test-image-user-uid-group", "1003:1004"),
        ("test-image-user-username-group", "www-data:1004"),
        ("test-image-predefined-group", "1000"),
    ] {
        own(name, "latest", &layers.busybox(name).with("User", json!(user)))?;
    }
    let on_host = layers.web(&[&layers.nginx_on_12003], &["nginx"]);
    for architecture in ["amd64", "arm64"] {
        own(&format!("hostnet-nginx-{architecture}"), "latest", &on_host)?;
    }
    registry.push("pause", "3.9", &layers.busybox("pause").seal())?;

    let rules = format!("[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", registry.address);
    daemon.mirror("_default", &rules)
}

fn push(registry: &Registry<'_>, group: &str, name: &str, tag: &str, image: &Image) -> Result<()> {
    let sealed: Sealed = image.seal();
    registry
        .push(&format!("{group}/{name}"), tag, &sealed)
        .with_context(|| format!("pushing {name}:{tag}"))?;
    Ok(())
}
