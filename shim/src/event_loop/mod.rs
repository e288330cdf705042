//! The shim's one loop: every wake-up is one variant of [`Event`], and every change of the
//! container's state happens here: those of its main process in `main_process`, of execs in
//! `execs`, of attached clients in `attach`, and of its log in `log`.
//!
//! ```text
//!  Empty --Create--> Preparing --ready--> Waiting --Start--> Starting --exec--> Running --ended--> Draining
//!    |  ^---failed or too long---/           |                  \--failed, too long or killed---------^
//!    |                                       \--Discard--> (exit, nothing recorded)
//!    \--last connection closed--> (exit)
//!
//!  Draining --output at its end and in the log, or time up--> Recording --recorded, or sent--> (exit)
//! ```
//! From Waiting on, the shim outlives the daemon: without a connection it keeps running, and
//! listens. The exit record is on disk before it is reported, unless the disk refuses it; then
//! connected daemons get it, and without any it is retried.
//!
//! Nothing here waits for the log ([`crate::log_queue`]), or for a process of the container:
//! messages of one that is still on its way to its program ([`Birth`]) are read when they arrive,
//! and it is killed at its deadline.

mod attach;
mod execs;
mod log;
mod main_process;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use berth_shim_proto::SOCKET;
use berth_shim_proto::control::{
    Failed, Phase, Reply, Request, Started, VERSION, reply::Answer, request::Call,
};
use berth_shim_proto::exit_record::ExitRecord;
use berth_shim_proto::launch::Launch;
use berth_sys::poll::{ChildSignals, Interest, Poll, Ready};
use berth_sys::process::{self, Child, Ended as ProcessEnded, SIGKILL};
use berth_sys::socket;

use crate::aside;
use crate::birth::Birth;
use crate::connection::{Connection, Incoming};
use crate::failure::{Step, refused};
use crate::launch::{Container, Making};
use crate::log_queue::Log;
use crate::log_writer::Writer;
use crate::relay::Relays;
use crate::stdio::Output;
use execs::Exec;

/// How long after the end of the main process its output may take to end: a process outside the
/// container can hold the pipe open.
const DRAIN: Duration = Duration::from_secs(2);

/// How long a last message may wait for the daemon to read it. The daemon finds the exit record
/// without it.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long a client may take to read the rest of its program's output when the container is over.
const PARTING: Duration = Duration::from_secs(10);

/// How long processes of the shim may take to end when nothing else is left to do: its log's
/// writer, which normally is not stuck, and those that were killed. A parent that adopts them after
/// the shim may not reap them.
const LEAVING: Duration = Duration::from_secs(1);

/// The most connected daemons; usually there is one, and two during a restart.
const MAX_CONNECTIONS: usize = 4;

const TOKEN_CHILDREN: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
const TOKEN_OUTPUT: u64 = 2;
const TOKEN_ERROR: u64 = 3;
const TOKEN_OOM: u64 = 4;
const TOKEN_MAIN: u64 = 5;
const TOKEN_LOG: u64 = 6;
/// Connections and execs count up from here.
const TOKEN_FIRST: u64 = 16;

/// The pause before a failed write of the exit record is retried.
const RECORD_AGAIN: Duration = Duration::from_secs(1);

/// Everything that wakes the shim.
enum Event {
    ChildrenEnded,
    ConnectionWaits,
    OutputReadable(u64),
    OomCounterChanged,
    MainProcessSpoke,
    LogReady(Ready),
    /// A connection, the process of an exec, or a stream.
    Ready(Ready),
    TimeOver,
}

/// A request that is answered later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

    /// The container's streams, until they are drained.
    fn output(&self) -> Option<&Output> {
        match self {
            Self::Waiting { output, .. }
            | Self::Starting { output, .. }
            | Self::Running { output, .. }
            | Self::Draining { output, .. } => Some(output),
            _ => None,
        }
    }

    /// As [`output`](Self::output).
    fn output_mut(&mut self) -> Option<&mut Output> {
        match self {
            Self::Waiting { output, .. }
            | Self::Starting { output, .. }
            | Self::Running { output, .. }
            | Self::Draining { output, .. } => Some(output),
            _ => None,
        }
    }

    /// The plan of the container, once it has a main process.
    fn launch(&self) -> Option<&Launch> {
        match self {
            Self::Draining { launch, .. } | Self::Recording { launch, .. } => Some(launch),
            _ => self.container().map(|container| &container.launch),
        }
    }

    /// The main process, before it has executed its program.
    fn birth(&self) -> Option<&Birth> {
        match self {
            Self::Preparing { making, .. } => Some(&making.birth),
            Self::Waiting { birth, .. } | Self::Starting { birth, .. } => Some(birth),
            _ => None,
        }
    }

    /// The deadlines.
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
    /// Children of failed execs that were not reaped yet.
    abandoned: Vec<i32>,
    relays: Relays,
    /// The flows of clients to the container's input.
    inputs: Vec<u64>,
    /// The future writer of the container's log, until there is a container.
    writer: Option<Writer>,
    /// Requests to reopen the log, with their deadlines; the answers come in this order.
    reopens: VecDeque<Option<(Asker, Instant)>>,
}

/// Serves the container until it has ended: `connection` leads to the daemon, and the shim listens
/// in `directory` for the next one.
///
/// # Errors
/// When the shim cannot work: no descriptors, no epoll, or the socket's name is taken.
pub(crate) fn run(connection: OwnedFd, directory: OwnedFd) -> io::Result<()> {
    let (writer, poll, children, listener) = match prepare(&directory) {
        Ok(prepared) => prepared,
        Err(failed) => {
            // Without a request there is none to answer, so it is sent as an event.
            let reply = Reply { id: 0, answer: Some(Answer::Failed(failed)) };
            if let Ok(bytes) = berth_shim_proto::frame::encode(&reply) {
                socket::send(connection.as_fd(), &bytes, &[])?;
            }
            drop(connection);
            reap_the_rest()?;
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
        abandoned: Vec::new(),
        relays: Relays::default(),
        inputs: Vec::new(),
        writer: Some(writer),
        reopens: VecDeque::new(),
    };
    while !matches!(shim.state, State::Finished) {
        for event in shim.wait()? {
            shim.handle(event);
        }
    }
    for connection in &mut shim.connections {
        connection.flush_before_end(&shim.poll, FAREWELL);
    }
    shim.pass_on_the_rest()?;
    reap_the_rest()
}

/// Reaps children as they end, for a limited time.
fn reap_the_rest() -> io::Result<()> {
    let (poll, children) = (Poll::new()?, ChildSignals::new()?);
    poll.watch(children.as_fd(), TOKEN_CHILDREN, Interest::Input)?;
    let deadline = Instant::now() + LEAVING;
    while process::has_children()? {
        children.clear();
        if process::reap_any()?.is_some() {
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        poll.wait(Some(left))?;
    }
    Ok(())
}

/// What a shim needs before it can serve requests.
fn prepare(directory: &OwnedFd) -> Result<(Writer, Poll, ChildSignals, OwnedFd), Failed> {
    const STEP: &str = "start the container's shim";
    let writer = Writer::spawn().step(STEP, "create the log writer")?;
    process::become_subreaper().step(STEP, "adopt orphans")?;
    let poll = Poll::new().step(STEP, "epoll")?;
    let children = ChildSignals::new().step(STEP, "signals")?;
    poll.watch(children.as_fd(), TOKEN_CHILDREN, Interest::Input).step(STEP, "signals")?;
    // The first step that needs space on the filesystem of the runtime state.
    let listener = socket::listen_below(directory.as_fd(), SOCKET).step(STEP, SOCKET)?;
    poll.watch(listener.as_fd(), TOKEN_LISTENER, Interest::Input).step(STEP, SOCKET)?;
    Ok((writer, poll, children, listener))
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
                TOKEN_LOG => Event::LogReady(ready),
                _ => Event::Ready(ready),
            })
            .collect();
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            events.push(Event::TimeOver);
        }
        Ok(events)
    }

    /// The earliest deadline.
    fn deadline(&self) -> Option<Instant> {
        let of_execs = self.execs.iter().filter_map(|exec| exec.birth().map(Birth::deadline));
        let of_reopens = self.reopens.iter().flatten().map(|(_, deadline)| *deadline);
        let of_log = self.state.log().and_then(Log::deadline);
        of_execs.chain(of_reopens).chain(of_log).chain(self.state.deadline()).min()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::ChildrenEnded => self.reap(),
            Event::ConnectionWaits => self.accept(),
            Event::OutputReadable(token) => {
                if let Some(output) = self.state.output_mut() {
                    let untold = output.readable(token, &self.poll);
                    self.say_last_words(untold);
                }
                self.finish_if_drained(false);
            }
            Event::OomCounterChanged => self.look_at_oom_counter(),
            Event::MainProcessSpoke => {
                self.hear_main();
                self.reap();
            }
            Event::LogReady(ready) => self.log_ready(ready),
            Event::Ready(ready) => match self.execs.iter().position(|exec| exec.token == ready.token) {
                Some(index) => {
                    self.hear_exec(index);
                    self.reap();
                }
                None => match self.relays.ready(ready, &self.poll) {
                    Some(group) => {
                        self.answer_if_settled(group);
                        let execs = &self.execs;
                        let in_use = |group| execs.iter().any(|exec| exec.token == group);
                        self.relays.drop_orphans(in_use, &self.poll);
                        self.look_after_input();
                    }
                    None if self.client_left(ready.token) => {}
                    None => self.serve(ready.token, ready.writable),
                },
            },
            Event::TimeOver => self.time_over(),
        }
    }

    /// Acts on every deadline that has passed.
    fn time_over(&mut self) {
        let now = Instant::now();
        self.fail_late_execs(now, &too_long("run the program"));
        self.fail_late_reopens(now);
        if let Some(log) = self.state.log_mut() {
            log.time_over(now);
        }
        if self.state.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        match &self.state {
            State::Preparing { making, .. } => {
                let late_log = making.log.as_ref().filter(|log| !log.is_open()).map(Log::late);
                self.main_failed(late_log.unwrap_or_else(|| too_long("prepare the container")));
            }
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
            // It would stay ready forever. That it is no longer watched is intended.
            let _ = self.poll.forget(file);
        }
    }

    fn accept(&mut self) {
        let Ok(socket) = socket::accept(self.listener.as_fd()) else { return };
        // Only root can access the directory; this is a second check.
        if !matches!(socket::peer_uid(socket.as_fd()), Ok(0)) || self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let token = self.new_tokens(1);
        if let Ok(connection) = Connection::new(socket, token, &self.poll) {
            self.connections.push(connection);
            if matches!(self.state, State::Recording { .. }) {
                self.record();
            }
        }
    }

    /// Reserves this many unused tokens, and returns the first.
    fn new_tokens(&mut self, count: u64) -> u64 {
        self.next_token += count;
        self.next_token - count
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
            self.end_execs_of(token);
        }
        self.finish_if_unwanted();
    }

    /// Ends a shim without a container and without a connection that could create one.
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
            None => Err(refused("handle the request", "this shim does not support the call")),
            Some(Call::Create(launch)) => self.create(*launch, descriptors, asker).map(|()| None),
            Some(Call::Start(())) => self.start(asker).map(|()| None),
            Some(Call::Exec(exec)) => self.exec(&exec, descriptors, asker).map(|()| None),
            Some(Call::Signal(signal)) => self.signal(signal).map(|()| Some(Answer::Done(()))),
            Some(Call::SignalExec(target)) => {
                self.signal_exec(token, target.request_id, target.signal).map(|()| Some(Answer::Done(())))
            }
            Some(Call::Resize(resize)) => match resize.request_id {
                0 => self.resize_main(resize),
                _ => self.resize_exec(token, resize),
            }
            .map(|()| Some(Answer::Done(()))),
            Some(Call::Attach(attach)) => self.attach(attach, descriptors).map(|()| Some(Answer::Done(()))),
            Some(Call::ReopenLog(())) => {
                self.reopen_log(asker).map(|is_done| is_done.then_some(Answer::Done(())))
            }
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

    fn watch(&self, birth: &Birth, token: u64) -> io::Result<()> {
        birth.sources().try_for_each(|source| self.poll.watch(source, token, Interest::Input))
    }

    /// As with [`Connection::forget`].
    fn unwatch(&self, birth: &Birth) {
        for source in birth.sources() {
            let _ = self.poll.forget(source);
        }
    }

    /// Answers an earlier request.
    fn tell(&mut self, asker: Asker, answer: Answer) {
        if self.connections.iter().any(|connection| connection.token() == asker.connection) {
            self.reply(asker.connection, asker.request_id, answer);
        } else if let Answer::Started(_) = answer {
            // A later connection has seen it starting.
            self.tell_all(&answer);
        }
    }

    fn tell_all(&mut self, answer: &Answer) {
        let tokens: Vec<u64> = self.connections.iter().map(Connection::token).collect();
        for token in tokens {
            self.reply(token, 0, answer.clone());
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

    /// The only waiter for all children: the main process, execs, and orphans of either that the
    /// shim has adopted.
    fn reap(&mut self) {
        self.children.clear();
        while let Some(pid) = self.ended_child() {
            // Its last messages are read before it is dropped.
            self.hear_main();
            for index in (0..self.execs.len()).rev() {
                self.hear_exec(index);
            }
            match process::reap_or_running(pid) {
                Ok(Child::Ended(ended)) => {
                    aside::reaped(pid);
                    self.child_ended(pid, ended);
                }
                _ => break,
            }
        }
        self.finish_if_drained(false);
    }

    /// Handles a child that has ended. A process that its maker has not named yet looks like an
    /// orphan: as long as one may exist, only known children are reaped, so that no pid is reused
    /// before it is known.
    fn ended_child(&self) -> Option<i32> {
        let births = || self.execs.iter().filter_map(Exec::birth).chain(self.state.birth());
        if !births().any(Birth::expects_successor) {
            return process::ended_child(None).ok().flatten();
        }
        let running = self.execs.iter().filter_map(Exec::running);
        let main = self.state.container().map(|container| container.created.pid);
        let writer = self.state.log().and_then(Log::writer);
        running
            .chain(births().flat_map(Birth::children))
            .chain(main)
            .chain(writer)
            .find_map(|pid| process::ended_child(Some(pid)).ok().flatten())
    }

    /// Notes that a child was reaped, so its pid may be reused.
    fn child_ended(&mut self, pid: i32, ended: ProcessEnded) {
        if self.state.container().is_some_and(|container| container.created.pid == pid) {
            self.main_ended(ended);
            return;
        }
        if self.log_child_ended(pid) {
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
        self.exec_child_ended(pid, ended.code());
    }
}

impl Shim {
    /// Relays the remaining output of execs when the container is over. For everyone else this shim
    /// has ended: no daemon can connect any more, and its own has everything.
    fn pass_on_the_rest(self) -> io::Result<()> {
        let Self { poll, mut relays, children, listener, connections, writer, .. } = self;
        for connection in &connections {
            connection.forget(&poll);
        }
        for descriptor in [children.as_fd(), listener.as_fd()] {
            let _ = poll.forget(descriptor);
        }
        drop((listener, connections, children, writer));
        relays.settle_all(&poll);
        let deadline = Instant::now() + PARTING;
        while !relays.are_settled() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            for ready in poll.wait(Some(left))? {
                relays.ready(ready, &poll);
            }
        }
        Ok(())
    }
}

fn too_long(step: &str) -> Failed {
    refused(step, "it took too long")
}
