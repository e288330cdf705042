//! Images from files: an OCI image layout, as a directory or a tar file, and what `docker save`
//! writes.
//!
//! The same layers, checks and commit as for a pull; only where the bytes come from differs. A
//! directory is read through [`Layout`] and a tar file through [`ArchiveFile`], so that the caller
//! decides who waits for them; links in a hostile layout have to lead nowhere.
//! A tar file is indexed once and its members are read in place.
//!
//! Formats: OCI image-spec 1.1, image-layout.md; the `manifest.json` of `docker save` (moby,
//! image/spec/v1.2.md, "Combined Image JSON + Filesystem Changeset Format"). Archives of current
//! docker have both; `manifest.json` is read then, for it has the full names.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_sys::beneath::Root;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::assemble::{Reporter, acquire_all, finish};
use super::commit::{ContentError, Names, NewImage};
use super::staging::Fetch;
use super::{Inner, StoreError};
use crate::document::Descriptor;
use crate::layer::{self, LayerContent, LayerError};
use crate::manifest::{self, Blob, Document, EMPTY_ARCHIVE, MAX_DOCUMENT, MAX_NESTING, ManifestError};
use crate::platform;
use crate::turns::LayerInput;
use crate::unpack::archive::{Archive, ArchiveError, EntryKind};
use crate::unpack::{PathError, path};
use crate::{Digest, Image, LayerPhase, Progress, Reference};

/// Most members of an archive: images of 500 layers with their descriptions, many times over.
const MAX_MEMBERS: usize = 100_000;

/// Most images of one archive or layout.
const MAX_IMAGES: usize = 1000;

/// Links from member to member that are followed; old `docker save` has one.
const MAX_LINKS: usize = 8;

/// Full image name (containerd's annotation, also written by docker, nerdctl and buildkit).
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Name or just tag (OCI image-spec 1.1, annotations.md).
const OCI_REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A directory with an OCI image layout, in which links lead nowhere else.
pub trait Layout: fmt::Debug + Send + Sync {
    /// Whether a regular file of this name is in it.
    ///
    /// # Errors
    /// When that cannot be determined, or it is something else.
    fn has(&self, member: &Path) -> io::Result<bool>;

    /// Opens a regular file in it, for reading.
    ///
    /// # Errors
    /// Why it cannot; [`io::ErrorKind::NotFound`] when it is absent.
    fn open(&self, member: &Path) -> io::Result<Box<dyn Read + Send>>;
}

impl Layout for Root {
    fn has(&self, member: &Path) -> io::Result<bool> {
        match self.open_regular(member) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn open(&self, member: &Path) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(self.open_regular(member)?))
    }
}

/// A file that is read from any place on, several times, and by several threads.
pub trait ArchiveFile: fmt::Debug + Send + Sync {
    /// Its bytes from this one on.
    ///
    /// # Errors
    /// Why it cannot be read.
    fn read_from(&self, offset: u64) -> io::Result<Box<dyn Read + Send>>;
}

impl ArchiveFile for File {
    fn read_from(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(Window { file: self.try_clone()?, offset }))
    }
}

/// Where an import reads from.
#[derive(Debug)]
pub enum ImportSource {
    /// A directory.
    Layout(Arc<dyn Layout>),
    /// A tar file: an OCI image layout or what `docker save` writes. It may be packed by gzip or
    /// zstd.
    Archive(Arc<dyn ArchiveFile>),
}

impl ImportSource {
    /// The directory `path`, read by the threads that import it. They may wait forever if others
    /// can keep it locked.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn directory(path: &Path) -> io::Result<Self> {
        Ok(Self::Layout(Arc::new(Root::open(path)?)))
    }

    /// The tar file `file`, read in the same way.
    #[must_use]
    pub fn archive(file: File) -> Self {
        Self::Archive(Arc::new(file))
    }
}

/// Why an import failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The directory or file could not be read.
    #[error("cannot read {what}")]
    Read {
        /// Member or file, escaped.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The tar file is damaged.
    #[error("cannot read the archive")]
    Archive(#[source] ArchiveError),
    /// A member's path.
    #[error("member '{name}' of the archive is invalid")]
    Member {
        /// Escaped.
        name: String,
        /// What is wrong.
        #[source]
        source: PathError,
    },
    /// Neither of the two forms.
    #[error("neither an OCI image layout (index.json) nor a docker archive (manifest.json)")]
    UnknownForm,
    /// A member that the archive does not have in one piece.
    #[error("member '{0}' of the archive is a sparse file: write the archive without --sparse")]
    Sparse(String),
    /// Something that the index or manifest names is not there.
    #[error("'{0}' is missing")]
    Missing(String),
    /// A list that ought to be bounded is not.
    #[error("archive has too many entries")]
    TooLong,
    /// `manifest.json` is not what docker writes.
    #[error("manifest.json was not written by docker save")]
    DockerManifest(#[source] serde_json::Error),
    /// A name was given, but there are several images.
    #[error("cannot name the image: the archive has {0} images")]
    AmbiguousName(usize),
    /// The disk is full, or would go below the floor that must stay free.
    #[error("no space left for the image")]
    DiskFull(#[source] ContentError),
    /// The content is broken, hostile or not for this machine.
    #[error("image cannot be used")]
    Content(#[source] ContentError),
}

impl From<ContentError> for ImportError {
    fn from(error: ContentError) -> Self {
        if error.is_disk_full() { Self::DiskFull(error) } else { Self::Content(error) }
    }
}

impl From<ManifestError> for ImportError {
    fn from(error: ManifestError) -> Self {
        Self::Content(error.into())
    }
}

/// An image of the archive with its descriptions read and its layers found.
#[derive(Debug)]
struct Found {
    configuration: manifest::Configuration,
    raw_config: Vec<u8>,
    raw_manifest: Vec<u8>,
    layers: Vec<(LayerContent, Content)>,
    names: Vec<Names>,
}

/// A piece of content that can be read from any thread.
#[derive(Debug, Clone)]
enum Content {
    File(PathBuf, Arc<dyn Layout>),
    Member {
        file: Arc<dyn ArchiveFile>,
        offset: u64,
        size: u64,
    },
    /// The archive with nothing in it, which images without layers get.
    Empty,
}

pub(super) async fn import(
    inner: &Arc<Inner>,
    source: ImportSource,
    name: Option<Reference>,
    progress: Arc<dyn Progress>,
) -> Result<Vec<Image>, ImportError> {
    let opening = Arc::clone(inner);
    let found = tokio::task::spawn_blocking(move || {
        let source = Source::open(source, &opening)?;
        source.images()
    });
    let mut found = found.await.map_err(|_| ContentError::Store(StoreError::BrokenOff))??;
    if let Some(name) = name {
        match found.as_mut_slice() {
            [only] => only.names = names_of(&name, None),
            several => return Err(ImportError::AmbiguousName(several.len())),
        }
    }
    let mut images = Vec::new();
    for image in found {
        let contents: Vec<LayerContent> = image.layers.iter().map(|(content, _)| *content).collect();
        let sources: Vec<Content> = image.layers.into_iter().map(|(_, source)| source).collect();
        let fetch = |index: usize, _: LayerContent, report: Reporter| FromArchive {
            content: sources.get(index).cloned(),
            report,
        };
        let layers = acquire_all(inner, &contents, &progress, fetch, |_, _| false).await?;
        let new = NewImage {
            configuration: image.configuration,
            raw_config: image.raw_config,
            raw_manifest: image.raw_manifest,
            layers,
            names: image.names,
        };
        images.push(finish(inner, new, &progress).await?);
    }
    Ok(images)
}

struct FromArchive {
    content: Option<Content>,
    report: Reporter,
}

impl Fetch for FromArchive {
    type Input = Counted;

    fn start(self) -> (Counted, impl Future<Output = Result<(), ContentError>> + Send) {
        self.report.say(LayerPhase::Fetching, 0);
        (
            Counted { content: self.content, reader: None, done: 0, report: self.report },
            std::future::ready(Ok(())),
        )
    }
}

/// Reads content and tells how far it came. Opened at the first read, on the thread that reads.
struct Counted {
    content: Option<Content>,
    reader: Option<Box<dyn Read + Send>>,
    done: u64,
    report: Reporter,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(content) = self.content.take() {
            self.reader = Some(content.open()?);
        }
        let Some(reader) = &mut self.reader else { return Err(io::ErrorKind::NotFound.into()) };
        let length = reader.read(buffer)?;
        self.done += length as u64;
        self.report.say(LayerPhase::Fetching, self.done);
        Ok(length)
    }
}

impl LayerInput for Counted {
    fn may_stall(&self) -> bool {
        true
    }
}

impl Content {
    fn open(&self) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::File(path, layout) => layout.open(path)?,
            Self::Member { file, offset, size } => Box::new(file.read_from(*offset)?.take(*size)),
            Self::Empty => Box::new(EMPTY_ARCHIVE),
        })
    }

    fn read_all(&self, limit: usize, what: &str) -> Result<Vec<u8>, ImportError> {
        let mut bytes = Vec::new();
        self.open()
            .and_then(|reader| reader.take(limit as u64 + 1).read_to_end(&mut bytes))
            .map_err(|source| ImportError::Read { what: shown(what), source })?;
        if bytes.len() > limit { Err(ManifestError::TooLarge.into()) } else { Ok(bytes) }
    }
}

/// A file from some place on, read without its position, so that several can be read side by side.
struct Window {
    file: File,
    offset: u64,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read_at(buffer, self.offset)?;
        self.offset += length as u64;
        Ok(length)
    }
}

/// Something with named members.
enum Source {
    Layout(Arc<dyn Layout>),
    Archive(HashMap<PathBuf, Member>, Arc<dyn ArchiveFile>),
}

#[derive(Debug, Clone)]
enum Member {
    File { offset: u64, size: u64 },
    Link(PathBuf),
}

/// One entry of docker's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Source {
    fn open(source: ImportSource, inner: &Inner) -> Result<Self, ImportError> {
        match source {
            ImportSource::Layout(layout) => Ok(Self::Layout(layout)),
            ImportSource::Archive(file) => {
                let failed = |source| ImportError::Read { what: "archive".to_owned(), source };
                let mut reader = file.read_from(0).map_err(failed)?;
                let mut first = Vec::new();
                reader.by_ref().take(4).read_to_end(&mut first).map_err(failed)?;
                if first.is_empty() {
                    return Err(ImportError::UnknownForm);
                }
                let is_packed = first.first_chunk().is_some_and(|magic| is_packed(*magic));
                let whole = io::Cursor::new(first).chain(reader);
                if !is_packed {
                    return Ok(Self::Archive(index_members(whole)?, file));
                }
                let file: Arc<dyn ArchiveFile> = Arc::new(unpacked(whole, inner)?);
                let whole = file.read_from(0).map_err(failed)?;
                Ok(Self::Archive(index_members(whole)?, file))
            }
        }
    }

    fn images(&self) -> Result<Vec<Found>, ImportError> {
        if let Some(content) = self.find("manifest.json")? {
            return self.docker_images(&content.read_all(MAX_DOCUMENT, "manifest.json")?);
        }
        match self.find("index.json")? {
            Some(content) => self.layout_images(&content.read_all(MAX_DOCUMENT, "index.json")?),
            None => Err(ImportError::UnknownForm),
        }
    }

    fn find(&self, name: &str) -> Result<Option<Content>, ImportError> {
        let clean = |text: &[u8]| {
            path::clean(text)
                .map_err(|source| ImportError::Member { name: crate::unpack::printable(text), source })
        };
        let mut member = clean(name.as_bytes())?;
        match self {
            Self::Layout(layout) => match layout.has(&member) {
                Ok(is_there) => Ok(is_there.then(|| Content::File(member, Arc::clone(layout)))),
                Err(source) => Err(ImportError::Read { what: shown(name), source }),
            },
            Self::Archive(members, file) => {
                for _ in 0..=MAX_LINKS {
                    match members.get(&member) {
                        None => return Ok(None),
                        Some(Member::File { offset, size }) => {
                            let file = Arc::clone(file);
                            return Ok(Some(Content::Member { file, offset: *offset, size: *size }));
                        }
                        Some(Member::Link(target)) => member.clone_from(target),
                    }
                }
                Ok(None)
            }
        }
    }

    fn require(&self, name: &str) -> Result<Content, ImportError> {
        self.find(name)?.ok_or_else(|| ImportError::Missing(shown(name)))
    }

    fn blob(&self, digest: Digest) -> Result<Content, ImportError> {
        if digest == Digest::of(EMPTY_ARCHIVE) {
            return Ok(Content::Empty);
        }
        self.require(&format!("blobs/sha256/{}", digest.hex()))
    }

    /// A description, held against its digest.
    fn document(&self, blob: Blob) -> Result<Vec<u8>, ImportError> {
        let bytes = self.blob(blob.digest)?.read_all(MAX_DOCUMENT, &blob.digest.to_string())?;
        let actual = Digest::of(&bytes);
        if actual != blob.digest {
            return Err(ContentError::DigestMismatch { expected: blob.digest, actual }.into());
        }
        Ok(bytes)
    }

    fn layout_images(&self, index: &[u8]) -> Result<Vec<Found>, ImportError> {
        let Document::Index(index) = manifest::parse(index, None)? else {
            return Err(ImportError::UnknownForm);
        };
        if index.manifests.len() > MAX_IMAGES {
            return Err(ImportError::TooLong);
        }
        let mut found: BTreeMap<Digest, Found> = BTreeMap::new();
        for descriptor in &index.manifests {
            let digest = Digest::parse(&descriptor.digest).map_err(ManifestError::from)?;
            let notes = &descriptor.annotations.0;
            // A bare tag, as `org.opencontainers.image.ref.name` often is, names no repository.
            let names = notes
                .get(CONTAINERD_NAME)
                .or_else(|| notes.get(OCI_REF_NAME).filter(|name| name.contains(['/', ':'])))
                .and_then(|name| Reference::parse(name).ok())
                .map(|name| names_of(&name, Some(digest)))
                .unwrap_or_default();
            let image = match self.layout_image(descriptor) {
                // A layout may hold images for several machines side by side; only if none fits,
                // that is an error.
                Err(ImportError::Content(ContentError::Manifest(ManifestError::Platform(_))))
                    if index.manifests.len() > 1 =>
                {
                    continue;
                }
                image => image?,
            };
            let id = Digest::of(&image.raw_config);
            found.entry(id).or_insert(image).names.extend(names);
        }
        if found.is_empty() {
            return Err(ManifestError::Platform("this machine".to_owned()).into());
        }
        Ok(found.into_values().collect())
    }

    fn layout_image(&self, descriptor: &Descriptor) -> Result<Found, ImportError> {
        let digest = Digest::parse(&descriptor.digest).map_err(ManifestError::from)?;
        let said = descriptor.platform.clone().unwrap_or_default();
        let fit = platform::fit(&said.os, &said.architecture, &said.variant)
            .ok_or_else(|| ManifestError::Platform(platform::host()))?;
        let mut blob = Blob { digest, size: descriptor.size };
        let mut media_type = descriptor.media_type.clone();
        let mut is_for_this_machine = fit > platform::Fit::Unsaid;
        for _ in 0..=MAX_NESTING {
            let bytes = self.document(blob)?;
            match manifest::parse(&bytes, Some(&media_type))? {
                Document::Index(index) => {
                    let selected = manifest::select(&index)?;
                    (blob, media_type) = (selected.blob, selected.media_type);
                    is_for_this_machine |= selected.is_for_this_machine;
                }
                Document::Manifest(manifest) => {
                    let raw_config = self.document(manifest.config)?;
                    let configuration = manifest::parse_config(&raw_config, manifest.layers.len())?;
                    if !is_for_this_machine {
                        configuration.check_platform()?;
                    }
                    let layers = manifest
                        .layers
                        .iter()
                        .zip(&configuration.diff_ids)
                        .map(|(&blob, &diff_id)| {
                            Ok((LayerContent { blob, diff_id }, self.blob(blob.digest)?))
                        })
                        .collect::<Result<_, ImportError>>()?;
                    return Ok(Found {
                        configuration,
                        raw_config,
                        raw_manifest: bytes,
                        layers,
                        names: Vec::new(),
                    });
                }
            }
        }
        Err(ManifestError::TooDeep.into())
    }

    fn docker_images(&self, list: &[u8]) -> Result<Vec<Found>, ImportError> {
        let list: Vec<DockerImage> = serde_json::from_slice(list).map_err(ImportError::DockerManifest)?;
        if list.len() > MAX_IMAGES {
            return Err(ImportError::TooLong);
        }
        list.iter().map(|image| self.docker_image(image)).collect()
    }

    fn docker_image(&self, image: &DockerImage) -> Result<Found, ImportError> {
        let names = image.layers.as_deref().unwrap_or_default();
        let raw_config = self.require(&image.config)?.read_all(MAX_DOCUMENT, &image.config)?;
        let configuration = manifest::parse_config(&raw_config, names.len().max(1))?;
        configuration.check_platform()?;
        let mut contents = names
            .iter()
            .map(|name| Ok((name.as_str(), self.require(name)?)))
            .collect::<Result<Vec<_>, ImportError>>()?;
        if contents.is_empty() {
            contents.push(("the empty layer", Content::Empty));
        }
        let mut layers = Vec::new();
        for ((name, content), &diff_id) in contents.into_iter().zip(&configuration.diff_ids) {
            let (digest, size) =
                digest_of(&content).map_err(|source| ImportError::Read { what: shown(name), source })?;
            layers.push((LayerContent { blob: Blob { digest, size }, diff_id }, content));
        }
        let tags = image
            .repo_tags
            .iter()
            .flatten()
            .filter_map(|name| Reference::parse(name).ok())
            .flat_map(|name| names_of(&name, None))
            .collect();
        let raw_manifest = manifest_for(&raw_config, &layers);
        Ok(Found { configuration, raw_config, raw_manifest, layers, names: tags })
    }
}

/// gzip, zstd, and zstd's skippable frames (RFC 1952, RFC 8878).
fn is_packed(magic: [u8; 4]) -> bool {
    matches!(magic, [0x1f, 0x8b, _, _] | [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18])
}

/// The archive without its packing, in a file without a name beside the images: members are read in
/// any order, and several at a time. It may become as large as one image, and leaves as much free.
fn unpacked(packed: impl Read, inner: &Inner) -> Result<File, ImportError> {
    let budget = inner.budget();
    let failed = |source| ImportError::Read { what: "archive".to_owned(), source };
    let mut file = berth_sys::file::unnamed(&inner.root).map_err(failed)?;
    layer::decompress_to(BufReader::with_capacity(128 * 1024, packed), &mut file, &budget).map_err(
        |error| match error {
            LayerError::DiskFull | LayerError::Reserved(_) => {
                ImportError::DiskFull(ContentError::Archive(error))
            }
            error => ImportError::Content(ContentError::Archive(error)),
        },
    )?;
    Ok(file)
}

/// A docker archive has no manifest; the store keeps one for each image, so it gets the one that
/// its parts make.
fn manifest_for(raw_config: &[u8], layers: &[(LayerContent, Content)]) -> Vec<u8> {
    let layers: Vec<serde_json::Value> = layers
        .iter()
        .map(|(layer, _)| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": layer.blob.digest.to_string(),
                "size": layer.blob.size,
            })
        })
        .collect();
    serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(raw_config).to_string(),
            "size": raw_config.len(),
        },
        "layers": layers,
    })
    .to_string()
    .into_bytes()
}

fn digest_of(content: &Content) -> io::Result<(Digest, u64)> {
    let mut hasher = Sha256::new();
    let size = io::copy(&mut content.open()?, &mut hasher)?;
    Ok((Digest::from_hasher(hasher), size))
}

fn names_of(name: &Reference, digest: Option<Digest>) -> Vec<Names> {
    let tag = matches!(name.target(), crate::reference::Target::Tag(_)).then(|| name.to_string());
    vec![Names { tag, repo_digest: digest.map(|digest| name.with_digest(digest).to_string()) }]
}

fn index_members(file: impl Read) -> Result<HashMap<PathBuf, Member>, ImportError> {
    let mut archive = Archive::new(file);
    let mut members = HashMap::new();
    while let Some(entry) = archive.next_entry().map_err(ImportError::Archive)? {
        let member_error =
            |source| ImportError::Member { name: crate::unpack::printable(&entry.path), source };
        let name = path::clean(&entry.path).map_err(member_error)?;
        if members.len() == MAX_MEMBERS {
            return Err(ImportError::TooLong);
        }
        match entry.kind {
            EntryKind::Regular if entry.is_sparse => {
                return Err(ImportError::Sparse(crate::unpack::printable(&entry.path)));
            }
            EntryKind::Regular => {
                members.insert(name, Member::File { offset: archive.position(), size: entry.size });
            }
            EntryKind::HardLink => {
                members.insert(name, Member::Link(path::clean(&entry.link).map_err(member_error)?));
            }
            EntryKind::Symlink => {
                let target = join(name.parent().unwrap_or(Path::new("")), &entry.link);
                members.insert(name, Member::Link(target));
            }
            _ => {}
        }
    }
    Ok(members)
}

/// Where a symbolic link in `dir` of the archive leads, by its text alone: members are only looked
/// up by name.
fn join(dir: &Path, target: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let mut path = if target.starts_with(b"/") { PathBuf::new() } else { dir.to_owned() };
    for component in target.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => drop(path.pop()),
            name => path.push(std::ffi::OsStr::from_bytes(name)),
        }
    }
    path
}

fn shown(name: &str) -> String {
    crate::unpack::printable(name.as_bytes())
}
