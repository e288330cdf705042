//! Indexes, manifests and configurations: their types, and which of them are for this machine.
//!
//! OCI image-spec 1.1 and Docker image manifest version 2, schema 2; the forms are in `document`.
//! Schema 1 is refused.

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::Digest;
use crate::digest::ParseDigestError;
use crate::document::{self, ConfigDocument, Descriptor, Execution, Index, ManifestDocument};
use crate::json::{self, AmbiguousJson};
use crate::platform;

/// Largest index, manifest or configuration that is read. The common limit of registries and other
/// runtimes.
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

/// All accepted types, for the `Accept` header.
pub(crate) const ACCEPTED: [&str; 4] = [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST];

/// Keys that determine the meaning of a manifest.
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

/// Keys that determine the meaning of a configuration.
const CONFIG_FIELDS: &[&str] = &[
    "rootfs",
    "diff_ids",
    "architecture",
    "os",
    "config",
    "Entrypoint",
    "Cmd",
    "Env",
    "WorkingDir",
    "User",
    "StopSignal",
    "Volumes",
];

/// Keys of a configuration whose contents do not matter. Those below `Volumes` are paths.
const CONFIG_FREE: &[&str] =
    &["container_config", "history", "Labels", "Volumes", "ExposedPorts", "Healthcheck", "OnBuild"];

/// The empty archive: 1,024 zeros.
pub(crate) const EMPTY_ARCHIVE: &[u8] = &[0; 1024];

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Above 4 MiB.
    #[error("document is larger than 4 MiB")]
    TooLarge,
    /// Duplicate keys and the like.
    #[error(transparent)]
    Ambiguous(#[from] AmbiguousJson),
    /// It does not match its type.
    #[error("document does not match its media type")]
    Form(#[source] serde_json::Error),
    /// `mediaType`, `Content-Type` and content do not agree (CVE-2021-41190).
    #[error("document is ambiguous: its fields belong to two media types")]
    Confused,
    /// A type that is no image: an artifact, schema 1, a Helm chart.
    #[error("media type '{0}' is not an image")]
    UnknownType(String),
    /// More than 500 layers, or more than 10,000 entries of an index.
    #[error("document lists {count} {what}; the limit is {most}")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// The number of entries.
        count: usize,
        /// The most.
        most: usize,
    },
    /// An index of an index of an index of an index.
    #[error("indexes are nested too deeply")]
    TooDeep,
    /// A digest that is not sha256.
    #[error("invalid digest in the document")]
    Digest(#[from] ParseDigestError),
    /// Execution parameters that are not UTF-8.
    #[error("{0} of the configuration is not UTF-8")]
    NotText(&'static str),
    /// The index has nothing for this machine, or the image is for another one.
    #[error("image has no variant for {0}")]
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

/// A document of a known type.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Index),
    Manifest(Manifest),
}

/// The used part of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    /// Lowest first; never empty, for an image without layers has the empty one.
    pub(crate) layers: Vec<Blob>,
}

/// The used part of a configuration.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) parsed: ConfigDocument,
    /// Lowest first; as many as the manifest has.
    pub(crate) diff_ids: Vec<Digest>,
}

impl Configuration {
    /// Checks that the image is not for another machine, by its own configuration.
    ///
    /// # Errors
    /// [`ManifestError::Platform`].
    pub(crate) fn check_platform(&self) -> Result<(), ManifestError> {
        let ConfigDocument { os, architecture, .. } = &self.parsed;
        platform::fit(os, architecture, "").map(drop).ok_or_else(|| ManifestError::Platform(platform::host()))
    }
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

/// Determines the type of a document and parses it. `content_type` is what the registry, or the
/// descriptor that led here, called it.
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Document, ManifestError> {
    if bytes.len() > MAX_DOCUMENT {
        return Err(ManifestError::TooLarge);
    }
    let bytes = &*json::tidy(bytes);
    json::check(bytes, FIELDS, &["annotations"])?;
    let probe: Probe = document::read(bytes).map_err(ManifestError::Form)?;
    if probe.schema_version == Some(1) || probe.fs_layers.is_some() {
        return Err(ManifestError::UnknownType("schema 1".to_owned()));
    }
    // Some registries serve these with a generic type.
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
            let index: Index = document::read(bytes).map_err(ManifestError::Form)?;
            let count = index.manifests.len();
            if count > MAX_INDEX_ENTRIES {
                return Err(ManifestError::TooLong { what: "images", count, most: MAX_INDEX_ENTRIES });
            }
            Ok(Document::Index(index))
        }
        Kind::Manifest => {
            let manifest: ManifestDocument = document::read(bytes).map_err(ManifestError::Form)?;
            let count = manifest.layers.len();
            if count > MAX_LAYERS {
                return Err(ManifestError::TooLong { what: "layers", count, most: MAX_LAYERS });
            }
            let config_type = manifest.config.media_type.as_str();
            if !matches!(
                config_type,
                "application/vnd.oci.image.config.v1+json"
                    | "application/vnd.docker.container.image.v1+json"
                    | "application/octet-stream"
                    | ""
            ) {
                return Err(ManifestError::UnknownType(crate::unpack::printable(config_type.as_bytes())));
            }
            let mut layers = manifest.layers.iter().map(blob).collect::<Result<Vec<_>, _>>()?;
            if layers.is_empty() {
                layers.push(Blob::of(EMPTY_ARCHIVE));
            }
            Ok(Document::Manifest(Manifest { config: blob(&manifest.config)?, layers }))
        }
    }
}

/// Parses a configuration and compares it with the number of layers of its manifest.
pub(crate) fn parse_config(bytes: &[u8], layers: usize) -> Result<Configuration, ManifestError> {
    if bytes.len() > MAX_DOCUMENT {
        return Err(ManifestError::TooLarge);
    }
    let text = &*json::tidy(bytes);
    json::check(text, CONFIG_FIELDS, CONFIG_FREE)?;
    let parsed: ConfigDocument = document::read(text).map_err(ManifestError::Form)?;
    if text != bytes {
        check_text(&parsed.config)?;
    }
    let mut diff_ids =
        parsed.rootfs.diff_ids.iter().map(|id| Digest::parse(id)).collect::<Result<Vec<_>, _>>()?;
    // An image without layers: its program comes from a mount. It gets the empty layer, so that
    // there is something to mount.
    if diff_ids.is_empty() && layers == 1 {
        diff_ids.push(Digest::of(EMPTY_ARCHIVE));
    }
    if diff_ids.len() != layers {
        return Err(ManifestError::LayerCount { diff_ids: diff_ids.len(), layers });
    }
    Ok(Configuration { parsed, diff_ids })
}

/// A replacement character in an execution parameter may stand for bytes that were not text:
/// another program or another user.
fn check_text(config: &Execution) -> Result<(), ManifestError> {
    let one = std::slice::from_ref;
    for (field, texts) in [
        ("Entrypoint", &config.entrypoint[..]),
        ("Cmd", &config.cmd),
        ("Env", &config.env),
        ("WorkingDir", one(&config.working_dir)),
        ("User", one(&config.user)),
        ("StopSignal", one(&config.stop_signal)),
        ("Volumes", &config.volumes.0),
    ] {
        if texts.iter().any(|text| text.contains('\u{fffd}')) {
            return Err(ManifestError::NotText(field));
        }
    }
    Ok(())
}

/// The entry chosen from an index.
#[derive(Debug)]
pub(crate) struct Selected {
    pub(crate) blob: Blob,
    pub(crate) media_type: String,
    /// The index says that it is for this machine. The image's own platform is ignored then: people
    /// correct the index.
    pub(crate) is_for_this_machine: bool,
}

/// The entry of an index that fits this machine best.
pub(crate) fn select(index: &Index) -> Result<Selected, ManifestError> {
    let mut best: Option<(platform::Fit, &Descriptor)> = None;
    for descriptor in &index.manifests {
        // An entry without a platform may be the only image of a layout; anything that says its
        // platform is better.
        let said = descriptor.platform.clone().unwrap_or_default();
        // The first of equals counts (image-spec, image-index.md).
        if let Some(fit) = platform::fit(&said.os, &said.architecture, &said.variant)
            && kind_of(&descriptor.media_type).is_ok()
            && best.is_none_or(|(earlier, _)| fit > earlier)
        {
            best = Some((fit, descriptor));
        }
    }
    let (fit, descriptor) = best.ok_or_else(|| ManifestError::Platform(platform::host()))?;
    Ok(Selected {
        blob: blob(descriptor)?,
        media_type: descriptor.media_type.clone(),
        is_for_this_machine: fit > platform::Fit::Unsaid,
    })
}

impl Blob {
    /// Of content that is at hand.
    pub(crate) fn of(content: &[u8]) -> Self {
        Self { digest: Digest::of(content), size: content.len() as u64 }
    }
}

fn blob(descriptor: &Descriptor) -> Result<Blob, ManifestError> {
    Ok(Blob { digest: Digest::parse(&descriptor.digest)?, size: descriptor.size })
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
        let host_architecture = platform::host_architecture;
        let other = if host_architecture() == "s390x" { "arm" } else { "s390x" };
        let here = host_architecture();
        let size_of = |entries: &[(&str, &str)]| match parse(index(entries).as_bytes(), None).unwrap() {
            Document::Index(index) => select(&index).map(|found| found.blob.size).ok(),
            Document::Manifest(_) => None,
        };
        assert_eq!(size_of(&[(other, ""), (here, ""), (here, "")]), Some(1));
        assert_eq!(size_of(&[(other, ""), ("unknown", "")]), None);
        assert_eq!(size_of(&[(here, r#","variant":"v99""#), (here, "")]), Some(1));
        assert_eq!(size_of(&[]), None);
    }

    #[test]
    fn an_index_is_read_by_all_names_of_this_machine() {
        let here = platform::host_architecture();
        let synonym = match here {
            "amd64" => "x86_64",
            "arm64" => "aarch64",
            other => other,
        };
        let entry = |platform: &str| {
            let digest = format!("sha256:{HEX}");
            format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{digest}","size":1{platform}}}"#)
        };
        for (said, fits) in [
            (String::new(), Some(false)),
            (r#","platform":null"#.into(), Some(false)),
            (r#","platform":{}"#.into(), Some(false)),
            (r#","platform":{"os":"","architecture":""}"#.into(), Some(false)),
            (r#","platform":{"os":"linux"}"#.into(), Some(false)),
            (format!(r#","platform":{{"os":"linux","architecture":"{here}"}}"#), Some(true)),
            (format!(r#","platform":{{"os":null,"architecture":"{here}","features":[1]}}"#), Some(true)),
            (format!(r#","platform":{{"os":"linux","architecture":"{synonym}"}}"#), Some(true)),
            (r#","platform":{"os":"windows","architecture":"amd64"}"#.into(), None),
            (r#","platform":{"os":"unknown","architecture":"unknown"}"#.into(), None),
        ] {
            let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entry(&said));
            let Document::Index(index) = parse(text.as_bytes(), None).unwrap() else { panic!("{said}") };
            assert_eq!(select(&index).ok().map(|found| found.is_for_this_machine), fits, "{said}");
        }
        // What is of no use here may be of any form.
        let odd = entry("").replace("sha256", "sha512");
        let text = format!(
            r#"{{"manifests":[{odd},{}]}}"#,
            entry(&format!(r#","platform":{{"os":"linux","architecture":"{here}"}}"#))
        );
        let Document::Index(index) = parse(text.as_bytes(), None).unwrap() else { panic!() };
        assert!(select(&index).unwrap().is_for_this_machine);
    }

    #[test]
    fn an_image_without_layers_has_the_empty_one() {
        let empty =
            Digest::parse("sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef").unwrap();
        let good = manifest("");
        for layers in ["\"layers\":[]", "\"layers\":null", "\"other\":1"] {
            let text = good.replace("\"layers\":[]", layers);
            let Document::Manifest(found) = parse(text.as_bytes(), None).unwrap() else { panic!("{layers}") };
            assert_eq!(found.layers, [Blob { digest: empty, size: 1024 }], "{layers}");
        }
        for config in [
            "{}",
            r#"{"rootfs":null}"#,
            r#"{"rootfs":{}}"#,
            r#"{"rootfs":{"type":"layers","diff_ids":null}}"#,
            r#"{"rootfs":{"diff_ids":[]},"config":null,"os":""}"#,
        ] {
            assert_eq!(parse_config(config.as_bytes(), 1).unwrap().diff_ids, [empty], "{config}");
            assert!(matches!(parse_config(config.as_bytes(), 2), Err(ManifestError::LayerCount { .. })));
        }
    }

    #[test]
    fn a_configuration_must_fit_its_manifest_and_machine() {
        let config = |os: &str, arch: &str| {
            format!(
                r#"{{{os}{arch}"rootfs":{{"type":"layers","diff_ids":["sha256:{HEX}"]}},
                   "config":{{"Env":null,"Labels":{{"OS":"x"}},"Volumes":{{"/v":{{}}}}}}}}"#
            )
        };
        let here = platform::host_architecture();
        let architecture = |name: &str| format!(r#""architecture":"{name}","#);
        let linux = r#""os":"linux","#;
        let good = config(linux, &architecture(here));
        assert!(parse_config(good.as_bytes(), 1).is_ok());
        assert!(matches!(parse_config(good.as_bytes(), 2), Err(ManifestError::LayerCount { .. })));
        for (os, arch, fine) in [
            (linux, architecture(here), true),
            ("", String::new(), true),
            (r#""os":"","#, architecture(""), true),
            (r#""os":null,"#, architecture(here), true),
            (r#""os":"Linux","#, architecture(&here.to_uppercase()), true),
            (r#""os":"windows","#, architecture(here), false),
            (linux, architecture("mips"), false),
        ] {
            let parsed = parse_config(config(os, &arch).as_bytes(), 1).unwrap();
            assert_eq!(parsed.check_platform().is_ok(), fine, "{os} {arch}");
        }
    }

    #[test]
    fn only_what_decides_can_make_a_configuration_be_refused() {
        let config = |inner: &str, outer: &str| {
            let rootfs = format!(r#""rootfs":{{"diff_ids":["sha256:{HEX}"]}}"#);
            [b"{\"config\":{", inner.as_bytes(), b"}", outer.as_bytes(), b",", rootfs.as_bytes(), b"}"]
                .concat()
        };
        let byte = |mut text: Vec<u8>| {
            // A byte of Latin-1 where the text has a question mark.
            for byte in &mut text {
                if *byte == b'?' {
                    *byte = 0xe9;
                }
            }
            text
        };
        for fine in [
            config(
                r#""Labels":{"a":null,"b":"?","a":"2","LABELS":"\ud800"}"#,
                r#","history":[{"x":1,"x":"?"}]"#,
            ),
            config(
                r#""ExposedPorts":{"80":null,"80":1},"Volumes":{"/v":null,"/v":{}}"#,
                r#","author":"?","author":1"#,
            ),
            config(
                r#""OnBuild":["?"],"Healthcheck":7,"ArgsEscaped":null"#,
                r#","container_config":{"cmd":1,"Cmd":2}"#,
            ),
        ] {
            let fine = byte(fine);
            assert!(parse_config(&fine, 1).is_ok(), "{}", fine.escape_ascii());
        }
        for bad in [
            config(r#""Cmd":["a"],"Cmd":["b"]"#, ""),
            config(r#""cmd":["a"]"#, ""),
            config(r#""Cmd":["?"]"#, ""),
            config(r#""Env":["A=?"]"#, ""),
            config(r#""User":"?""#, ""),
            config(r#""Volumes":{"/?":{}}"#, ""),
            config(r#""User":"a","USER":"b""#, ""),
            config("", r#","config":{}"#),
            config("", r#","rootfs":{}"#),
        ] {
            let bad = byte(bad);
            assert!(parse_config(&bad, 1).is_err(), "{}", bad.escape_ascii());
        }
        // A replacement character that was in the text is kept.
        let written = config("\"Env\":[\"A=\u{fffd}\"]", "");
        assert!(parse_config(&written, 1).is_ok());
    }
}
