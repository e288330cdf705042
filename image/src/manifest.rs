//! Indexes, manifests and configurations: which bytes may be called what, and which of them are for this machine.
//!
//! OCI image-spec 1.1 and Docker image manifest version 2, schema 2. Types come from `oci-spec`; nothing is ever written back from them,
//! since they drop unknown fields: the raw bytes are what is kept. Schema 1 is refused.

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::Digest;
use crate::digest::ParseDigestError;
use crate::json::{self, AmbiguousJson};

/// Largest index, manifest or configuration that is read. The common limit of registries and other runtimes.
pub(crate) const MAX_DOCUMENT: usize = 4 << 20;

/// Most layers of an image: overlayfs takes no more (fs/overlayfs/super.c, `OVL_MAX_STACK`).
pub(crate) const MAX_LAYERS: usize = 500;

/// Most entries of an index.
const MAX_INDEX_ENTRIES: usize = 10_000;

/// An index may lead to an index this often.
pub(crate) const MAX_NESTING: usize = 3;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// All that a registry may answer with, for the `Accept` header.
pub(crate) const ACCEPTED: [&str; 4] = [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST];

/// Keys that decide what a manifest means.
const FIELDS: &[&str] = &[
    "schemaVersion",
    "mediaType",
    "manifests",
    "layers",
    "config",
    "digest",
    "size",
    "platform",
    "architecture",
    "os",
    "variant",
    "fsLayers",
];
const CONFIG_FIELDS: &[&str] = &["rootfs", "diff_ids", "architecture", "os"];

/// Why a document is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Above 4 MiB.
    #[error("document is larger than 4 MiB")]
    TooLarge,
    /// Doubled keys and the like.
    #[error(transparent)]
    Ambiguous(#[from] AmbiguousJson),
    /// Not what its type says.
    #[error("document has not the form of its type")]
    Form(#[source] serde_json::Error),
    /// `mediaType`, `Content-Type` and content do not agree (CVE-2021-41190).
    #[error("document could be read as two types")]
    Confused,
    /// A type that is no image: an artifact, schema 1, a Helm chart.
    #[error("type '{0}' is not an image")]
    UnknownType(String),
    /// More than 500 layers, or more than 10,000 entries of an index.
    #[error("it lists {count} {what}, and at most {most} are taken")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// The most.
        most: usize,
    },
    /// An index of an index of an index of an index.
    #[error("indexes are nested too deeply")]
    TooDeep,
    /// A digest that is not sha256.
    #[error("bad digest in the document")]
    Digest(#[from] ParseDigestError),
    /// Nothing for this machine in the index, or an image for another one.
    #[error("image has nothing for {0}")]
    Platform(String),
    /// Configuration and manifest do not have the same number of layers.
    #[error("configuration lists {diff_ids} layers, manifest {layers}")]
    LayerCount {
        /// In the configuration.
        diff_ids: usize,
        /// In the manifest.
        layers: usize,
    },
}

/// Where content is and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// A document with its type settled.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Box<ImageIndex>),
    Manifest(Manifest),
}

/// What of a manifest counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    /// Lowest first.
    pub(crate) layers: Vec<Blob>,
}

/// What of a configuration counts.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) parsed: ImageConfiguration,
    /// Lowest first.
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Index,
    Manifest,
}

/// The fields that say what a document is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    config: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
    schema_version: Option<u64>,
}

/// Settles what a document is and reads it. `content_type` is what the registry, or the descriptor that led here, called it.
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Document, ManifestError> {
    if bytes.len() > MAX_DOCUMENT {
        return Err(ManifestError::TooLarge);
    }
    json::check(bytes, FIELDS, &["annotations"])?;
    let probe: Probe = serde_json::from_slice(bytes).map_err(ManifestError::Form)?;
    if probe.schema_version == Some(1) || probe.fs_layers.is_some() {
        return Err(ManifestError::UnknownType("schema 1".to_owned()));
    }
    // Registries that were set up for other files serve these without a type of their own.
    let generic = |t: &str| matches!(t, "application/json" | "application/octet-stream" | "text/plain" | "");
    let outer = content_type.map(essence).filter(|t| !generic(t)).map(|t| kind_of(&t)).transpose()?;
    let inner = probe.media_type.as_deref().map(kind_of).transpose()?;
    let form = match (probe.manifests.is_some(), probe.layers.is_some() || probe.config.is_some()) {
        (true, false) => Kind::Index,
        (false, true) => Kind::Manifest,
        _ => return Err(ManifestError::Confused),
    };
    if [outer, inner].into_iter().flatten().any(|kind| kind != form) {
        return Err(ManifestError::Confused);
    }
    match form {
        Kind::Index => {
            let index: ImageIndex = serde_json::from_slice(bytes).map_err(ManifestError::Form)?;
            let count = index.manifests().len();
            if count > MAX_INDEX_ENTRIES {
                return Err(ManifestError::TooLong { what: "images", count, most: MAX_INDEX_ENTRIES });
            }
            Ok(Document::Index(Box::new(index)))
        }
        Kind::Manifest => {
            let manifest: ImageManifest = serde_json::from_slice(bytes).map_err(ManifestError::Form)?;
            let count = manifest.layers().len();
            if count > MAX_LAYERS {
                return Err(ManifestError::TooLong { what: "layers", count, most: MAX_LAYERS });
            }
            let config_type = manifest.config().media_type().to_string();
            if !matches!(
                config_type.as_str(),
                "application/vnd.oci.image.config.v1+json"
                    | "application/vnd.docker.container.image.v1+json"
                    | "application/octet-stream"
            ) {
                return Err(ManifestError::UnknownType(crate::unpack::printable(config_type.as_bytes())));
            }
            let layers = manifest.layers().iter().map(blob).collect::<Result<_, _>>()?;
            Ok(Document::Manifest(Manifest { config: blob(manifest.config())?, layers }))
        }
    }
}

/// Reads a configuration and holds it against its manifest and this machine.
pub(crate) fn parse_config(bytes: &[u8], layers: usize) -> Result<Configuration, ManifestError> {
    if bytes.len() > MAX_DOCUMENT {
        return Err(ManifestError::TooLarge);
    }
    json::check(bytes, CONFIG_FIELDS, &["config", "container_config", "history"])?;
    let parsed: ImageConfiguration = serde_json::from_slice(bytes).map_err(ManifestError::Form)?;
    let diff_ids =
        parsed.rootfs().diff_ids().iter().map(|id| Digest::parse(id)).collect::<Result<Vec<_>, _>>()?;
    if diff_ids.len() != layers {
        return Err(ManifestError::LayerCount { diff_ids: diff_ids.len(), layers });
    }
    let (os, architecture) = (parsed.os().to_string(), parsed.architecture().to_string());
    if os != "linux" || !(architecture.is_empty() || architecture == host_architecture()) {
        return Err(ManifestError::Platform(host_platform()));
    }
    Ok(Configuration { parsed, diff_ids })
}

/// The entry of an index that fits this machine best, with its media type.
pub(crate) fn select(index: &ImageIndex) -> Result<(Blob, String), ManifestError> {
    let mut best: Option<(u8, &Descriptor)> = None;
    for descriptor in index.manifests() {
        // An entry without a platform may be the only image of a layout; anything that says its platform is better.
        let rank = match descriptor.platform() {
            None => Some(0),
            Some(platform) => platform_rank(
                &platform.os().to_string(),
                &platform.architecture().to_string(),
                platform.variant().as_deref(),
            ),
        };
        // The first of equals counts (image-spec, image-index.md).
        if let Some(rank) = rank
            && kind_of(descriptor.media_type().as_ref()).is_ok()
            && best.is_none_or(|(earlier, _)| rank > earlier)
        {
            best = Some((rank, descriptor));
        }
    }
    let (_, descriptor) = best.ok_or_else(|| ManifestError::Platform(host_platform()))?;
    Ok((blob(descriptor)?, descriptor.media_type().to_string()))
}

/// How well a platform fits; `None` = not at all. The higher variant wins as long as this processor has it.
fn platform_rank(os: &str, architecture: &str, variant: Option<&str>) -> Option<u8> {
    if os != "linux" || architecture != host_architecture() {
        return None;
    }
    match variant {
        None | Some("" | "v1") => Some(2),
        Some("v8") if architecture == "arm64" => Some(2),
        Some(variant) if architecture == "amd64" => match variant {
            "v2" if has_amd64_v2() => Some(3),
            "v3" if has_amd64_v3() => Some(4),
            _ => None,
        },
        Some(_) => None,
    }
}

#[cfg(target_arch = "x86_64")]
fn has_amd64_v2() -> bool {
    std::is_x86_feature_detected!("sse4.2")
        && std::is_x86_feature_detected!("popcnt")
        && std::is_x86_feature_detected!("cmpxchg16b")
}

#[cfg(target_arch = "x86_64")]
fn has_amd64_v3() -> bool {
    has_amd64_v2()
        && std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("bmi2")
        && std::is_x86_feature_detected!("fma")
        && std::is_x86_feature_detected!("movbe")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_amd64_v2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_amd64_v3() -> bool {
    false
}

/// Go's name of the architecture that this program was built for.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

fn host_platform() -> String {
    format!("linux/{}", host_architecture())
}

fn blob(descriptor: &Descriptor) -> Result<Blob, ManifestError> {
    Ok(Blob { digest: Digest::parse(descriptor.digest().as_ref())?, size: descriptor.size() })
}

/// A media type without its parameters, in lower case (RFC 9110, section 8.3.1).
fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn kind_of(media_type: &str) -> Result<Kind, ManifestError> {
    match media_type {
        OCI_INDEX | DOCKER_LIST => Ok(Kind::Index),
        OCI_MANIFEST | DOCKER_MANIFEST => Ok(Kind::Manifest),
        other => Err(ManifestError::UnknownType(crate::unpack::printable(other.as_bytes()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn manifest(extra: &str) -> String {
        let config = format!(
            r#"{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{HEX}","size":2}}"#
        );
        format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]{extra}}}"#)
    }

    fn index(entries: &[(&str, &str)]) -> String {
        let entries: Vec<String> = entries
            .iter()
            .enumerate()
            .map(|(size, (arch, variant))| {
                format!(
                    r#"{{"mediaType":"{OCI_MANIFEST}","digest":"sha256:{HEX}","size":{size},
                       "platform":{{"os":"linux","architecture":"{arch}"{variant}}}}}"#
                )
            })
            .collect();
        format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","))
    }

    #[test]
    fn a_type_is_settled_only_if_all_signs_agree() {
        let plain = manifest("");
        let typed = manifest(&format!(r#","mediaType":"{DOCKER_MANIFEST}""#));
        let lying = manifest(&format!(r#","mediaType":"{OCI_INDEX}""#));
        let both = manifest(r#","manifests":[]"#);
        for (text, content_type, fine) in [
            (&plain, Some(OCI_MANIFEST), true),
            (&plain, None, true),
            (&plain, Some("application/json; charset=utf-8"), true),
            (&plain, Some(OCI_INDEX), false),
            (&plain, Some("application/vnd.docker.distribution.manifest.v1+prettyjws"), false),
            (&plain, Some("text/html"), false),
            (&typed, Some(DOCKER_MANIFEST), true),
            (&lying, Some(OCI_MANIFEST), false),
            (&lying, Some(OCI_INDEX), false),
            (&both, None, false),
            (&both, Some(OCI_MANIFEST), false),
        ] {
            assert_eq!(parse(text.as_bytes(), content_type).is_ok(), fine, "{content_type:?} {text}");
        }
    }

    #[test]
    fn odd_manifests_are_refused() {
        let good = manifest("");
        for bad in [
            good.replace("\"size\":2", "\"size\":-2"),
            good.replace("\"size\":2", "\"size\":2.5"),
            good.replace("\"size\":2", "\"size\":18446744073709551616"),
            good.replace("\"layers\"", "\"Layers\""),
            good.replace("\"layers\":[]", "\"layers\":[],\"layers\":[]"),
            good.replace("sha256:e3", "sha256:../../e3"),
            good.replace("sha256:e3", "sha256:E3"),
            good.replace("sha256", "sha512"),
            good.replace("image.config.v1", "helm.config.v1"),
            r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(),
            format!("\u{feff}{good}"),
            "[".repeat(100_000),
            String::new(),
        ] {
            assert!(parse(bad.as_bytes(), None).is_err(), "{bad:.200}");
        }
        assert!(matches!(parse(&vec![b' '; MAX_DOCUMENT + 1], None), Err(ManifestError::TooLarge)));
    }

    #[test]
    fn the_first_fitting_platform_is_taken() {
        let other = if host_architecture() == "s390x" { "arm" } else { "s390x" };
        let here = host_architecture();
        let size_of = |entries: &[(&str, &str)]| match parse(index(entries).as_bytes(), None).unwrap() {
            Document::Index(index) => select(&index).map(|(blob, _)| blob.size).ok(),
            Document::Manifest(_) => None,
        };
        assert_eq!(size_of(&[(other, ""), (here, ""), (here, "")]), Some(1));
        assert_eq!(size_of(&[(other, ""), ("unknown", "")]), None);
        assert_eq!(size_of(&[(here, r#","variant":"v99""#), (here, "")]), Some(1));
        assert_eq!(size_of(&[]), None);
    }

    #[test]
    fn a_configuration_must_fit_its_manifest_and_machine() {
        let config = |os: &str, arch: &str| {
            format!(
                r#"{{"os":"{os}","architecture":"{arch}","rootfs":{{"type":"layers","diff_ids":["sha256:{HEX}"]}},
                   "config":{{"Env":null,"Labels":{{"OS":"x"}},"Volumes":{{"/v":{{}}}}}}}}"#
            )
        };
        let good = config("linux", host_architecture());
        assert!(parse_config(good.as_bytes(), 1).is_ok());
        assert!(matches!(parse_config(good.as_bytes(), 2), Err(ManifestError::LayerCount { .. })));
        for (os, arch) in [("windows", host_architecture()), ("linux", "mips")] {
            assert!(matches!(parse_config(config(os, arch).as_bytes(), 1), Err(ManifestError::Platform(_))));
        }
    }
}
