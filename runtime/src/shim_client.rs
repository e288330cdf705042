//! The daemon's end of a shim: starting one, finding one again, and talking to it.
//!
//! Messages are those of `berth_shim_proto`; they stop here. One task for each connection sends
//! frames whole, whatever becomes of the caller, and hands replies to those that wait for them;
//! when the connection ends, every waiter gets [`ShimError::Lost`], and [`ShimClient::ended`]
//! resolves. Every call has a deadline: a shim that hangs hurts its own container only.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use berth_shim_proto::control::{
    AttachRequest, ExecRequest, Phase, Reply, Request, Resize, SignalExec, reply::Answer, request::Call,
};
use berth_shim_proto::exit_record::ExitRecord;
use berth_shim_proto::frame;
use berth_shim_proto::launch::{self, Launch};
use berth_sys::errno::ECONNREFUSED;
use berth_sys::{process, socket};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, oneshot, watch};

use crate::lock;

pub(crate) use berth_shim_proto::control::{Created, Failed};

/// How long a shim may take for what needs no program of the container to do anything.
const CALL: Duration = Duration::from_secs(10);
/// How long making a container may take: mounts of slow filesystems are in it. A little longer than
/// the shim waits.
const CREATE: Duration = Duration::from_secs(65);
/// How long a start may take. A little longer than the shim itself waits for the program: it says
/// then that the start failed, and ends it.
pub(crate) const START: Duration = Duration::from_secs(12);
/// How long a kill may take to reach what it is for, when there is another way to see to it.
const KILL: Duration = Duration::from_secs(1);
/// How long to wait before the program of an exec is killed again.
const KILL_AGAIN: Duration = Duration::from_secs(1);

/// Why a shim did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimError {
    /// It tried and failed, in its own words.
    #[error("{0}")]
    Failed(Failed),
    /// It is gone, or never was there.
    #[error("the container's shim has ended")]
    Lost,
    /// It does not answer.
    #[error("the container's shim does not answer")]
    Silent,
    /// It answered with something else than what was asked for.
    #[error("the container's shim gave an answer that this version of Berth does not know")]
    Unexpected,
    /// It is of a version that knows less.
    #[error(
        "the container was started by an older version of Berth, which cannot do this; restart the container"
    )]
    Older,
    /// It cannot be started.
    #[error("cannot start a shim: cannot {action}")]
    Start {
        /// Which part.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The request is too long for one message.
    #[error("the request is too large for the shim")]
    TooLong(#[source] frame::FrameError),
}

/// Why there is no connection to the shim of a daemon before this one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// Its socket has no listener: it has ended.
    #[error("the container's shim has ended")]
    Gone,
    /// There is no socket.
    #[error("the container's shim has no socket")]
    NoSocket,
    /// That says nothing about the shim: no descriptors, or it has not taken the connections that
    /// wait already.
    #[error("cannot connect to the container's shim")]
    NotNow(#[source] io::Error),
}

/// The shim's program, loaded once: processes are started from this copy, which cannot be written
/// to, so that neither an upgrade of the package nor a container that gets hold of its own
/// `/proc/<pid>/exe` changes what runs.
#[derive(Debug)]
pub(crate) struct ShimProgram {
    program: OwnedFd,
    null: OwnedFd,
}

impl ShimProgram {
    /// Loads the program from `path`.
    ///
    /// # Errors
    /// When it cannot be read or copied.
    pub(crate) fn load(path: &Path) -> io::Result<Self> {
        let program = berth_sys::file::sealed_program(c"berth-shim", &std::fs::read(path)?)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        Ok(Self { program, null: null.into() })
    }

    fn spawn(&self, mode: &str, passed: &[BorrowedFd<'_>]) -> Result<i32, ShimError> {
        let start = |action| move |source| ShimError::Start { action, source };
        let path = CString::new(format!("/proc/self/fd/{}", self.program.as_raw_fd()))
            .map_err(|_| start("set its name")(io::ErrorKind::InvalidInput.into()))?;
        let mode =
            CString::new(mode).map_err(|_| start("set its name")(io::ErrorKind::InvalidInput.into()))?;
        let args = [c"berth-shim".to_owned(), mode];
        let null = self.null.as_fd();
        let descriptors: Vec<BorrowedFd<'_>> =
            [null, null, null].into_iter().chain(passed.iter().copied()).collect();
        // No environment: the daemon's is not the containers' business.
        process::spawn(&process::Program { path: &path, args: &args, env: &[], descriptors: &descriptors })
            .map_err(start("run it"))
    }

    /// Starts a process that does nothing.
    ///
    /// # Errors
    /// [`ShimError::Start`].
    pub(crate) fn spawn_holder(&self) -> Result<Holder, ShimError> {
        let start = |action| move |source| ShimError::Start { action, source };
        let (word, theirs) = socket::stream_pair().map_err(start("create a socket"))?;
        let pid = self.spawn("hold", &[theirs.as_fd()])?;
        Ok(Holder { pid, word: Some(word) })
    }

    /// Makes process 1 of a pod's own pid namespace. Blocking.
    ///
    /// # Errors
    /// [`ShimError::Failed`] with the step that failed.
    pub(crate) fn spawn_pause(&self, request: &launch::Pause) -> Result<Pause, ShimError> {
        let start = |action| move |source| ShimError::Start { action, source };
        let (ours, theirs) = socket::stream_pair().map_err(start("create a socket"))?;
        let request = frame::encode(request).map_err(ShimError::TooLong)?;
        socket::send(ours.as_fd(), &request, &[]).map_err(start("send it the plan"))?;
        let pid = self.spawn("pause", &[theirs.as_fd()])?;
        drop(theirs);
        let reply = read_one(ours.as_fd());
        // It has ended, or ends as soon as it has said its word.
        let _ = process::wait_for(pid);
        let (reply, descriptors) = reply.map_err(start("get its answer"))?.ok_or(ShimError::Lost)?;
        let mut descriptors = descriptors.into_iter();
        match (reply.answer, descriptors.next(), descriptors.next()) {
            (Some(Answer::Created(created)), Some(pid_namespace), Some(procfs)) => {
                Ok(Pause { created, pid_namespace, procfs })
            }
            (Some(Answer::Failed(failed)), ..) => Err(ShimError::Failed(failed)),
            _ => Err(ShimError::Lost),
        }
    }
}

/// Process 1 of a pod's own pid namespace.
#[derive(Debug)]
pub(crate) struct Pause {
    pub(crate) created: Created,
    /// The namespace.
    pub(crate) pid_namespace: OwnedFd,
    /// A procfs of it, a detached mount.
    pub(crate) procfs: OwnedFd,
}

/// A process that keeps a scope of systemd in being until the one that it is for is in it: it waits
/// for the end of its one descriptor, which comes when this is dropped or the daemon ends.
#[derive(Debug)]
pub(crate) struct Holder {
    pid: i32,
    /// Taken before the wait.
    word: Option<OwnedFd>,
}

impl Holder {
    /// As the host numbers it.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// Ends it. Its number stays its own until this is dropped.
    pub(crate) fn end(&self) {
        // It may sit in a cgroup that is frozen or short of processor time; a kill does not wait
        // for its turn.
        if let Ok(pidfd) = process::open_pidfd(self.pid) {
            let _ = process::signal_pidfd(pidfd.as_fd(), 9);
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
        drop(self.word.take());
        let _ = process::wait_for(self.pid);
    }
}

fn read_one(socket: BorrowedFd<'_>) -> io::Result<Option<(Reply, Vec<OwnedFd>)>> {
    let mut received = Vec::new();
    let mut descriptors = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(reply) = frame::take(&mut received).map_err(io::Error::other)? {
            return Ok(Some((reply, descriptors)));
        }
        match socket::receive(socket, &mut buffer)? {
            (0, _) => return Ok(None),
            (length, more) => {
                received.extend_from_slice(buffer.get(..length).unwrap_or_default());
                descriptors.extend(more);
            }
        }
    }
}

type Pending = Mutex<HashMap<u64, oneshot::Sender<Answer>>>;

/// Where what comes in goes.
struct Incoming {
    pending: Arc<Pending>,
    failure: Arc<OnceLock<Failed>>,
    end: Arc<OnceLock<ExitRecord>>,
}

/// Requests until they are sent. The caller can take one back until then, with its descriptors: a
/// shim that does not read holds up everything behind, and abandoned requests must not pile up, nor
/// be done later.
#[derive(Debug, Default)]
struct Outbox {
    /// By their numbers, which is the order in which they came.
    requests: Mutex<BTreeMap<u64, Outgoing>>,
    changed: Notify,
    /// Nobody adds any more.
    closed: AtomicBool,
}

#[derive(Debug)]
struct Outgoing {
    frame: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Outbox {
    fn add(&self, id: u64, outgoing: Outgoing) {
        lock(&self.requests).insert(id, outgoing);
        self.changed.notify_one();
    }

    /// Takes a request back; whether it was not sent.
    fn take_back(&self, id: u64) -> bool {
        lock(&self.requests).remove(&id).is_some()
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// The next one, to be sent. `None` when there will be none.
    async fn next(&self) -> Option<Outgoing> {
        loop {
            // Before the look: what is added before the mark is found.
            let closed = self.closed.load(Ordering::Acquire);
            if let Some((_, outgoing)) = lock(&self.requests).pop_first() {
                return Some(outgoing);
            }
            if closed {
                return None;
            }
            self.changed.notified().await;
        }
    }
}

/// A request on its way.
struct Sent {
    id: u64,
    answer: oneshot::Receiver<Answer>,
}

/// Takes a request back when it is dropped, unless it was sent; its answer is dropped then.
struct TakenBack<'a> {
    client: &'a ShimClient,
    id: u64,
}

impl Drop for TakenBack<'_> {
    fn drop(&mut self) {
        self.client.take_back(self.id);
    }
}

/// The container whose pid namespace a new one is to live in.
#[derive(Debug)]
pub(crate) struct Target {
    /// Its main process.
    pub(crate) process: OwnedFd,
    /// That one's pid namespace.
    pub(crate) pid_namespace: OwnedFd,
}

/// A connection to a shim.
#[derive(Debug)]
pub(crate) struct ShimClient {
    outbox: Arc<Outbox>,
    pending: Arc<Pending>,
    next_id: AtomicU64,
    ended: watch::Receiver<bool>,
    /// Why the shim could not even begin.
    failure: Arc<OnceLock<Failed>>,
    /// How the container ended, if the shim's last message said it.
    end: Arc<OnceLock<ExitRecord>>,
    pid: Option<i32>,
}

impl ShimClient {
    /// Starts a shim for the container whose runtime directory is `state_directory`.
    ///
    /// # Errors
    /// [`ShimError::Start`].
    pub(crate) fn spawn(program: &ShimProgram, state_directory: &Path) -> Result<Self, ShimError> {
        let start = |action| move |source| ShimError::Start { action, source };
        let (ours, theirs) = socket::stream_pair().map_err(start("create a socket"))?;
        let directory = File::open(state_directory).map_err(start("open its directory"))?;
        let pid = program.spawn("container", &[theirs.as_fd(), directory.as_fd()])?;
        Self::new(ours, Some(pid)).map_err(start("watch its socket"))
    }

    /// Connects to the shim that a daemon before this one started.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub(crate) fn connect(state_directory: &Path) -> Result<Self, ConnectError> {
        let directory = File::open(state_directory).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ConnectError::NoSocket,
            _ => ConnectError::NotNow(error),
        })?;
        let socket = socket::connect_below(directory.as_fd(), berth_shim_proto::SOCKET).map_err(|error| {
            match (error.kind(), error.raw_os_error()) {
                (io::ErrorKind::NotFound, _) => ConnectError::NoSocket,
                (_, Some(ECONNREFUSED)) => ConnectError::Gone,
                _ => ConnectError::NotNow(error),
            }
        })?;
        Self::new(socket, None).map_err(ConnectError::NotNow)
    }

    fn new(socket: OwnedFd, child: Option<i32>) -> io::Result<Self> {
        berth_sys::file::set_nonblocking(socket.as_fd())?;
        // For a socket pair that is the pid of the pair's creator: this daemon. Then the child is
        // the peer.
        let pid = child.or_else(|| socket::peer_pid(socket.as_fd()).ok());
        let socket = UnixStream::from_std(socket.into())?;
        let pending = Arc::new(Pending::default());
        let (end, ended) = watch::channel(false);
        let outbox = Arc::new(Outbox::default());
        let (failure, last) = (Arc::new(OnceLock::new()), Arc::new(OnceLock::new()));
        let incoming = Incoming { pending: pending.clone(), failure: failure.clone(), end: last.clone() };
        tokio::spawn(serve(socket, outbox.clone(), incoming, end, child));
        Ok(Self { outbox, pending, next_id: AtomicU64::new(1), ended, failure, end: last, pid })
    }

    /// The shim's pid.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Resolves when the connection has ended: the container has ended and its record is on disk,
    /// or the shim is lost.
    pub(crate) async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that the reader task is gone, which is an end too.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// How the container ended, if the shim said it before the connection ended.
    pub(crate) fn end(&self) -> Option<ExitRecord> {
        self.end.get().cloned()
    }

    /// Makes the container up to the exec of its program.
    ///
    /// # Errors
    /// [`ShimError`]; nothing is left in the shim, which the caller has to [`ShimClient::discard`].
    pub(crate) async fn create(&self, launch: Launch, target: Option<Target>) -> Result<Created, ShimError> {
        let descriptors = target.map_or_else(Vec::new, |target| vec![target.process, target.pid_namespace]);
        match self.call_with(Call::Create(Box::new(launch)), descriptors, CREATE).await? {
            Answer::Created(created) => Ok(created),
            other => Err(unexpected(other)),
        }
    }

    /// Lets the program run; since when, in nanoseconds since the epoch.
    ///
    /// # Errors
    /// [`ShimError::Failed`] when its exec failed; the container is over then.
    pub(crate) async fn start(&self) -> Result<i64, ShimError> {
        match self.call(Call::Start(()), START).await? {
            Answer::Started(started) => Ok(started.at_unix_ns),
            other => Err(unexpected(other)),
        }
    }

    /// Runs a program in the container, with these as its standard output, error and, if there is
    /// one, input.
    ///
    /// # Errors
    /// [`ShimError`]; a program that could not be started is found by [`RunningExec::ended`].
    pub(crate) fn exec(
        self: &Arc<Self>,
        args: Vec<Vec<u8>>,
        stdout: OwnedFd,
        stderr: OwnedFd,
        stdin: Option<OwnedFd>,
    ) -> Result<RunningExec, ShimError> {
        let descriptors = [stdout, stderr].into_iter().chain(stdin).collect();
        self.run(ExecRequest { args, terminal: false }, descriptors)
    }

    /// Runs a program in the container on a new terminal. What is read from it and written to it
    /// comes on the socket that `taker` is the far end of, as a descriptor; and what gives it a
    /// size, with a shim that has that: with an older one the descriptor is the terminal's other
    /// end.
    ///
    /// # Errors
    /// As [`exec`](Self::exec); [`ShimError::Older`] when the container's shim is of a version that
    /// cannot do this.
    pub(crate) async fn exec_on_terminal(
        self: &Arc<Self>,
        args: Vec<Vec<u8>>,
        taker: OwnedFd,
    ) -> Result<(RunningExec, Option<Resizer>), ShimError> {
        /// The first [`Phase::version`] that has this.
        const SINCE: u32 = 1;
        let version = self.phase().await?.version;
        if version < SINCE {
            return Err(ShimError::Older);
        }
        let running = self.run(ExecRequest { args, terminal: true }, vec![taker])?;
        let resizer =
            (version >= RELAYS_SINCE).then(|| Resizer { client: self.clone(), request_id: running.id });
        Ok((running, resizer))
    }

    fn run(
        self: &Arc<Self>,
        request: ExecRequest,
        descriptors: Vec<OwnedFd>,
    ) -> Result<RunningExec, ShimError> {
        let Sent { id, answer } = self.send(Call::Exec(request), descriptors)?;
        Ok(RunningExec { client: self.clone(), id, answer: Some(answer), input: None })
    }

    /// Passes the container's own streams on by these pipes, from now on.
    ///
    /// # Errors
    /// [`ShimError::Older`] when the container's shim is of a version that cannot do this,
    /// [`ShimError::Failed`] when the container has ended.
    pub(crate) async fn attach(
        &self,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
        stdin: Option<OwnedFd>,
    ) -> Result<(), ShimError> {
        self.check_attach().await?;
        let request =
            AttachRequest { stdout: stdout.is_some(), stderr: stderr.is_some(), stdin: stdin.is_some() };
        let descriptors = [stdout, stderr, stdin].into_iter().flatten().collect();
        match self.call_with(Call::Attach(request), descriptors, CALL).await? {
            Answer::Done(()) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Whether the shim can do that.
    ///
    /// # Errors
    /// [`ShimError::Older`] when it cannot.
    pub(crate) async fn check_attach(&self) -> Result<(), ShimError> {
        if self.phase().await?.version < RELAYS_SINCE { Err(ShimError::Older) } else { Ok(()) }
    }

    /// Gives a terminal this size: that of an exec, or [`TERMINAL_OF_CONTAINER`]. One whose program
    /// has ended has no size to be set.
    pub(crate) async fn resize(&self, request_id: u64, columns: u16, rows: u16) {
        let resize = Resize { request_id, columns: columns.into(), rows: rows.into() };
        let _ = self.done(Call::Resize(resize)).await;
    }

    /// Kills an exec's session.
    async fn kill_exec(&self, id: u64) {
        // It may have ended meanwhile; then there is nothing to kill. A shim that hangs does it
        // when it goes on.
        let kill = Call::SignalExec(SignalExec { request_id: id, signal: process::SIGKILL });
        let _ = tokio::time::timeout(KILL, self.done(kill)).await;
    }

    /// Sends a signal to the main process.
    ///
    /// # Errors
    /// [`ShimError::Failed`] when it has ended.
    pub(crate) async fn signal(&self, signal: i32) -> Result<(), ShimError> {
        self.done(Call::Signal(signal)).await
    }

    /// Reopens the log path.
    ///
    /// # Errors
    /// [`ShimError::Failed`] when that failed; the old file is in use still.
    pub(crate) async fn reopen_log(&self) -> Result<(), ShimError> {
        self.done(Call::ReopenLog(())).await
    }

    /// How far the container has come.
    ///
    /// # Errors
    /// [`ShimError`].
    pub(crate) async fn phase(&self) -> Result<Phase, ShimError> {
        match self.call(Call::State(()), CALL).await? {
            Answer::State(phase) => Ok(phase),
            other => Err(unexpected(other)),
        }
    }

    /// Gives the container up, whatever it does; no exit record is written. Waits until the shim
    /// has ended.
    pub(crate) async fn discard(&self) {
        // A shim that is gone already is what is wanted. What it has made is killed with the
        // container's cgroup by the caller.
        let _ = self.send(Call::Discard(()), Vec::new());
        if tokio::time::timeout(CALL, self.ended()).await.is_err() {
            self.kill();
            let _ = tokio::time::timeout(KILL, self.ended()).await;
        }
    }

    /// Ends a shim that does not answer, so that its container can be over: its exit stays unknown
    /// then.
    pub(crate) fn kill(&self) {
        let Some(pidfd) = self.pid.and_then(|pid| process::open_pidfd(pid).ok()) else { return };
        // As long as the connection is open the number is the shim's, so the descriptor was it a
        // moment ago.
        if !*self.ended.borrow() {
            // It may end just now, which is as good.
            let _ = process::signal_pidfd(pidfd.as_fd(), process::SIGKILL);
        }
    }

    /// Resolves when the shim does not answer any more.
    async fn silent(&self) -> ShimError {
        loop {
            tokio::time::sleep(CALL).await;
            if let Err(error) = self.phase().await {
                return error;
            }
        }
    }

    async fn done(&self, call: Call) -> Result<(), ShimError> {
        match self.call(call, CALL).await? {
            Answer::Done(()) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    async fn call(&self, call: Call, limit: Duration) -> Result<Answer, ShimError> {
        self.call_with(call, Vec::new(), limit).await
    }

    async fn call_with(
        &self,
        call: Call,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Answer, ShimError> {
        let Sent { id, answer } = self.send(call, descriptors)?;
        // Also when this call is given up from outside.
        let _unless_answered = TakenBack { client: self, id };
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(Answer::Failed(failed))) => Err(ShimError::Failed(failed)),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(self.lost()),
            Err(_) => Err(ShimError::Silent),
        }
    }

    /// Why there is no answer any more.
    fn lost(&self) -> ShimError {
        self.failure.get().cloned().map_or(ShimError::Lost, ShimError::Failed)
    }

    fn send(&self, call: Call, descriptors: Vec<OwnedFd>) -> Result<Sent, ShimError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let frame = frame::encode(&Request { id, call: Some(call) }).map_err(ShimError::TooLong)?;
        let (sender, answer) = oneshot::channel();
        lock(&self.pending).insert(id, sender);
        self.outbox.add(id, Outgoing { frame, descriptors });
        if *self.ended.borrow() {
            self.take_back(id);
            return Err(self.lost());
        }
        Ok(Sent { id, answer })
    }

    /// Takes back a request whose answer is no longer wanted; returns whether it was still unsent.
    fn take_back(&self, id: u64) -> bool {
        lock(&self.pending).remove(&id);
        self.outbox.take_back(id)
    }
}

impl Drop for ShimClient {
    fn drop(&mut self) {
        self.outbox.close();
    }
}

fn unexpected(_answer: Answer) -> ShimError {
    // As a shim of another version could.
    ShimError::Unexpected
}

/// Instead of the request of an exec: the terminal of the container's own program.
pub(crate) const TERMINAL_OF_CONTAINER: u64 = 0;

/// The first [`Phase::version`] in which the shim keeps what programs have open to itself.
const RELAYS_SINCE: u32 = 2;

/// What gives a terminal its size.
#[derive(Debug)]
pub(crate) struct Resizer {
    client: Arc<ShimClient>,
    request_id: u64,
}

impl Resizer {
    /// Gives the terminal this size. One whose program has ended has no size to be set.
    pub(crate) async fn resize(&self, columns: u16, rows: u16) {
        self.client.resize(self.request_id, columns, rows).await;
    }
}

/// A program that runs in the container. When it is dropped before its end, the program is killed:
/// no one waits for it any more.
#[derive(Debug)]
pub(crate) struct RunningExec {
    client: Arc<ShimClient>,
    id: u64,
    /// Until the shim has said how it ended.
    answer: Option<oneshot::Receiver<Answer>>,
    /// Our end of its input.
    input: Option<OwnedFd>,
}

impl RunningExec {
    /// Waits for its end; its exit code. May be called again after it was dropped half-way, until
    /// it has returned.
    ///
    /// # Errors
    /// [`ShimError::Failed`] when it could not be started, [`ShimError::Lost`] when the connection
    /// ended before it, [`ShimError::Silent`] when the shim stopped answering: a program may run
    /// forever, and a shim that hangs would look the same.
    pub(crate) async fn ended(&mut self) -> Result<i32, ShimError> {
        let Some(pending) = &mut self.answer else { return Err(ShimError::Lost) };
        let answer = tokio::select! {
            biased;
            answer = pending => answer,
            error = self.client.silent() => return Err(error),
        };
        self.answer = None;
        match answer {
            Ok(Answer::Ended(ended)) => Ok(ended.exit_code),
            Ok(Answer::Failed(failed)) => Err(ShimError::Failed(failed)),
            Ok(other) => Err(unexpected(other)),
            Err(_) => Err(ShimError::Lost),
        }
    }

    /// Keeps its input open until it has ended, when it is killed by dropping this: a program that
    /// sees the end of its input before may take what it has read for all of it.
    pub(crate) fn hold_input(&mut self, input: OwnedFd) {
        self.input = Some(input);
    }

    /// Its input ends as its client wanted.
    pub(crate) fn release_input(&mut self) {
        self.input = None;
    }

    /// Kills it and what it started in its session.
    pub(crate) async fn kill(&self) {
        self.client.kill_exec(self.id).await;
    }
}

impl Drop for RunningExec {
    fn drop(&mut self) {
        let Some(mut answer) = self.answer.take() else { return };
        if self.client.outbox.take_back(self.id) {
            // The shim has not been asked, and never will be.
            lock(&self.client.pending).remove(&self.id);
            return;
        }
        // Without a runtime the daemon is at its end, and the shim goes on without it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (client, id, input) = (self.client.clone(), self.id, self.input.take());
        runtime.spawn(async move {
            let _input = input;
            let mut pause = KILL_AGAIN;
            loop {
                // One at a time: a shim that does not read has no use for more.
                let kill = Call::SignalExec(SignalExec { request_id: id, signal: process::SIGKILL });
                let Ok(Sent { id, answer: killed }) = client.send(kill, Vec::new()) else { return };
                let _unless_answered = TakenBack { client: &client, id };
                tokio::select! {
                    biased;
                    _ = &mut answer => return,
                    _ = killed => {}
                }
                // Not yet started, it cannot be killed; and one that waits for a disk ends late.
                if tokio::time::timeout(pause, &mut answer).await.is_ok() {
                    return;
                }
                pause = (pause * 2).min(CALL);
            }
        });
    }
}

async fn serve(
    socket: UnixStream,
    outbox: Arc<Outbox>,
    incoming: Incoming,
    end: watch::Sender<bool>,
    child: Option<i32>,
) {
    let mut received = Vec::new();
    loop {
        let open = tokio::select! {
            outgoing = outbox.next() => match outgoing {
                Some(outgoing) if send_whole(&socket, &outgoing).await.is_ok() => true,
                Some(_) => {
                    // A shim that could not begin is gone before it is asked anything: what it has
                    // said is there still.
                    let last_words = async {
                        while socket.readable().await.is_ok() && receive(&socket, &mut received, &incoming) {}
                    };
                    let _ = tokio::time::timeout(KILL, last_words).await;
                    false
                }
                None => false,
            },
            ready = socket.readable() => ready.is_ok() && receive(&socket, &mut received, &incoming),
        };
        if !open {
            break;
        }
    }
    // First the mark, then the sweep: a request that sees no mark is in the map before the sweep.
    let _ = end.send(true);
    lock(&incoming.pending).clear();
    lock(&outbox.requests).clear();
    drop(socket);
    if let Some(pid) = child {
        reap(pid).await;
    }
}

async fn send_whole(socket: &UnixStream, outgoing: &Outgoing) -> io::Result<()> {
    let mut rest = outgoing.frame.as_slice();
    let mut descriptors: Vec<BorrowedFd<'_>> = outgoing.descriptors.iter().map(AsFd::as_fd).collect();
    while !rest.is_empty() {
        socket.writable().await?;
        match socket.try_io(Interest::WRITABLE, || socket::send(socket.as_fd(), rest, &descriptors)) {
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                descriptors.clear();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes what is there; `false` when the connection has ended.
fn receive(socket: &UnixStream, received: &mut Vec<u8>, incoming: &Incoming) -> bool {
    let mut buffer = [0; 2048];
    match socket.try_io(Interest::READABLE, || socket::receive(socket.as_fd(), &mut buffer)) {
        Ok((0, _)) => return false,
        Ok((length, _)) => received.extend_from_slice(buffer.get(..length).unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
        Err(_) => return false,
    }
    loop {
        match frame::take::<Reply>(received) {
            Ok(Some(Reply { id: 0, answer: Some(Answer::Exited(exited)) })) => {
                if let Some(record) = end_in(exited) {
                    // It is the last message, and there is one of it.
                    let _ = incoming.end.set(record);
                }
                return false;
            }
            Err(_) => return false,
            Ok(Some(Reply { id: 0, answer: Some(Answer::Failed(failed)) })) => {
                // It is the only one, of a shim that ends.
                let _ = incoming.failure.set(failed);
                return false;
            }
            Ok(Some(Reply { id, answer: Some(answer) })) => {
                if let Some(waiter) = lock(&incoming.pending).remove(&id) {
                    // The caller may have stopped waiting.
                    let _ = waiter.send(answer);
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
        }
    }
    if received.is_empty() {
        *received = Vec::new();
    }
    true
}

/// How the container ended, if the last message says so: shims of the first version left that to
/// the record.
fn end_in(record: ExitRecord) -> Option<ExitRecord> {
    (record.finished_at_unix_ns != 0).then_some(record)
}

/// Takes the zombie of a shim that this daemon started. It ends right after its connection; one
/// that hangs is looked for now and then.
async fn reap(pid: i32) {
    let mut pause = Duration::from_millis(1);
    while matches!(process::reap_or_running(pid), Ok(process::Child::Running)) {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(10));
    }
}

/// Where the shim's program is looked for when the configuration does not say: beside the daemon's
/// own, then where packages put it.
#[must_use]
pub(crate) fn default_program() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join("berth-shim")));
    beside.into_iter().chain([PathBuf::from("/usr/libexec/berth/berth-shim")]).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for what other tasks do.
    async fn until(is_so: impl Fn() -> bool) {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_nobody_waits_for_does_not_pile_up_before_a_shim_that_does_not_read() {
        let (ours, theirs) = socket::stream_pair().unwrap();
        let client = Arc::new(ShimClient::new(ours, None).unwrap());
        let null = || OwnedFd::from(File::options().write(true).open("/dev/null").unwrap());
        let waiting = || lock(&client.outbox.requests).len();
        let exec = || client.exec(vec![vec![b'x'; 64 * 1024]], null(), null(), None).unwrap();
        // As much as goes out; the last one is on its way.
        let mut sent = Vec::new();
        loop {
            sent.push(exec());
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            if waiting() > 0 {
                break;
            }
        }
        drop(sent.pop());
        assert_eq!(waiting(), 0);
        // What was sent is to be killed: once, for as long as there is no answer.
        let kills = sent.len();
        drop(sent);
        until(|| waiting() == kills).await;
        for _ in 0..100 {
            drop(exec());
            let _ = tokio::time::timeout(Duration::from_micros(1), client.phase()).await;
            assert_eq!(waiting(), kills);
        }
        tokio::time::pause();
        tokio::time::sleep(CALL * 10).await;
        assert_eq!(waiting(), kills);
        drop(theirs);
        until(|| *client.ended.borrow()).await;
        until(|| Arc::strong_count(&client) == 1).await;
        assert_eq!((waiting(), lock(&client.pending).len()), (0, 0));
    }
}
