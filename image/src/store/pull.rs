//! From a reference to a listed image.

use std::sync::Arc;

use bytes::Bytes;

use super::assemble::{Reporter, acquire_all, finish};
use super::commit::{self, ContentError, Names, NewImage};
use super::staging::Fetch;
use super::{Inner, blocking};
use crate::credentials::Credentials;
use crate::layer::LayerContent;
use crate::manifest::{self, Blob, Document, EMPTY_ARCHIVE, MAX_NESTING, Manifest, ManifestError};
use crate::pipe;
use crate::reference::{Reference, Target};
use crate::registry::{RegistryError, Session, Sink};
use crate::{Digest, Image, LayerPhase, Progress};

/// Why a pull failed. The message is fit for a pod's event: it holds no secret and no URL query.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// No registry host has it.
    #[error("{reference} was not found")]
    NotFound {
        /// The image reference.
        reference: String,
    },
    /// The registry wants other credentials, or any.
    #[error("not authorised to pull {reference}")]
    Unauthorized {
        /// The image reference.
        reference: String,
        /// What was refused.
        #[source]
        source: RegistryError,
    },
    /// No host of the registry could be talked to. CRI wants the status text to start with
    /// `RegistryUnavailable`.
    #[error("registry {registry} cannot be reached")]
    Unreachable {
        /// Domain of the reference.
        registry: String,
        /// What the last host said.
        #[source]
        source: RegistryError,
    },
    /// The registry answered something that makes no sense.
    #[error("cannot pull {reference}")]
    Registry {
        /// The image reference.
        reference: String,
        /// The cause.
        #[source]
        source: RegistryError,
    },
    /// Bytes came that are not those of the digest that they were asked by.
    #[error("content of {reference} does not match its digest")]
    DigestMismatch {
        /// The image reference.
        reference: String,
        /// Which content.
        #[source]
        source: ContentError,
    },
    /// The disk is full, or would go below the floor that must stay free.
    #[error("no space left for {reference}")]
    DiskFull {
        /// The image reference.
        reference: String,
        /// Where it ended.
        #[source]
        source: ContentError,
    },
    /// The image is broken, hostile or not for this machine.
    #[error("image {reference} cannot be used")]
    Content {
        /// The image reference.
        reference: String,
        /// The cause.
        #[source]
        source: ContentError,
    },
}

impl PullError {
    fn new(reference: &Reference, error: ContentError) -> Self {
        let name = reference.to_string();
        match error {
            ContentError::Registry(source) => match source {
                RegistryError::NotFound => Self::NotFound { reference: name },
                RegistryError::Unauthorized { .. } => Self::Unauthorized { reference: name, source },
                RegistryError::Unreachable { .. } => {
                    Self::Unreachable { registry: reference.domain().to_owned(), source }
                }
                RegistryError::DigestMismatch { expected, actual } => Self::DigestMismatch {
                    reference: name,
                    source: ContentError::DigestMismatch { expected, actual },
                },
                _ => Self::Registry { reference: name, source },
            },
            error if error.is_disk_full() => Self::DiskFull { reference: name, source: error },
            error if error.is_digest_mismatch() => Self::DigestMismatch { reference: name, source: error },
            error => Self::Content { reference: name, source: error },
        }
    }
}

pub(super) async fn pull(
    inner: &Arc<Inner>,
    reference: &Reference,
    credentials: &Credentials,
    progress: Arc<dyn Progress>,
) -> Result<Image, PullError> {
    pull_content(inner, reference, credentials, progress)
        .await
        .map_err(|error| PullError::new(reference, error))
}

async fn pull_content(
    inner: &Arc<Inner>,
    reference: &Reference,
    credentials: &Credentials,
    progress: Arc<dyn Progress>,
) -> Result<Image, ContentError> {
    let session = inner.policy().client.session(reference, credentials)?;
    let Resolved { manifest, raw_manifest, top, is_for_this_machine } =
        find_manifest(&session, reference.target()).await?;
    let tag = matches!(reference.target(), Target::Tag(_)).then(|| reference.to_string());
    let names = vec![Names { tag, repo_digest: Some(reference.with_digest(top).to_string()) }];

    let (known_inner, known_names, id) = (Arc::clone(inner), names.clone(), manifest.config.digest);
    let known_manifest = raw_manifest.clone();
    let naming = move || commit::name_existing(&known_inner, id, &known_manifest, &known_names);
    if let Some(image) = blocking(naming).await? {
        return Ok(image);
    }

    let raw_config = session.fetch_small(manifest.config, manifest::MAX_DOCUMENT).await?;
    let configuration = manifest::parse_config(&raw_config, manifest.layers.len())?;
    if !is_for_this_machine {
        configuration.check_platform()?;
    }
    let contents: Vec<LayerContent> = manifest
        .layers
        .iter()
        .zip(&configuration.diff_ids)
        .map(|(&blob, &diff_id)| LayerContent { blob, diff_id })
        .collect();
    let fetch = |_: usize, content: LayerContent, report: Reporter| FromRegistry {
        session: Arc::clone(&session),
        blob: content.blob,
        report,
    };
    let another_has = |content: LayerContent, error: &ContentError| match error {
        ContentError::Layer { source, .. } => {
            source.is_of_the_bytes() && session.distrust(content.blob.digest)
        }
        _ => false,
    };
    let layers = acquire_all(inner, &contents, &progress, fetch, another_has).await?;
    finish(inner, NewImage { configuration, raw_config, raw_manifest, layers, names }, &progress).await
}

struct FromRegistry {
    session: Arc<Session>,
    blob: Blob,
    report: Reporter,
}

/// Passes bytes on and tells how many.
struct ReportedPipe {
    writer: pipe::Writer,
    report: Reporter,
    done: u64,
}

impl Sink for ReportedPipe {
    async fn take(&mut self, bytes: Bytes) -> Result<(), RegistryError> {
        self.done += bytes.len() as u64;
        self.report.say(LayerPhase::Fetching, self.done);
        self.writer.write(bytes).await.map_err(|_| RegistryError::Unwanted)
    }
}

impl Fetch for FromRegistry {
    type Input = pipe::Reader;

    fn start(self) -> (pipe::Reader, impl Future<Output = Result<(), ContentError>> + Send) {
        let (writer, reader) = pipe::pipe();
        let filling = async move {
            self.report.say(LayerPhase::Fetching, 0);
            let mut sink = ReportedPipe { writer, report: self.report, done: 0 };
            // The empty archive need not be asked for, and for an image without layers no registry
            // has it.
            if self.blob == Blob::of(EMPTY_ARCHIVE) {
                if sink.take(Bytes::from_static(EMPTY_ARCHIVE)).await.is_ok() {
                    let _ = sink.writer.finish().await;
                }
                return Ok(());
            }
            match self.session.fetch_blob(self.blob, &mut sink).await {
                Ok(()) => drop(sink.writer.finish().await),
                // The reader is gone, and knows why.
                Err(RegistryError::Unwanted) => {}
                Err(error) => return Err(error.into()),
            }
            Ok(())
        };
        (reader, filling)
    }
}

/// What a reference leads to.
struct Resolved {
    manifest: Manifest,
    raw_manifest: Vec<u8>,
    /// Of what the reference itself points at: the index, where there is one.
    top: Digest,
    /// By the index.
    is_for_this_machine: bool,
}

/// Follows indexes to the manifest for this machine.
async fn find_manifest(session: &Session, target: &Target) -> Result<Resolved, ContentError> {
    let mut fetched = session.fetch_manifest(target).await?;
    let top = fetched.digest;
    let mut is_for_this_machine = false;
    for _ in 0..=MAX_NESTING {
        match manifest::parse(&fetched.bytes, fetched.content_type.as_deref())? {
            Document::Manifest(manifest) => {
                return Ok(Resolved { manifest, raw_manifest: fetched.bytes, top, is_for_this_machine });
            }
            Document::Index(index) => {
                let selected = manifest::select(&index)?;
                is_for_this_machine |= selected.is_for_this_machine;
                fetched = session.fetch_manifest(&Target::Digest(selected.blob.digest)).await?;
                if fetched.bytes.len() as u64 != selected.blob.size {
                    return Err(RegistryError::Size.into());
                }
                // What the index calls it counts, and what the registry calls it must not
                // contradict.
                manifest::parse(&fetched.bytes, fetched.content_type.as_deref())?;
                fetched.content_type = Some(selected.media_type);
            }
        }
    }
    Err(ManifestError::TooDeep.into())
}
