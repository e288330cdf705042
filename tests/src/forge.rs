//! Images made for tests: the demo image with another configuration or more layers, and images with
//! faults that no build tool would make.
//!
//! OCI image-spec v1.1. Layers that are made here are plain tars, written header by header, because
//! tar libraries refuse what hostile images contain.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::daemon::programs;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const TAR_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image in parts. The fields are written as they are, even when they do not match.
#[derive(Debug, Clone)]
pub struct Image {
    /// The configuration, whose `rootfs.diff_ids` follow from the layers unless a test sets them.
    pub config: Value,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
}

/// A layer and its description in the manifest.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Its media type.
    pub media_type: String,
    /// Its digest in the manifest.
    pub digest: String,
    /// Its length in the manifest.
    pub size: usize,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The object at one of a layer's paths.
#[derive(Debug, Clone, Copy)]
pub enum Entry<'a> {
    /// A file with this content.
    File(&'a [u8]),
    /// A directory.
    Directory,
    /// A symbolic link to this path.
    Link(&'a str),
    /// A named pipe.
    Fifo,
}

/// The parts of an image as a registry or a layout keeps them.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// Configuration and layers, by the digest that the manifest names.
    pub blobs: BTreeMap<String, Vec<u8>>,
    /// The manifest.
    pub manifest: Vec<u8>,
    /// The manifest's digest.
    pub digest: String,
    /// The image's id: the digest of the configuration.
    pub id: String,
}

impl Image {
    /// The demo image.
    ///
    /// # Errors
    /// When `dist/images/demo.tar` is missing or not as `scripts/build-image` makes it.
    pub fn demo() -> Result<Self> {
        let path = programs()?.join("images/demo.tar");
        let file =
            fs::File::open(&path).with_context(|| format!("no {}: run make images", path.display()))?;
        let mut parts = BTreeMap::new();
        for entry in tar::Archive::new(file).entries().context("reading the demo image")? {
            let mut entry = entry.context("reading the demo image")?;
            let name = entry.path().context("reading a name")?.to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).with_context(|| format!("reading {name}"))?;
            parts.insert(name, bytes);
        }
        let json = |name: &str| -> Result<Value> {
            let bytes = parts.get(name).with_context(|| format!("the demo image has no {name}"))?;
            serde_json::from_slice(bytes).with_context(|| format!("reading {name}"))
        };
        let text = |value: &Value, pointer: &str| {
            value
                .pointer(pointer)
                .and_then(Value::as_str)
                .map(str::to_owned)
                .context("an incomplete manifest")
        };
        let blob = |digest: &str| format!("blobs/{}", digest.replace(':', "/"));
        let manifest = json(&blob(&text(&json("index.json")?, "/manifests/0/digest")?))?;
        let layer = manifest.pointer("/layers/0").context("the demo image has no layer")?;
        let digest = text(layer, "/digest")?;
        let bytes = parts.get(&blob(&digest)).context("the demo image lacks its layer")?.clone();
        Ok(Self {
            config: json(&blob(&text(&manifest, "/config/digest")?))?,
            layers: vec![Layer { media_type: text(layer, "/mediaType")?, digest, size: bytes.len(), bytes }],
        })
    }

    /// Sets a value below `config` in the configuration, such as `User`.
    #[must_use]
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.config["config"][key] = value;
        self
    }

    /// Puts a layer on top of the others.
    #[must_use]
    pub fn on_top(mut self, layer: Layer) -> Self {
        if let Some(ids) = self.config.pointer_mut("/rootfs/diff_ids").and_then(Value::as_array_mut) {
            // A plain tar's digest is its diff id.
            ids.push(json!(layer.digest));
        }
        self.layers.push(layer);
        self
    }

    /// Writes the manifest.
    #[must_use]
    pub fn seal(&self) -> Sealed {
        let config = self.config.to_string().into_bytes();
        let id = sha256(&config);
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| json!({"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": id, "size": config.len()},
            "layers": layers,
        })
        .to_string()
        .into_bytes();
        let mut blobs: BTreeMap<String, Vec<u8>> =
            self.layers.iter().map(|layer| (layer.digest.clone(), layer.bytes.clone())).collect();
        blobs.insert(id.clone(), config);
        Sealed { blobs, digest: sha256(&manifest), manifest, id }
    }

    /// Writes an OCI image layout to the directory `dir`, with this name for the image.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_layout(&self, dir: &Path, name: &str) -> Result<Sealed> {
        let sealed = self.seal();
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).context("making the layout")?;
        let mut parts = sealed.blobs.clone();
        parts.insert(sealed.digest.clone(), sealed.manifest.clone());
        for (digest, bytes) in parts {
            fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes).context("writing a blob")?;
        }
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .context("marking the layout")?;
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": MANIFEST, "digest": sealed.digest, "size": sealed.manifest.len(),
                "annotations": {"org.opencontainers.image.ref.name": name},
            }],
        });
        fs::write(dir.join("index.json"), index.to_string()).context("writing the index")?;
        Ok(sealed)
    }

    /// Writes what `docker save` writes, with this name for the image, to the file `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_docker_archive(&self, path: &Path, name: &str) -> Result<Sealed> {
        let sealed = self.seal();
        let mut archive = tar::Builder::new(fs::File::create(path).context("making the archive")?);
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, bytes).with_context(|| format!("adding {name}"))
        };
        let mut layers = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let name = format!("{number}/layer.tar");
            add(&name, &layer.bytes)?;
            layers.push(name);
        }
        add("config.json", self.config.to_string().as_bytes())?;
        let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": layers}]);
        add("manifest.json", manifest.to_string().as_bytes())?;
        archive.finish().context("ending the archive")?;
        Ok(sealed)
    }
}

impl Layer {
    /// A layer with this tar.
    #[must_use]
    pub fn of_tar(bytes: Vec<u8>) -> Self {
        Self { media_type: TAR_LAYER.to_owned(), digest: sha256(&bytes), size: bytes.len(), bytes }
    }

    /// A plain tar with these files: path and content. Paths are taken as they are.
    #[must_use]
    pub fn of_files(files: &[(&str, &[u8])]) -> Self {
        Self::of_entries(
            &files.iter().map(|(path, content)| (*path, Entry::File(content))).collect::<Vec<_>>(),
        )
    }

    /// A plain tar with these entries. Paths and the targets of links are taken as they are.
    #[must_use]
    pub fn of_entries(entries: &[(&str, Entry<'_>)]) -> Self {
        let mut bytes = Vec::new();
        for (path, entry) in entries {
            let (kind, mode, content, link): (_, _, &[u8], _) = match entry {
                Entry::File(content) => (tar::EntryType::Regular, 0o644, content, ""),
                Entry::Directory => (tar::EntryType::Directory, 0o755, b"", ""),
                Entry::Link(target) => (tar::EntryType::Symlink, 0o777, b"", *target),
                Entry::Fifo => (tar::EntryType::Fifo, 0o666, b"", ""),
            };
            let mut header = tar::Header::new_ustar();
            // Not by set_path and set_link_name, which refuse the content of hostile images.
            let old = header.as_old_mut();
            for (place, byte) in old.name.iter_mut().zip(path.as_bytes()) {
                *place = *byte;
            }
            for (place, byte) in old.linkname.iter_mut().zip(link.as_bytes()) {
                *place = *byte;
            }
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_size(content.len() as u64);
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(content);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        Self::of_tar(bytes)
    }
}

/// A digest in the form of the specifications.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
