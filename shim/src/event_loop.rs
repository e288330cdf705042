//! The shim's one loop: every wake-up is one variant of [`Event`], and every change of the container's state
//! happens here.
//!
//! ```text
//!  Empty --Create--> Preparing --ready--> Waiting --Start--> Starting --exec--> Running --ended--> Draining
//!    |  ^---failed or too long---/           |                  \--failed, too long or killed---------^
//!    |                                       \--Discard--> (exit, nothing recorded)
//!    \--last connection closed--> (exit)
//!
//!  Draining --output at its end, or time up--> Recording --recorded, or told--> (exit)
//! ```
//! All from Waiting on outlive the daemon: without a connection the shim goes on, and listens. The exit
//! record is on disk before anybody is told, unless the disk refuses it; then whoever is connected is told,
//! and without anyone it is tried again.
//!
//! Nothing here waits for a process of the container: one that is on its way to its program ([`Birth`]) is
//! heard when it says something, and killed when its time is up.

use crate::birth::{Birth, Progress};
use crate::connection::{Connection, Incoming};
use crate::exit::{drop_reservation, unix_ns, write_record};
use crate::failure::{Step, from_io, refused};
use crate::handshake;
use crate::host_path::host_path;
use crate::launch::{self, Container, Exec, Making, Stage};
use crate::stdio::Output;
use berth_shim_proto::SOCKET;
use berth_shim_proto::control::{
    Ended, ExecRequest, Failed, Phase, Reply, Request, Started, VERSION, reply::Answer, request::Call,
};
use berth_shim_proto::exit_record::ExitRecord;
use berth_shim_proto::launch::{Launch, PidNamespace};
use berth_sys::poll::{ChildSignals, Poll};
use berth_sys::process::{self, Child, Ended as ProcessEnded, SIGKILL};
use berth_sys::socket;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

/// How long after the end of the main process its output may take to end: somebody outside of the container
/// can hold the pipe open.
const DRAIN: Duration = Duration::from_secs(2);

/// How long a last message may wait for the daemon to read it. The daemon finds the exit record without it.
const FAREWELL: Duration = Duration::from_secs(1);

/// Daemons that may be connected at once; one is the rule, two happen at a restart.
const MAX_CONNECTIONS: usize = 4;

/// What a container exits with whose program could not be started: as shells and docker say it, POSIX "Exit
/// Status for Commands".
fn start_failure_code(failed: &Failed) -> i32 {
    failed.shell_code().unwrap_or(128)
}

const TOKEN_CHILDREN: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
const TOKEN_OUTPUT: u64 = 2;
const TOKEN_ERROR: u64 = 3;
const TOKEN_OOM: u64 = 4;
const TOKEN_MAIN: u64 = 5;
/// Connections and execs count up from here.
const TOKEN_FIRST: u64 = 16;

/// How long after a failed attempt the exit record is written again.
const RECORD_AGAIN: Duration = Duration::from_secs(1);

/// Everything that wakes the shim.
enum Event {
    ChildrenEnded,
    ConnectionWaits,
    OutputReadable(u64),
    OomCounterChanged,
    MainProcessSpoke,
    /// A connection, or the process of an exec.
    Ready {
        token: u64,
        writable: bool,
    },
    TimeOver,
}

/// A request that is answered later.
#[derive(Clone, Copy)]
struct Asker {
    connection: u64,
    request_id: u64,
}

enum State {
    Empty,
    Preparing { making: Box<Making>, asker: Asker },
    Waiting { container: Box<Container>, output: Output, birth: Birth },
    Starting { container: Box<Container>, output: Output, birth: Birth, asker: Asker },
    Running { container: Box<Container>, output: Output, started: Started },
    Draining { launch: Box<Launch>, output: Output, record: ExitRecord, deadline: Instant },
    Recording { launch: Box<Launch>, record: ExitRecord, again: Instant },
    Finished,
}

impl State {
    /// The container, while it has a main process.
    fn container(&self) -> Option<&Container> {
        match self {
            Self::Waiting { container, .. }
            | Self::Starting { container, .. }
            | Self::Running { container, .. } => Some(container),
            _ => None,
        }
    }

    /// The main process, while it is not its program.
    fn birth(&self) -> Option<&Birth> {
        match self {
            Self::Preparing { making, .. } => Some(&making.birth),
            Self::Waiting { birth, .. } | Self::Starting { birth, .. } => Some(birth),
            _ => None,
        }
    }

    /// When something is to be done without a wake-up.
    fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Preparing { making, .. } => Some(making.birth.deadline()),
            Self::Starting { birth, .. } => Some(birth.deadline()),
            Self::Draining { deadline, .. } => Some(*deadline),
            Self::Recording { again, .. } => Some(*again),
            Self::Empty | Self::Waiting { .. } | Self::Running { .. } | Self::Finished => None,
        }
    }
}

struct Shim {
    poll: Poll,
    children: ChildSignals,
    listener: OwnedFd,
    connections: Vec<Connection>,
    next_token: u64,
    state: State,
    execs: Vec<Exec>,
}

/// Serves the container until it has ended: `connection` leads to the daemon, `directory` is where to listen
/// for the next one.
///
/// # Errors
/// When the shim itself cannot work: no descriptors, no epoll, the socket's name taken.
pub(crate) fn run(connection: OwnedFd, directory: OwnedFd) -> io::Result<()> {
    let (poll, children, listener) = match prepare(&directory) {
        Ok(prepared) => prepared,
        Err(failed) => {
            // Without a request there is none to answer: an event. Nobody else would hear of it.
            let reply = Reply { id: 0, answer: Some(Answer::Failed(failed)) };
            if let Ok(bytes) = berth_shim_proto::frame::encode(&reply) {
                socket::send(connection.as_fd(), &bytes, &[])?;
            }
            return Err(io::ErrorKind::Other.into());
        }
    };
    drop(directory);
    let first = Connection::new(connection, TOKEN_FIRST, &poll)?;
    let mut shim = Shim {
        poll,
        children,
        listener,
        connections: vec![first],
        next_token: TOKEN_FIRST + 1,
        state: State::Empty,
        execs: Vec::new(),
    };
    while !matches!(shim.state, State::Finished) {
        for event in shim.wait()? {
            shim.handle(event);
        }
    }
    for connection in &mut shim.connections {
        connection.flush_before_end(&shim.poll, FAREWELL);
    }
    Ok(())
}

/// What a shim needs before it can serve anybody.
fn prepare(directory: &OwnedFd) -> Result<(Poll, ChildSignals, OwnedFd), Failed> {
    const STEP: &str = "start the container's shim";
    process::become_subreaper().step(STEP, "adopt orphans")?;
    let poll = Poll::new().step(STEP, "epoll")?;
    let children = ChildSignals::new().step(STEP, "signals")?;
    poll.watch(children.as_fd(), TOKEN_CHILDREN, false).step(STEP, "signals")?;
    // The first that needs room on the filesystem of the runtime state.
    let listener = socket::listen_below(directory.as_fd(), SOCKET).step(STEP, SOCKET)?;
    poll.watch(listener.as_fd(), TOKEN_LISTENER, false).step(STEP, SOCKET)?;
    Ok((poll, children, listener))
}

impl Shim {
    fn wait(&self) -> io::Result<Vec<Event>> {
        let deadline = self.deadline();
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mut events: Vec<Event> = self
            .poll
            .wait(timeout)?
            .into_iter()
            .map(|ready| match ready.token {
                TOKEN_CHILDREN => Event::ChildrenEnded,
                TOKEN_LISTENER => Event::ConnectionWaits,
                TOKEN_OUTPUT | TOKEN_ERROR => Event::OutputReadable(ready.token),
                TOKEN_OOM => Event::OomCounterChanged,
                TOKEN_MAIN => Event::MainProcessSpoke,
                token => Event::Ready { token, writable: ready.writable },
            })
            .collect();
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            events.push(Event::TimeOver);
        }
        Ok(events)
    }

    /// The first of all deadlines.
    fn deadline(&self) -> Option<Instant> {
        let of_execs = self.execs.iter().filter_map(|exec| match &exec.stage {
            Stage::Entering(birth) => Some(birth.deadline()),
            Stage::Running { .. } => None,
        });
        of_execs.chain(self.state.deadline()).min()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::ChildrenEnded => self.reap(),
            Event::ConnectionWaits => self.accept(),
            Event::OutputReadable(token) => {
                if let State::Waiting { output, .. }
                | State::Starting { output, .. }
                | State::Running { output, .. }
                | State::Draining { output, .. } = &mut self.state
                {
                    output.readable(token);
                }
                self.finish_if_drained(false);
            }
            Event::OomCounterChanged => self.look_at_oom_counter(),
            Event::MainProcessSpoke => {
                self.hear_main();
                self.reap();
            }
            Event::Ready { token, writable } => {
                match self.execs.iter().position(|exec| exec.token == token) {
                    Some(index) => {
                        self.hear_exec(index);
                        self.reap();
                    }
                    None => self.serve(token, writable),
                }
            }
            Event::TimeOver => self.time_over(),
        }
    }

    /// Acts on every deadline that is over.
    fn time_over(&mut self) {
        let now = Instant::now();
        for index in (0..self.execs.len()).rev() {
            if let Some(Exec { stage: Stage::Entering(birth), .. }) = self.execs.get(index)
                && birth.deadline() <= now
            {
                self.fail_exec(index, too_long("run the program"));
            }
        }
        if self.state.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        match &self.state {
            State::Preparing { .. } => self.main_failed(too_long("prepare the container")),
            State::Starting { .. } => self.main_failed(too_long("start the container")),
            State::Draining { .. } => self.finish_if_drained(true),
            State::Recording { .. } => self.record(),
            State::Empty | State::Waiting { .. } | State::Running { .. } | State::Finished => {}
        }
    }

    fn look_at_oom_counter(&mut self) {
        let (State::Waiting { container, .. }
        | State::Starting { container, .. }
        | State::Running { container, .. }) = &mut self.state
        else {
            return;
        };
        let Some(counter) = &mut container.oom else { return };
        if !counter.look()
            && let Some(file) = counter.changing()
        {
            // It would be ready for ever. That it is not watched is what is wanted.
            let _ = self.poll.forget(file);
        }
    }

    fn accept(&mut self) {
        let Ok(socket) = socket::accept(self.listener.as_fd()) else { return };
        // The directory is root's alone; this is the second lock on the same door.
        if !matches!(socket::peer_uid(socket.as_fd()), Ok(0)) || self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let token = self.new_token();
        if let Ok(connection) = Connection::new(socket, token, &self.poll) {
            self.connections.push(connection);
            if matches!(self.state, State::Recording { .. }) {
                self.record();
            }
        }
    }

    fn new_token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token - 1
    }

    fn serve(&mut self, token: u64, writable: bool) {
        let Some(connection) = self.connections.iter_mut().find(|connection| connection.token() == token)
        else {
            return;
        };
        if writable && !connection.flush(&self.poll) {
            self.close(token);
            return;
        }
        match connection.read() {
            Incoming::Requests(requests) => {
                for (request, descriptors) in requests {
                    self.answer(token, request, descriptors);
                }
            }
            Incoming::Closed => self.close(token),
        }
    }

    fn close(&mut self, token: u64) {
        if let Some(index) = self.connections.iter().position(|connection| connection.token() == token) {
            self.connections.swap_remove(index).forget(&self.poll);
        }
        self.finish_if_unwanted();
    }

    /// Ends a shim without a container and without anyone who could ask for one.
    fn finish_if_unwanted(&mut self) {
        if self.connections.is_empty() && matches!(self.state, State::Empty) {
            self.state = State::Finished;
        }
    }

    fn reply(&mut self, token: u64, id: u64, answer: Answer) {
        let reply = Reply { id, answer: Some(answer) };
        let Some(connection) = self.connections.iter_mut().find(|connection| connection.token() == token)
        else {
            return;
        };
        if !connection.send(&reply, &self.poll) {
            self.close(token);
        }
    }

    fn answer(&mut self, token: u64, request: Request, descriptors: Vec<OwnedFd>) {
        let id = request.id;
        let asker = Asker { connection: token, request_id: id };
        let result = match request.call {
            None => Err(refused("handle the request", "this shim does not know the call")),
            Some(Call::Create(launch)) => self.create(*launch, descriptors, asker).map(|()| None),
            Some(Call::Start(())) => self.start(asker).map(|()| None),
            Some(Call::Exec(exec)) => self.exec(&exec, descriptors, asker).map(|()| None),
            Some(Call::Signal(signal)) => self.signal(signal).map(|()| Some(Answer::Done(()))),
            Some(Call::SignalExec(target)) => {
                self.signal_exec(token, target.request_id, target.signal).map(|()| Some(Answer::Done(())))
            }
            Some(Call::ReopenLog(())) => self.reopen_log().map(|()| Some(Answer::Done(()))),
            Some(Call::State(())) => Ok(Some(Answer::State(self.phase()))),
            Some(Call::Discard(())) => {
                self.discard();
                Ok(None)
            }
        };
        match result {
            Ok(Some(answer)) => self.reply(token, id, answer),
            Ok(None) => {}
            Err(failed) => self.reply(token, id, Answer::Failed(failed)),
        }
        // A start that failed has moved the state on.
        self.finish_if_drained(false);
    }

    fn create(&mut self, launch: Launch, descriptors: Vec<OwnedFd>, asker: Asker) -> Result<(), Failed> {
        if !matches!(self.state, State::Empty) {
            return Err(refused("prepare the container", "this shim already has one"));
        }
        let making = launch::create(launch, descriptors)?;
        if let Err(error) = self.watch(&making.birth, TOKEN_MAIN) {
            making.birth.kill();
            return Err(from_io(&error, "watch the container's process", ""));
        }
        self.state = State::Preparing { making: Box::new(making), asker };
        Ok(())
    }

    fn start(&mut self, asker: Asker) -> Result<(), Failed> {
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Waiting { container, output, mut birth } => {
                let told = container.check_profile().and_then(|()| birth.go());
                self.state = State::Starting { container, output, birth, asker };
                if let Err(failed) = told {
                    self.main_failed(failed);
                }
                Ok(())
            }
            other => {
                self.state = other;
                Err(refused("start the container", "it is not waiting to be started"))
            }
        }
    }

    fn exec(&mut self, request: &ExecRequest, descriptors: Vec<OwnedFd>, asker: Asker) -> Result<(), Failed> {
        const STEP: &str = "exec in the container";
        let State::Running { container, .. } = &self.state else {
            return Err(refused(STEP, "it is not running"));
        };
        let birth = launch::exec(container, request, descriptors)?;
        let token = self.new_token();
        if let Err(error) = self.watch(&birth, token) {
            birth.kill();
            return Err(from_io(&error, STEP, ""));
        }
        let Asker { connection, request_id } = asker;
        self.execs.push(Exec { token, connection, request_id, stage: Stage::Entering(Box::new(birth)) });
        Ok(())
    }

    fn watch(&self, birth: &Birth, token: u64) -> io::Result<()> {
        birth.sources().try_for_each(|source| self.poll.watch(source, token, false))
    }

    /// As with [`Connection::forget`].
    fn unwatch(&self, birth: &Birth) {
        for source in birth.sources() {
            let _ = self.poll.forget(source);
        }
    }

    /// Hears the main process while it is not its program.
    fn hear_main(&mut self) {
        let heard = match &mut self.state {
            State::Preparing { making, .. } => making.birth.advance(),
            State::Waiting { birth, .. } | State::Starting { birth, .. } => birth.advance(),
            _ => return,
        };
        match heard {
            Err(failed) => self.main_failed(failed),
            Ok(Progress::Executed) => self.main_runs(),
            Ok(Progress::Pending) => self.main_waits(),
        }
    }

    /// Takes a container that is prepared over into its wait for the start.
    fn main_waits(&mut self) {
        let State::Preparing { making, .. } = &mut self.state else { return };
        let Some((created, terminal)) = making.take_ready() else { return };
        let State::Preparing { making, asker } = std::mem::replace(&mut self.state, State::Empty) else {
            return;
        };
        let record_path = making.exit_record_path().to_owned();
        let made = making.finish(created, terminal).and_then(|(made, birth)| {
            match Output::watch(&made.container.launch, made.streams, made.log, &self.poll, TOKEN_OUTPUT) {
                Ok(output) => Ok((Box::new(made.container), output, birth)),
                Err(error) => {
                    birth.kill();
                    Err(from_io(&error, "watch the output", ""))
                }
            }
        });
        match made {
            Ok((container, output, birth)) => {
                if let Some(file) = container.oom.as_ref().and_then(crate::exit::OomCounter::changing) {
                    // Without it the counter is read at the end, which is soon enough almost always.
                    let _ = self.poll.watch_content(file, TOKEN_OOM);
                }
                let created = container.created.clone();
                self.state = State::Waiting { container, output, birth };
                self.tell(asker, Answer::Created(created));
            }
            Err(failed) => {
                drop_reservation(&record_path);
                self.tell(asker, Answer::Failed(failed));
                self.finish_if_unwanted();
            }
        }
    }

    /// The main process is its program.
    fn main_runs(&mut self) {
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Starting { container, output, birth, asker } => {
                self.unwatch(&birth);
                let started = Started { at_unix_ns: unix_ns(SystemTime::now()) };
                self.state = State::Running { container, output, started };
                self.tell(asker, Answer::Started(started));
            }
            other => self.state = other,
        }
    }

    /// The main process will not be its program. It is killed; what it was to be for decides what that means.
    fn main_failed(&mut self, failed: Failed) {
        if let Some(birth) = self.state.birth() {
            birth.kill();
            self.unwatch(birth);
        }
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Preparing { making, asker } => {
                drop_reservation(making.exit_record_path());
                let failed = making.reason(failed);
                self.tell(asker, Answer::Failed(failed));
                self.finish_if_unwanted();
            }
            State::Starting { container, output, asker, .. } => {
                let record = ExitRecord {
                    exit_code: start_failure_code(&failed),
                    oom_killed: container.oom.as_ref().is_some_and(|oom| oom.has_risen(false)),
                    finished_at_unix_ns: unix_ns(SystemTime::now()),
                    start_error: failed.to_string(),
                    ..ExitRecord::default()
                };
                self.drain(*container, output, record);
                self.tell(asker, Answer::Failed(failed));
                self.finish_if_drained(false);
            }
            State::Waiting { container, output, birth } => {
                // It will be reaped, and its end recorded then; until then nothing more is to be heard.
                self.state = State::Waiting { container, output, birth };
            }
            other => self.state = other,
        }
    }

    /// Answers a request of before.
    fn tell(&mut self, asker: Asker, answer: Answer) {
        if self.connections.iter().any(|connection| connection.token() == asker.connection) {
            self.reply(asker.connection, asker.request_id, answer);
        } else if let Answer::Started(_) = answer {
            // Whoever is there instead has seen it starting.
            self.tell_all(&answer);
        }
    }

    fn tell_all(&mut self, answer: &Answer) {
        let tokens: Vec<u64> = self.connections.iter().map(Connection::token).collect();
        for token in tokens {
            self.reply(token, 0, answer.clone());
        }
    }

    fn hear_exec(&mut self, index: usize) {
        let Some(exec) = self.execs.get_mut(index) else { return };
        let Stage::Entering(birth) = &mut exec.stage else { return };
        match birth.advance() {
            Err(failed) => self.fail_exec(index, failed),
            Ok(Progress::Executed) => {
                if let Some(pid) = birth.process()
                    && let Stage::Entering(birth) = std::mem::replace(&mut exec.stage, Stage::Running { pid })
                {
                    self.unwatch(&birth);
                }
            }
            Ok(Progress::Pending) => {}
        }
    }

    /// Ends an exec that has not become its program.
    fn fail_exec(&mut self, index: usize, failed: Failed) {
        let exec = self.execs.swap_remove(index);
        if let Stage::Entering(birth) = &exec.stage {
            birth.kill();
            self.unwatch(birth);
        }
        self.reply(exec.connection, exec.request_id, Answer::Failed(failed));
    }

    fn drain(&mut self, container: Container, output: Output, record: ExitRecord) {
        if !matches!(container.launch.namespaces.pid, Some(PidNamespace::Own(()))) {
            crate::exit::end_the_rest(&container.launch.cgroup);
        }
        let launch = Box::new(container.launch);
        self.state = State::Draining { launch, output, record, deadline: Instant::now() + DRAIN };
    }

    fn signal(&self, signal: i32) -> Result<(), Failed> {
        match self.state.container() {
            Some(container) => process::signal_pidfd(container.pidfd.as_fd(), signal)
                .map_err(|error| from_io(&error, "signal the container", signal)),
            None => Err(refused("signal the container", "it has no process")),
        }
    }

    fn signal_exec(&self, token: u64, request_id: u64, signal: i32) -> Result<(), Failed> {
        let exec = self.execs.iter().find(|exec| exec.connection == token && exec.request_id == request_id);
        match exec.map(|exec| &exec.stage) {
            Some(Stage::Running { pid }) => {
                end_session(*pid, signal).map_err(|error| from_io(&error, "signal the exec", signal))
            }
            // No program is there that could act on a signal; what any signal is for is an end.
            Some(Stage::Entering(birth)) => {
                birth.kill();
                Ok(())
            }
            None => Err(refused("signal the exec", "it has ended")),
        }
    }

    fn reopen_log(&mut self) -> Result<(), Failed> {
        match &mut self.state {
            State::Starting { output, .. } | State::Running { output, .. } => output.reopen_log(),
            _ => Err(refused("reopen the log", "the container is not running")),
        }
    }

    fn phase(&self) -> Phase {
        Phase {
            created: self.state.container().map(|container| container.created.clone()),
            started: match &self.state {
                State::Running { started, .. } => Some(*started),
                _ => None,
            },
            starting: matches!(self.state, State::Starting { .. }),
            version: VERSION,
        }
    }

    fn discard(&mut self) {
        if let Some(birth) = self.state.birth() {
            birth.kill();
        }
        if let Some(container) = self.state.container() {
            let _ = process::signal_pidfd(container.pidfd.as_fd(), SIGKILL);
        }
        self.state = State::Finished;
    }

    /// One waiter for all children: the main process, execs, and orphans of either that became the shim's.
    fn reap(&mut self) {
        self.children.clear();
        while let Some(pid) = self.ended_child() {
            // What it said before its end is heard before it is nobody.
            self.hear_main();
            for index in (0..self.execs.len()).rev() {
                self.hear_exec(index);
            }
            match process::reap_or_running(pid) {
                Ok(Child::Ended(ended)) => self.child_ended(pid, ended),
                _ => break,
            }
        }
        self.finish_if_drained(false);
    }

    /// A child that has ended. A process that its maker has not named yet looks like an orphan: as long as
    /// there may be one, only children that are known count, so that no number becomes another process's
    /// before it is known.
    fn ended_child(&self) -> Option<i32> {
        let births = || {
            self.execs
                .iter()
                .filter_map(|exec| match &exec.stage {
                    Stage::Entering(birth) => Some(birth.as_ref()),
                    Stage::Running { .. } => None,
                })
                .chain(self.state.birth())
        };
        if !births().any(Birth::expects_successor) {
            return process::ended_child(None).ok().flatten();
        }
        let running = self.execs.iter().filter_map(|exec| match &exec.stage {
            Stage::Running { pid } => Some(*pid),
            Stage::Entering(_) => None,
        });
        let main = self.state.container().map(|container| container.created.pid);
        running
            .chain(births().flat_map(Birth::children))
            .chain(main)
            .find_map(|pid| process::ended_child(Some(pid)).ok().flatten())
    }

    /// A child was reaped, so its number may be another's from now on.
    fn child_ended(&mut self, pid: i32, ended: ProcessEnded) {
        if self.state.container().is_some_and(|container| container.created.pid == pid) {
            self.main_ended(ended);
            return;
        }
        let failed = match &mut self.state {
            State::Preparing { making, .. } => making.birth.reaped(pid).err(),
            State::Waiting { birth, .. } | State::Starting { birth, .. } => birth.reaped(pid).err(),
            _ => None,
        };
        if let Some(failed) = failed {
            self.main_failed(failed);
        }
        for index in (0..self.execs.len()).rev() {
            let Some(exec) = self.execs.get_mut(index) else { continue };
            match &mut exec.stage {
                Stage::Running { pid: of_exec } if *of_exec == pid => {
                    let exec = self.execs.swap_remove(index);
                    let answer = Answer::Ended(Ended { exit_code: ended.code() });
                    self.reply(exec.connection, exec.request_id, answer);
                }
                Stage::Running { .. } => {}
                Stage::Entering(birth) => {
                    if let Err(failed) = birth.reaped(pid) {
                        self.fail_exec(index, failed);
                    }
                }
            }
        }
    }

    fn main_ended(&mut self, ended: ProcessEnded) {
        let finished_at_unix_ns = unix_ns(SystemTime::now());
        let signal = match ended {
            ProcessEnded::Signaled(signal) => signal,
            ProcessEnded::Exited(_) => 0,
        };
        let mut record =
            ExitRecord { exit_code: ended.code(), signal, finished_at_unix_ns, ..ExitRecord::default() };
        let has_risen = |container: &Container| {
            container.oom.as_ref().is_some_and(|oom| oom.has_risen(signal == SIGKILL))
        };
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Running { container, output, started } => {
                record.started_at_unix_ns = started.at_unix_ns;
                record.oom_killed = has_risen(&container);
                self.drain(*container, output, record);
            }
            State::Waiting { container, output, mut birth } => {
                // Nothing of it is to be killed any more.
                let _ = birth.reaped(container.created.pid);
                record.start_error = "the container's process was killed before its start".to_owned();
                record.oom_killed = has_risen(&container);
                self.drain(*container, output, record);
            }
            State::Starting { container, output, mut birth, asker } => {
                let _ = birth.reaped(container.created.pid);
                record.oom_killed = has_risen(&container);
                let failed = refused("start the container", handshake::KILLED);
                record.start_error = failed.to_string();
                self.drain(*container, output, record);
                self.tell(asker, Answer::Failed(failed));
            }
            other => self.state = other,
        }
    }

    /// Goes on to record the end as soon as the output is complete, or at once when `now`.
    fn finish_if_drained(&mut self, now: bool) {
        let State::Draining { output, record, .. } = &mut self.state else { return };
        if !output.ended() {
            if !now {
                return;
            }
            output.cut();
        }
        record.log_bytes_lost = output.lost_bytes();
        // Execs of a container that has ended were killed with it, or lose their container now.
        for exec in std::mem::take(&mut self.execs) {
            match &exec.stage {
                Stage::Entering(birth) => birth.kill(),
                Stage::Running { pid } => {
                    let _ = end_session(*pid, SIGKILL);
                }
            }
            self.reply(exec.connection, exec.request_id, Answer::Ended(Ended { exit_code: 137 }));
        }
        if let State::Draining { launch, record, .. } = std::mem::replace(&mut self.state, State::Empty) {
            self.state = State::Recording { launch, record, again: Instant::now() };
            self.record();
        }
    }

    /// Records the end and tells everybody of it. Room was reserved, so a full disk does not matter; what
    /// else a disk may have leaves the message, and another attempt as long as nobody has got one.
    fn record(&mut self) {
        let State::Recording { launch, record, again } = &mut self.state else { return };
        *again = Instant::now() + RECORD_AGAIN;
        let written = write_record(host_path(&launch.exit_record_path), record).is_ok();
        let exited = Answer::Exited(record.clone());
        self.tell_all(&exited);
        if written || !self.connections.is_empty() {
            self.state = State::Finished;
        }
    }
}

/// Signals a program of exec and its session, which it leads unless it was kept from it.
fn end_session(pid: i32, signal: i32) -> io::Result<()> {
    process::signal_group(pid, signal).or_else(|_| process::signal_child(pid, signal))
}

fn too_long(step: &str) -> Failed {
    refused(step, "it takes too long, and was given up")
}
