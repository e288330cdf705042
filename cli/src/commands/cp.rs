//! `berth cp`: files between this machine and a running container.
//!
//! Paths are resolved by descriptor, below the root that the container's process has in its mount
//! namespace. The data goes through the container's own tar if it has one, with the rights of its
//! user; otherwise it is read and written by descriptor. So are files of `/proc` and `/sys`, which
//! tar takes for empty, by a thread in the container's namespaces: what they say depends on who
//! reads them.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_cri::v1::{ContainerState, ExecRequest};
use berth_streaming::client::{Command, Ending};
use berth_streaming::command::{Outcome, Wanted};
use berth_streaming::spdy::connection::Incoming;
use berth_sys::beneath::Root;
use berth_sys::identity::Identified;
use berth_sys::ns::{self, Kind};
use tokio::sync::mpsc;

use crate::args::CpArgs;
use crate::copy::extract::{ExtractError, Rules, extract};
use crate::copy::pack::{Modes, PackError, pack};
use crate::copy::place::Place;
use crate::copy::{self, Destination, PlanError, Source};
use crate::daemon::{Daemon, answer, for_streams};
use crate::error::Error;
use crate::{output, remote, table};

/// Why copying failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CpError {
    /// Neither or both sides are in a container.
    #[error(
        "one side must be a container: write CONTAINER:PATH for it, and ./PATH for a local path with a colon"
    )]
    Sides,
    /// The container is not running.
    #[error("container `{0}` is not running; files are copied from and to running containers only")]
    NotRunning(String),
    /// The process cannot be found.
    #[error("cannot find the process of {0}: {1}; run this command as root, in the daemon's pid namespace")]
    Process(String, io::Error),
    /// The pid that the daemon reported is in use by another process.
    #[error("the process of {0} has ended; try again")]
    Gone(String),
    /// The root of this machine cannot be opened.
    #[error("cannot open the root directory")]
    Root(#[source] io::Error),
    /// Standard output is a terminal.
    #[error("standard output is a terminal; send the archive to a file or a program")]
    Terminal,
    /// A path cannot be copied from or to.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The archive cannot be created.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The archive cannot be extracted.
    #[error(transparent)]
    Extract(#[from] ExtractError),
    /// Standard input or output failed.
    #[error("cannot pass on the archive")]
    Stream(#[source] io::Error),
    /// The container's tar failed.
    #[error("tar in {container} failed: {text}")]
    Tar {
        /// Where it ran.
        container: String,
        /// What it said.
        text: String,
    },
    /// A path of the container is not UTF-8, which the CRI requires of arguments.
    #[error("the path {0} is not UTF-8 and cannot be sent to the daemon")]
    PathEncoding(PathBuf),
}

/// The container, for running tar in it.
#[derive(Debug, Clone)]
struct Inside {
    daemon: Daemon,
    id: String,
    label: String,
    /// User and group of its process.
    owner: (u32, u32),
    has_tar: bool,
    /// Its process.
    process: Arc<OwnedFd>,
}

/// Copies.
///
/// # Errors
/// [`CpError`]; what was already copied stays.
pub(crate) async fn cp(daemon: &Daemon, args: CpArgs) -> Result<(), Error> {
    let here = |path: &Path| std::path::absolute(path).map_err(CpError::Root);
    match (args.from, args.to) {
        (Place::Container { name, path }, to) if !matches!(to, Place::Container { .. }) => {
            let (inside, root) = enter(daemon, &name).await?;
            let source = copy::source(&root, &path).map_err(CpError::from)?;
            match to {
                Place::Here(to) => out(inside, root, path, source, &here_path(&to, here(&to)?)).await,
                _ => out_to_stream(inside, root, path, source).await,
            }
        }
        (from, Place::Container { name, path }) if !matches!(from, Place::Container { .. }) => {
            let (inside, root) = enter(daemon, &name).await?;
            match from {
                Place::Here(from) => into(inside, root, here_path(&from, here(&from)?), &path).await,
                _ => into_from_stream(inside, root, path).await,
            }
        }
        _ => Err(CpError::Sides.into()),
    }
}

/// The absolute path, with a final `.` if there was one: `absolute` drops it.
fn here_path(written: &Path, absolute: PathBuf) -> PathBuf {
    let bytes = written.as_os_str().as_bytes();
    if bytes == b"." || bytes.ends_with(b"/.") { absolute.join(".") } else { absolute }
}

/// Finds the container, its process and the root of that process.
async fn enter(daemon: &Daemon, name: &str) -> Result<(Inside, Root), Error> {
    let inventory = daemon.inventory().await?;
    let container = inventory.container(name)?;
    let label = inventory.label(container);
    if container.state() != ContainerState::ContainerRunning {
        return Err(CpError::NotRunning(label).into());
    }
    let details = daemon.container_details(&container.id).await?;
    let pid = details.pointer("/pid").and_then(serde_json::Value::as_i64).unwrap_or(0);
    let pid = i32::try_from(pid).ok().filter(|pid| *pid > 0).ok_or_else(|| CpError::Gone(label.clone()))?;
    let failed = |error| CpError::Process(label.clone(), error);
    let process = Identified::find_now(pid).map_err(failed)?;
    // The pid may have been reused. Only processes of the container are in its cgroup.
    let cgroup = process.read(c"cgroup").map_err(failed)?;
    if !String::from_utf8_lossy(&cgroup).contains(&container.id) {
        return Err(CpError::Gone(label).into());
    }
    let owner =
        owner(&process.read(c"status").map_err(failed)?).ok_or_else(|| CpError::Gone(label.clone()))?;
    let root = process.root().map_err(failed)?;
    let process = Arc::new(process.into_pidfd());
    let mut inside =
        Inside { daemon: daemon.clone(), id: container.id.clone(), label, owner, has_tar: false, process };
    inside.has_tar = inside.has_tar().await?;
    Ok((inside, root))
}

/// Effective user and group, as `/proc/<pid>/status` has them: proc(5).
fn owner(status: &[u8]) -> Option<(u32, u32)> {
    let status = std::str::from_utf8(status).ok()?;
    let second = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    Some((second("Uid:")?, second("Gid:")?))
}

/// From the container to a local path.
async fn out(inside: Inside, root: Root, path: PathBuf, source: Source, to: &Path) -> Result<(), Error> {
    let here = Root::open(Path::new("/")).map_err(CpError::Root)?;
    let Destination { into, top } = copy::destination(&here, to, &source).map_err(CpError::from)?;
    let into = here.open_dir(&into).map_err(|error| PlanError::Look(into, error)).map_err(CpError::from)?;
    let expected = if source.is_directory { None } else { source.name.clone() };
    let rules = Rules { expected, top, only_file: !source.is_directory, owner: None };
    let (sender, receiver) = mpsc::channel(QUEUE);
    let extracting = tokio::task::spawn_blocking(move || extract(Reader::new(receiver), &into, &rules));
    let sent = read_container(&inside, root, path, &source, sender).await;
    let extracted = joined(extracting.await);
    let report = match (sent, extracted) {
        // A failed write ends the reading, too.
        (_, Err(error @ (ExtractError::Write { .. } | ExtractError::Unexpected(_)))) => {
            return Err(CpError::from(error).into());
        }
        // The message of tar explains an incomplete archive.
        (Err(error), _) => return Err(error),
        (Ok(()), extracted) => extracted.map_err(CpError::from)?,
    };
    for path in report.left_out {
        output::remark(format_args!("skipped {path}: it is a device or FIFO"));
    }
    Ok(())
}

/// From the container to standard output, as an archive.
async fn out_to_stream(inside: Inside, root: Root, path: PathBuf, source: Source) -> Result<(), Error> {
    if io::stdout().is_terminal() {
        return Err(CpError::Terminal.into());
    }
    let (sender, receiver) = mpsc::channel(QUEUE);
    let writing = tokio::task::spawn_blocking(move || {
        let mut stdout = io::stdout().lock();
        io::copy(&mut Reader::new(receiver), &mut stdout).and_then(|_| stdout.flush())
    });
    let sent = read_container(&inside, root, path, &source, sender).await;
    joined(writing.await).map_err(output::OutputError)?;
    sent
}

/// From a local path to the container.
async fn into(inside: Inside, root: Root, from: PathBuf, to: &Path) -> Result<(), Error> {
    let here = Root::open(Path::new("/")).map_err(CpError::Root)?;
    let source = copy::source(&here, &from).map_err(CpError::from)?;
    let destination = copy::destination(&root, to, &source).map_err(CpError::from)?;
    let is_mounted = !source.is_directory && destination.is_mounted_on(&root).map_err(CpError::from)?;
    let Destination { into, top } = destination;
    let existing = if is_mounted { Existing::Overwritten } else { Existing::Replaced };
    let (sender, receiver) = mpsc::channel(QUEUE);
    let packing = tokio::task::spawn_blocking(move || {
        pack(&here, &from, top.as_deref(), Modes::Plain, Writer::new(sender))
    });
    let written = write_container(&inside, root, into, existing, receiver).await;
    let packed = joined(packing.await);
    match (packed, written) {
        // An archive that cannot be written is not read further.
        (Err(PackError::Write(_)), Err(error)) => return Err(error),
        (Err(error), _) => return Err(CpError::from(error).into()),
        (Ok(report), written) => {
            written?;
            tell(&report);
        }
    }
    Ok(())
}

/// Reports where the archive differs from the tree.
fn tell(packed: &copy::pack::Report) {
    let printable = |path: &Path| table::printable(&path.to_string_lossy());
    for path in &packed.left_out {
        output::remark(format_args!("skipped {}: it is a device, FIFO or socket", printable(path)));
    }
    for path in &packed.kernels {
        output::remark(format_args!("skipped what is in {}: the kernel makes it", printable(path)));
    }
    for (path, error) in &packed.unread {
        output::remark(format_args!("skipped {}: cannot read it: {error}", printable(path)));
    }
    for path in &packed.shrunk {
        output::remark(format_args!("{} shrank while it was read; padded with zeros", printable(path)));
    }
}

/// From an archive on standard input to a directory of the container.
async fn into_from_stream(inside: Inside, root: Root, to: PathBuf) -> Result<(), Error> {
    let (is_there, looked) = (root.open_dir(&to).is_ok(), to.clone());
    if !is_there {
        return Err(CpError::from(PlanError::NoDirectory(looked)).into());
    }
    let (sender, receiver) = mpsc::channel(QUEUE);
    let reading = tokio::task::spawn_blocking(move || {
        let mut to = Writer::new(sender);
        io::copy(&mut io::stdin().lock(), &mut to).and_then(|_| to.flush())
    });
    write_container(&inside, root, to, Existing::Replaced, receiver).await?;
    joined(reading.await).map_err(|error| CpError::Stream(error).into())
}

/// The direction of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// What becomes of an existing file with the name of a copied one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Existing {
    /// It is removed first.
    Replaced,
    /// It is written over: something is mounted on it.
    Overwritten,
}

/// How the transfer of an archive ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pumped {
    /// All of it was sent, or as much as its reader wanted.
    All,
    /// Its reader has failed.
    Unwanted,
}

/// Chunks of an archive in transit.
type Pieces = mpsc::Sender<Vec<u8>>;

/// Chunks that wait for their reader.
const QUEUE: usize = 4;

/// Size of a chunk, in bytes.
const PIECE_BYTES: usize = 32 * 1024;

/// The most that is kept of tar's messages, in bytes.
const MAX_SAID_BYTES: usize = 4096;

/// Reads a file, or the contents of a directory, as an archive.
async fn read_container(
    inside: &Inside,
    root: Root,
    path: PathBuf,
    source: &Source,
    to: Pieces,
) -> Result<(), Error> {
    if !inside.has_tar || source.misleads_tar {
        // With an entry for the directory itself, as tar(1) writes it: it may be empty, or private.
        let name = if source.is_directory { Some(".".into()) } else { source.name.clone() };
        let packing =
            inside.in_namespaces(move || pack(&root, &path, name.as_deref(), Modes::Whole, Writer::new(to)));
        tell(&packing.await?.map_err(CpError::from)?);
        return Ok(());
    }
    let command = match (source.is_directory, path.parent(), &source.name) {
        (false, Some(parent), Some(name)) => {
            // A file that is reached through a link, as when it is read by descriptor. "./" for
            // names that begin with a dash.
            let name = Path::new(".").join(name);
            vec!["tar".into(), "-chf".into(), "-".into(), "-C".into(), text(parent)?, text(&name)?]
        }
        _ => vec!["tar".into(), "-cf".into(), "-".into(), "-C".into(), text(&path)?, ".".into()],
    };
    let Command { stdout, stderr, ending, .. } = inside.run(command, false).await?;
    let pump = async {
        let Some(mut stdout) = stdout else { return Pumped::All };
        while let Some(bytes) = stdout.receive().await {
            if to.send(bytes.to_vec()).await.is_err() {
                return Pumped::Unwanted;
            }
        }
        Pumped::All
    };
    inside.finish(pump, Direction::Out, stderr, ending).await
}

/// Writes an archive to a directory.
async fn write_container(
    inside: &Inside,
    root: Root,
    into: PathBuf,
    existing: Existing,
    mut from: mpsc::Receiver<Vec<u8>>,
) -> Result<(), Error> {
    if !inside.has_tar {
        let rules = Rules { expected: None, top: None, only_file: false, owner: Some(inside.owner) };
        let into = root.open_dir(&into).map_err(|error| CpError::from(PlanError::Look(into, error)))?;
        let extracting = tokio::task::spawn_blocking(move || extract(Reader::new(from), &into, &rules));
        let report = joined(extracting.await).map_err(CpError::from)?;
        for path in report.left_out {
            output::remark(format_args!("skipped {path}: it is a device or FIFO"));
        }
        return Ok(());
    }
    // Everything is owned by the container's user.
    let mut command = vec!["tar".into(), "-xof".into(), "-".into(), "-C".into(), text(&into)?];
    if existing == Existing::Overwritten {
        command.push("--overwrite".into());
    }
    let Command { stdin, stderr, ending, .. } = inside.run(command, true).await?;
    let pump = async {
        let Some(stdin) = stdin else { return Pumped::All };
        while let Some(bytes) = from.recv().await {
            if stdin.send(bytes.into()).await.is_err() {
                // It has ended, and reports why.
                return Pumped::All;
            }
        }
        // It may have ended already.
        let _ = stdin.finish().await;
        Pumped::All
    };
    inside.finish(pump, Direction::In, stderr, ending).await
}

fn text(path: &Path) -> Result<String, CpError> {
    path.to_str().map(str::to_owned).ok_or_else(|| CpError::PathEncoding(path.to_owned()))
}

impl Inside {
    /// Whether the container has a working tar.
    async fn has_tar(&self) -> Result<bool, Error> {
        let mut command = self.run(vec!["tar".into(), "--version".into()], false).await?;
        let (stdout, stderr) = (command.stdout.take(), command.stderr.take());
        let (_, _, outcome) = tokio::join!(said(stdout), said(stderr), command.ending.outcome());
        is_there(outcome).map_err(|text| {
            let text = table::printable(text.trim());
            CpError::Tar { container: self.label.clone(), text }.into()
        })
    }

    /// Does `work` on a thread of its own in the container's namespaces, except for those of mounts
    /// and processes.
    async fn in_namespaces<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let kinds = [Kind::Network, Kind::Ipc, Kind::Uts].map(Kind::flag);
        let flags = kinds.into_iter().fold(ns::CGROUP, |all, kind| all | kind);
        let process = self.process.clone();
        let thread = std::thread::spawn(move || ns::join(process.as_fd(), flags).map(|()| work()));
        let ended = joined(tokio::task::spawn_blocking(|| thread.join()).await);
        match ended {
            Ok(done) => done.map_err(|error| CpError::Process(self.label.clone(), error).into()),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    async fn run(&self, cmd: Vec<String>, stdin: bool) -> Result<Command, Error> {
        let wanted = Wanted { stdin, stdout: true, stderr: true, terminal: false };
        let request =
            ExecRequest { container_id: self.id.clone(), cmd, tty: false, stdin, stdout: true, stderr: true };
        let act = format!("run tar in {}", self.label);
        let url = answer(act, self.daemon.runtime.clone().exec(for_streams(request))).await?.url;
        Ok(remote::command(&self.daemon, &url, wanted).await?)
    }

    /// Waits for tar to end while `pump` transfers its archive.
    async fn finish(
        &self,
        pump: impl Future<Output = Pumped>,
        direction: Direction,
        stderr: Option<Incoming>,
        mut ending: Ending,
    ) -> Result<(), Error> {
        let (outcome, said) = {
            let all = async { tokio::join!(ending.outcome(), said(stderr)) };
            let (mut all, mut pump) = (std::pin::pin!(all), std::pin::pin!(pump));
            let (mut is_pumped, mut ended) = (false, None);
            loop {
                tokio::select! {
                    all = &mut all, if ended.is_none() => ended = Some(all),
                    pumped = &mut pump, if !is_pumped => match pumped {
                        Pumped::All => is_pumped = true,
                        // The writer of the files has failed, and reports why.
                        Pumped::Unwanted => return Ok(()),
                    },
                }
                // After its end tar takes no more input, but output may still be in transit.
                if (is_pumped || direction == Direction::In)
                    && let Some(ended) = ended.take()
                {
                    break ended;
                }
            }
        };
        let failed = |text: String| {
            let text = table::printable(text.trim());
            Err(CpError::Tar { container: self.label.clone(), text }.into())
        };
        match outcome {
            Some(Outcome::Exited(0)) => Ok(()),
            Some(Outcome::Exited(1)) if direction == Direction::Out && is_only_change(&said) => {
                for line in said.lines() {
                    output::remark(table::printable(line));
                }
                Ok(())
            }
            Some(Outcome::Exited(code)) => failed(format!("exit code {code}: {said}")),
            Some(Outcome::NotRun { text, .. } | Outcome::Failed(text)) => failed(text),
            None => failed("the connection was lost".to_owned()),
        }
    }
}

/// Whether a program with this outcome exists. Its exit code does not matter: there is no option
/// that every tar accepts without effect. Only 126 and 127 mean that it cannot be run.
///
/// # Errors
/// When that is unknown.
fn is_there(outcome: Option<Outcome>) -> Result<bool, String> {
    match outcome {
        Some(Outcome::Exited(126 | 127) | Outcome::NotRun { .. }) => Ok(false),
        Some(Outcome::Exited(_)) => Ok(true),
        Some(Outcome::Failed(text)) => Err(text),
        None => Err("the connection was lost".to_owned()),
    }
}

/// Whether tar only reports files that changed while it read them. GNU tar exits with 1 then; other
/// implementations do for any failure.
fn is_only_change(said: &str) -> bool {
    const CHANGES: [&str; 4] = [
        ": file changed as we read it",
        ": File removed before we read it",
        ": Directory removed before we read it",
        "; padding with zeros",
    ];
    // The last line may have been cut off.
    let said = if said.len() < MAX_SAID_BYTES { said } else { said.rsplit_once('\n').map_or("", |it| it.0) };
    !said.is_empty() && said.lines().all(|line| CHANGES.iter().any(|change| line.ends_with(change)))
}

/// Reads a stream to its end, and returns its beginning.
async fn said(stream: Option<Incoming>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let mut said = Vec::new();
    while let Some(bytes) = stream.receive().await {
        said.extend_from_slice(&bytes);
        said.truncate(MAX_SAID_BYTES);
    }
    String::from_utf8_lossy(&said).into_owned()
}

fn joined<T>(outcome: Result<T, tokio::task::JoinError>) -> T {
    match outcome {
        Ok(outcome) => outcome,
        // It is never cancelled.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// The receiving end of the chunks, for a thread.
struct Reader {
    from: mpsc::Receiver<Vec<u8>>,
    piece: io::Cursor<Vec<u8>>,
}

impl Reader {
    fn new(from: mpsc::Receiver<Vec<u8>>) -> Self {
        Self { from, piece: io::Cursor::default() }
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let length = self.piece.read(buffer)?;
            if length > 0 || buffer.is_empty() {
                return Ok(length);
            }
            match self.from.blocking_recv() {
                Some(piece) => self.piece = io::Cursor::new(piece),
                None => return Ok(0),
            }
        }
    }
}

/// The sending end of the chunks, for a thread.
struct Writer {
    to: Pieces,
    piece: Vec<u8>,
}

impl Writer {
    fn new(to: Pieces) -> Self {
        Self { to, piece: Vec::new() }
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.piece);
        if piece.is_empty() {
            return Ok(());
        }
        self.to.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_the_effective_one() {
        let status = b"Name:\tx\nUid:\t0\t1000\t0\t0\nGid:\t1\t2\t3\t4\n";
        assert_eq!(owner(status), Some((1000, 2)));
        assert_eq!(owner(b"Name:\tx\n"), None);
    }

    #[test]
    fn a_tar_that_cannot_be_run_is_none_and_other_failures_are_errors() {
        let not_run = Outcome::NotRun { text: "no such file".to_owned(), code: 127 };
        for (outcome, expected) in [
            (Some(Outcome::Exited(0)), Ok(true)),
            (Some(Outcome::Exited(1)), Ok(true)),
            (Some(Outcome::Exited(126)), Ok(false)),
            (Some(Outcome::Exited(127)), Ok(false)),
            (Some(not_run), Ok(false)),
            (Some(Outcome::Failed("no memory".to_owned())), Err("no memory".to_owned())),
            (None, Err("the connection was lost".to_owned())),
        ] {
            assert_eq!(is_there(outcome), expected);
        }
    }

    #[test]
    fn a_tree_that_changes_is_copied_and_other_complaints_are_failures() {
        let changed = "tar: ./log: file changed as we read it\n";
        let shrank = "tar: ./log: File shrank by 12 bytes; padding with zeros\n";
        assert!(is_only_change(changed) && is_only_change(&[changed, shrank].concat()));
        for failed in ["", "tar: ./x: Cannot open: Permission denied", &[changed, "tar: error"].concat()] {
            assert!(!is_only_change(failed), "{failed:?}");
        }
    }

    #[test]
    fn a_path_here_keeps_the_ending_that_means_something() {
        for (written, expected) in [("a/.", "/w/a/."), (".", "/w/."), ("a/", "/w/a/"), ("/a", "/a")] {
            let absolute = Path::new("/w").join(written.trim_end_matches('.').trim_start_matches("./"));
            let found = here_path(Path::new(written), absolute);
            assert_eq!(
                found.components().collect::<PathBuf>(),
                Path::new(expected).components().collect::<PathBuf>()
            );
            assert_eq!(found.as_os_str().as_bytes().ends_with(b"/."), written.ends_with('.'), "{written}");
        }
    }

    #[test]
    fn pieces_are_what_was_written() {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let writing = std::thread::spawn(move || {
            let mut writer = Writer::new(sender);
            for number in 0..100_000_u32 {
                writer.write_all(&number.to_le_bytes()).unwrap();
            }
            writer.flush().unwrap();
        });
        let mut bytes = Vec::new();
        Reader::new(receiver).read_to_end(&mut bytes).unwrap();
        writing.join().unwrap();
        assert!(bytes.chunks(4).zip(0..100_000_u32).all(|(bytes, number)| bytes == number.to_le_bytes()));
        assert_eq!(bytes.len(), 400_000);
    }
}
