//! `berth import`: imports images from an archive or a directory.
//!
//! The daemon reads the file itself: it runs on this machine. For a daemon with a different view of
//! the file system, or for an archive on standard input, the bytes are sent over the socket.

use std::io;
use std::path::{Path, PathBuf};

use berth_api::MAX_CHUNK_BYTES;
use berth_api::v1::import_event::Event;
use berth_api::v1::import_request::Step;
use berth_api::v1::import_start::Source;
use berth_api::v1::{ImportRequest, ImportStart, ImportUpload, ImportedImage};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::args::{ImportArgs, is_standard_input};
use crate::daemon::{CallError, Daemon, answer};
use crate::error::Error;
use crate::names::short_id;
use crate::output;
use crate::progress::ArchiveBar;

/// Chunks that wait for the daemon: enough for reading and sending to overlap.
const CHUNKS_UNDERWAY: usize = 2;

/// Why an import failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    /// The archive or directory cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The path as given.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A directory cannot be uploaded.
    #[error("{0} is a directory, and only an archive can be uploaded; pack it with tar, or omit --upload")]
    Directory(PathBuf),
    /// The path is not UTF-8, which the protocol requires.
    #[error("the path {0} is not UTF-8 and cannot be sent to the daemon; use --upload")]
    PathEncoding(PathBuf),
    /// The call succeeded without naming an image.
    #[error("cannot import {0}: the daemon found no image in it")]
    NoImage(PathBuf),
}

/// Imports and prints an id and a name for each image.
///
/// # Errors
/// When the source cannot be read, or the daemon rejects it.
pub(crate) async fn import(daemon: &Daemon, args: ImportArgs) -> Result<(), Error> {
    let images = bring_in(daemon, args).await?;
    let lines: String = images.iter().map(line_of).collect();
    Ok(output::text(&lines)?)
}

/// Imports and returns the images, at least one.
async fn bring_in(daemon: &Daemon, args: ImportArgs) -> Result<Vec<ImportedImage>, Error> {
    let act = format!("import {}", args.source.display());
    let (sender, requests) = mpsc::channel(CHUNKS_UNDERWAY);
    let (source, archive) = source_of(&args).await?;
    let start = ImportStart { name: args.name.unwrap_or_default(), source: Some(source) };
    let bar = ArchiveBar::new();
    let feed = feed(start, archive, &args.source, sender);
    let listen = async {
        let mut daemon = daemon.own.clone();
        let mut events = answer(act.as_str(), daemon.import(ReceiverStream::new(requests))).await?;
        let mut images = Vec::new();
        loop {
            let next = events.message().await;
            let next = next.map_err(|status| CallError { act: act.clone(), refusal: status.into() })?;
            let Some(event) = next else { return Ok::<_, Error>(images) };
            match event.event {
                Some(Event::Progress(progress)) => bar.show(&progress),
                Some(Event::Images(imported)) => images.extend(imported.images),
                // From a newer daemon.
                None => {}
            }
        }
    };
    // A failed read cancels the call. When the daemon refuses, the feed ends, as nothing takes its
    // chunks.
    let fed_and_heard = tokio::try_join!(feed, listen);
    drop(bar);
    let ((), images) = fed_and_heard?;
    if images.is_empty() {
        return Err(ImportError::NoImage(args.source).into());
    }
    Ok(images)
}

/// An archive that is uploaded.
type Archive = Box<dyn AsyncRead + Send + Unpin>;

async fn source_of(args: &ImportArgs) -> Result<(Source, Option<Archive>), ImportError> {
    let path = args.source.as_path();
    let failed = |source| ImportError::Read { path: path.to_owned(), source };
    if is_standard_input(path.as_os_str()) {
        return Ok((Source::Upload(ImportUpload { size_bytes: 0 }), Some(Box::new(tokio::io::stdin()))));
    }
    if !args.upload {
        let absolute = std::fs::canonicalize(path).map_err(failed)?;
        let text = absolute.to_str().ok_or_else(|| ImportError::PathEncoding(path.to_owned()))?;
        return Ok((Source::Path(text.to_owned()), None));
    }
    let file = File::open(path).await.map_err(failed)?;
    let metadata = file.metadata().await.map_err(failed)?;
    if metadata.is_dir() {
        return Err(ImportError::Directory(path.to_owned()));
    }
    Ok((Source::Upload(ImportUpload { size_bytes: metadata.len() }), Some(Box::new(file))))
}

/// Sends the start, then the archive in chunks if there is one. Ends early when the receiver is
/// gone: the daemon has answered then, and the answer says why.
async fn feed(
    start: ImportStart,
    archive: Option<Archive>,
    path: &Path,
    requests: mpsc::Sender<ImportRequest>,
) -> Result<(), Error> {
    let send = async |step| requests.send(ImportRequest { step: Some(step) }).await.is_ok();
    if !send(Step::Start(start)).await {
        return Ok(());
    }
    let Some(mut archive) = archive else { return Ok(()) };
    loop {
        let mut chunk = Vec::with_capacity(MAX_CHUNK_BYTES);
        // The limit keeps the chunk from growing beyond its capacity.
        let read = (&mut archive).take(MAX_CHUNK_BYTES as u64).read_to_end(&mut chunk).await;
        let length = read.map_err(|source| ImportError::Read { path: path.to_owned(), source })?;
        if length == 0 || !send(Step::Chunk(chunk)).await {
            return Ok(());
        }
    }
}

fn line_of(image: &ImportedImage) -> String {
    let names = if image.names.is_empty() { "<none>".to_owned() } else { image.names.join(" ") };
    format!("{} {}\n", short_id(&image.id), crate::table::printable(&names))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use berth_api::v1::{ImportEvent, ImportProgress, ImportedImages};
    use tonic::{Code, Status};

    use super::*;
    use crate::fake_daemon::{FakeDaemon, Script};

    fn args(source: &Path, upload: bool) -> ImportArgs {
        ImportArgs { name: None, upload, source: source.to_owned() }
    }

    #[tokio::test]
    async fn a_file_is_named_to_the_daemon_by_its_whole_path() {
        let (source, archive) =
            source_of(&args(Path::new("/proc/self/../../etc/passwd"), false)).await.unwrap();
        assert_eq!(source, Source::Path("/etc/passwd".into()));
        assert!(archive.is_none());
    }

    #[tokio::test]
    async fn an_upload_is_cut_into_chunks_and_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.tar");
        let bytes: Vec<u8> = (0..2 * MAX_CHUNK_BYTES + 5).map(|at| (at % 251).to_le_bytes()[0]).collect();
        std::fs::write(&path, &bytes).unwrap();
        let (source, archive) = source_of(&args(&path, true)).await.unwrap();
        let (sender, mut requests) = mpsc::channel(64);
        let start = ImportStart { name: "x".into(), source: Some(source) };
        feed(start.clone(), archive, &path, sender).await.unwrap();
        let mut sent = Vec::new();
        while let Some(request) = requests.recv().await {
            sent.push(request.step.unwrap());
        }
        assert_eq!(sent.remove(0), Step::Start(start));
        let chunks: Vec<_> = sent
            .into_iter()
            .map(|step| match step {
                Step::Chunk(chunk) => chunk,
                other => panic!("not a chunk: {other:?}"),
            })
            .collect();
        assert_eq!(chunks.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, 5]);
        assert!(chunks.concat() == bytes);
    }

    #[tokio::test]
    async fn sources_that_cannot_be_sent_are_refused() {
        let missing = source_of(&args(Path::new("/nonexistent"), false)).await;
        assert!(matches!(missing, Err(ImportError::Read { .. })));
        assert!(matches!(source_of(&args(Path::new("/etc"), true)).await, Err(ImportError::Directory(_))));
    }

    fn events() -> Vec<Result<ImportEvent, Status>> {
        let image = ImportedImage { id: "sha256:1".into(), names: vec!["a:1".into()] };
        [
            Event::Progress(ImportProgress { bytes_done: 5, bytes_total: 5 }),
            Event::Images(ImportedImages { images: vec![image] }),
        ]
        .map(|event| Ok(ImportEvent { event: Some(event) }))
        .into()
    }

    #[tokio::test]
    async fn an_uploaded_archive_arrives_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes = vec![7; MAX_CHUNK_BYTES * 3 + 1];
        std::fs::write(file.path(), &bytes).unwrap();
        let script = Script { import: events(), ..Script::default() };
        let imported = Arc::clone(&script.imported);
        let fake = FakeDaemon::start(script).await;
        let images = bring_in(&fake.daemon, args(file.path(), true)).await.unwrap();
        assert_eq!(images.iter().map(line_of).collect::<String>(), "1 a:1\n");
        let steps: Vec<_> = imported.lock().unwrap().drain(..).filter_map(|request| request.step).collect();
        let sizes = steps.iter().map(|step| match step {
            Step::Start(_) => 0,
            Step::Chunk(chunk) => chunk.len(),
        });
        assert_eq!(sizes.sum::<usize>(), bytes.len());
        assert!(matches!(steps.first(), Some(Step::Start(_))), "the start comes first");
    }

    #[tokio::test]
    async fn a_refused_import_ends_with_the_daemons_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // More than fits into what is underway, so that the feed is stuck when the refusal comes.
        std::fs::write(file.path(), vec![7; MAX_CHUNK_BYTES * 16]).unwrap();
        let import_events = vec![Err(Status::failed_precondition("no image in it"))];
        let fake = FakeDaemon::start(Script { import: import_events, ..Script::default() }).await;
        let error = bring_in(&fake.daemon, args(file.path(), true)).await.unwrap_err();
        let Error::Call(error) = error else { panic!("not a refused call: {error:?}") };
        assert_eq!(
            (error.refusal.code, error.refusal.to_string().as_str()),
            (Code::FailedPrecondition, "no image in it")
        );
    }

    #[tokio::test]
    async fn an_import_without_an_image_is_no_success() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fake = FakeDaemon::start(Script::default()).await;
        let error = bring_in(&fake.daemon, args(file.path(), false)).await.unwrap_err();
        assert!(matches!(error, Error::Import(ImportError::NoImage(_))), "{error:?}");
    }
}
