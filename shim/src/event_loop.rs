//! The shim's one loop: every wake-up is one variant of [`Event`], and every change of the container's state happens here.
//!
//! ```text
//!  Empty --Create--> Waiting --Start--> Running --main process ended--> Draining --output at its end, or time up--> (exit)
//!    |                  |  \--Start failed, or killed--------------------------^
//!    |                  \--Discard--> (exit, nothing recorded)
//!    \--last connection closed--> (exit)
//! ```
//! Waiting and Running outlive the daemon: without a connection the shim goes on, and listens. The exit record is on disk before
//! anybody is told.

use crate::connection::{Connection, Incoming};
use crate::exit::{unix_ns, write_record};
use crate::failure::{Step, refused};
use crate::init::host_path;
use crate::launch::{self, Container, Exec};
use crate::stdio::Output;
use berth_shim_proto::control::{
    Created, Ended, Failed, Phase, Reply, Request, Started, reply::Answer, request::Call,
};
use berth_shim_proto::exit_record::ExitRecord;
use berth_shim_proto::launch::{Launch, PidNamespace};
use berth_sys::poll::{ChildSignals, Poll};
use berth_sys::process::{self, Ended as ProcessEnded};
use berth_sys::socket;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

/// The name of the socket in the container's state directory.
const SOCKET: &str = "shim.sock";

/// How long after the end of the main process its output may take to end: somebody outside of the container can hold the pipe open.
const DRAIN: Duration = Duration::from_secs(2);

/// How long a last message may wait for the daemon to read it. The daemon finds the exit record without it.
const FAREWELL: Duration = Duration::from_secs(1);

/// Daemons that may be connected at once; one is the rule, two happen at a restart.
const MAX_CONNECTIONS: usize = 4;

/// What a container exits with whose program could not be started: as shells and docker say it, POSIX "Exit Status for Commands".
fn start_failure_code(failed: &Failed) -> i32 {
    const ENOENT: i32 = 2;
    const ENOEXEC: i32 = 8;
    const EACCES: i32 = 13;
    match (failed.step.as_str(), failed.errno) {
        (crate::execute::EXECUTE, ENOENT) => 127,
        (crate::execute::EXECUTE, EACCES | ENOEXEC) => 126,
        _ => 128,
    }
}

const SIGKILL: i32 = 9;

const TOKEN_CHILDREN: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
const TOKEN_OUTPUT: u64 = 2;
const TOKEN_ERROR: u64 = 3;
const TOKEN_OOM: u64 = 4;
/// Connections count up from here.
const TOKEN_CONNECTION: u64 = 16;

/// Everything that wakes the shim.
enum Event {
    ChildrenEnded,
    ConnectionWaits,
    OutputReadable(u64),
    OomCounterChanged,
    ConnectionReady { token: u64, writable: bool },
    DrainTimeOver,
}

enum State {
    Empty,
    Waiting { container: Box<Container>, output: Output },
    Running { container: Box<Container>, output: Output, started: Started },
    Draining { launch: Box<Launch>, output: Output, record: ExitRecord, deadline: Instant },
    Finished,
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

/// Serves the container until it has ended: `connection` leads to the daemon, `directory` is where to listen for the next one.
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
    let first = Connection::new(connection, TOKEN_CONNECTION, &poll)?;
    let mut shim = Shim {
        poll,
        children,
        listener,
        connections: vec![first],
        next_token: TOKEN_CONNECTION + 1,
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
        let timeout = match &self.state {
            State::Draining { deadline, .. } => Some(deadline.saturating_duration_since(Instant::now())),
            _ => None,
        };
        let mut events: Vec<Event> = self
            .poll
            .wait(timeout)?
            .into_iter()
            .map(|ready| match ready.token {
                TOKEN_CHILDREN => Event::ChildrenEnded,
                TOKEN_LISTENER => Event::ConnectionWaits,
                TOKEN_OUTPUT | TOKEN_ERROR => Event::OutputReadable(ready.token),
                TOKEN_OOM => Event::OomCounterChanged,
                token => Event::ConnectionReady { token, writable: ready.writable },
            })
            .collect();
        if let State::Draining { deadline, .. } = &self.state
            && Instant::now() >= *deadline
        {
            events.push(Event::DrainTimeOver);
        }
        Ok(events)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::ChildrenEnded => self.reap(),
            Event::ConnectionWaits => self.accept(),
            Event::OutputReadable(token) => {
                if let State::Waiting { output, .. }
                | State::Running { output, .. }
                | State::Draining { output, .. } = &mut self.state
                {
                    output.readable(token);
                }
                self.finish_if_drained(false);
            }
            Event::OomCounterChanged => self.look_at_oom_counter(),
            Event::ConnectionReady { token, writable } => self.serve(token, writable),
            Event::DrainTimeOver => self.finish_if_drained(true),
        }
    }

    fn look_at_oom_counter(&mut self) {
        let (State::Waiting { container, .. } | State::Running { container, .. }) = &mut self.state else {
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
        if let Ok(connection) = Connection::new(socket, self.next_token, &self.poll) {
            self.next_token += 1;
            self.connections.push(connection);
        }
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
        self.connections.retain(|connection| connection.token() != token);
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
        let result = match request.call {
            None => Err(refused("understand the request", "a call that this shim does not know")),
            Some(Call::Create(launch)) => self.create(*launch).map(|created| Some(Answer::Created(created))),
            Some(Call::Start(())) => self.start().map(|started| Some(Answer::Started(started))),
            Some(Call::Exec(exec)) => match &self.state {
                State::Running { container, .. } => launch::exec(container, &exec, descriptors).map(|pid| {
                    self.execs.push(Exec { pid, connection: token, request_id: id });
                    None
                }),
                _ => Err(refused("exec in the container", "it is not running")),
            },
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

    fn create(&mut self, launch: Launch) -> Result<Created, Failed> {
        if !matches!(self.state, State::Empty) {
            return Err(refused("prepare the container", "this shim has one already"));
        }
        let made = launch::create(launch)?;
        let created = made.container.created.clone();
        let container = Box::new(made.container);
        match Output::watch(&container.launch, made.streams, made.log, &self.poll, TOKEN_OUTPUT) {
            Ok(output) => {
                if let Some(file) = container.oom.as_ref().and_then(crate::exit::OomCounter::changing) {
                    // Without it the counter is read at the end, which is soon enough almost always.
                    let _ = self.poll.watch_content(file, TOKEN_OOM);
                }
                self.state = State::Waiting { container, output };
                Ok(created)
            }
            Err(error) => {
                launch::end_child(container.created.pid, &container.pidfd);
                Err(crate::failure::from_io(&error, "watch the output", ""))
            }
        }
    }

    fn start(&mut self) -> Result<Started, Failed> {
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Waiting { mut container, output } => {
                let result = match container.handshake.take() {
                    Some(handshake) => handshake.go(),
                    None => Err(refused("start the container", "it was started before")),
                };
                let now = SystemTime::now();
                match result {
                    Ok(()) => {
                        let started = Started { at_unix_ns: unix_ns(now) };
                        self.state = State::Running { container, output, started };
                        Ok(started)
                    }
                    Err(failed) => {
                        launch::end_child(container.created.pid, &container.pidfd);
                        let record = ExitRecord {
                            exit_code: start_failure_code(&failed),
                            oom_killed: container.oom.as_ref().is_some_and(|oom| oom.has_risen(false)),
                            finished_at_unix_ns: unix_ns(now),
                            start_error: failed.to_string(),
                            ..ExitRecord::default()
                        };
                        self.drain(*container, output, record);
                        Err(failed)
                    }
                }
            }
            other => {
                self.state = other;
                Err(refused("start the container", "it does not wait for its start"))
            }
        }
    }

    fn drain(&mut self, container: Container, output: Output, record: ExitRecord) {
        if !matches!(container.launch.namespaces.pid, Some(PidNamespace::Own(()))) {
            crate::exit::end_the_rest(&container.launch.cgroup);
        }
        let launch = Box::new(container.launch);
        self.state = State::Draining { launch, output, record, deadline: Instant::now() + DRAIN };
    }

    fn signal(&self, signal: i32) -> Result<(), Failed> {
        match &self.state {
            State::Waiting { container, .. } | State::Running { container, .. } => {
                process::signal_pidfd(container.pidfd.as_fd(), signal)
                    .map_err(|error| crate::failure::from_io(&error, "signal the container", signal))
            }
            _ => Err(refused("signal the container", "it has ended")),
        }
    }

    fn signal_exec(&self, token: u64, request_id: u64, signal: i32) -> Result<(), Failed> {
        let exec = self.execs.iter().find(|exec| exec.connection == token && exec.request_id == request_id);
        match exec {
            // It leads a session of its own, and it has not been reaped, so the number is still its group's.
            Some(exec) => process::signal_group(exec.pid, signal)
                .map_err(|error| crate::failure::from_io(&error, "signal the exec", signal)),
            None => Err(refused("signal the exec", "it has ended")),
        }
    }

    fn reopen_log(&mut self) -> Result<(), Failed> {
        match &mut self.state {
            State::Running { output, .. } => output.reopen_log(),
            _ => Err(refused("open the log anew", "the container is not running")),
        }
    }

    fn phase(&self) -> Phase {
        match &self.state {
            State::Waiting { container, .. } => {
                Phase { created: Some(container.created.clone()), started: None }
            }
            State::Running { container, started, .. } => {
                Phase { created: Some(container.created.clone()), started: Some(*started) }
            }
            State::Empty | State::Draining { .. } | State::Finished => Phase::default(),
        }
    }

    fn discard(&mut self) {
        if let State::Waiting { container, .. } | State::Running { container, .. } = &self.state {
            launch::end_child(container.created.pid, &container.pidfd);
        }
        self.state = State::Finished;
    }

    /// One waiter for all children: the main process, execs, and orphans of either that became the shim's.
    fn reap(&mut self) {
        self.children.clear();
        while let Ok(Some((pid, ended))) = process::reap_any() {
            let main = match &self.state {
                State::Waiting { container, .. } | State::Running { container, .. } => container.created.pid,
                _ => 0,
            };
            if pid == main {
                self.main_ended(ended);
            } else if let Some(index) = self.execs.iter().position(|exec| exec.pid == pid) {
                let exec = self.execs.swap_remove(index);
                self.reply(
                    exec.connection,
                    exec.request_id,
                    Answer::Ended(Ended { exit_code: ended.code() }),
                );
            }
        }
        self.finish_if_drained(false);
    }

    fn main_ended(&mut self, ended: ProcessEnded) {
        let finished_at_unix_ns = unix_ns(SystemTime::now());
        let signal = match ended {
            ProcessEnded::Signaled(signal) => signal,
            ProcessEnded::Exited(_) => 0,
        };
        let mut record =
            ExitRecord { exit_code: ended.code(), signal, finished_at_unix_ns, ..ExitRecord::default() };
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Running { container, output, started } => {
                record.started_at_unix_ns = started.at_unix_ns;
                record.oom_killed =
                    container.oom.as_ref().is_some_and(|oom| oom.has_risen(signal == SIGKILL));
                self.drain(*container, output, record);
            }
            State::Waiting { container, output } => {
                record.start_error = "the container's process was killed before its start".to_owned();
                record.oom_killed =
                    container.oom.as_ref().is_some_and(|oom| oom.has_risen(signal == SIGKILL));
                self.drain(*container, output, record);
            }
            other => self.state = other,
        }
    }

    /// Records the end as soon as the output is complete, or at once when `now`.
    fn finish_if_drained(&mut self, now: bool) {
        let State::Draining { launch, output, record, .. } = &mut self.state else { return };
        if !output.ended() {
            if !now {
                return;
            }
            output.cut();
        }
        record.log_bytes_lost = output.lost_bytes();
        // A full disk takes the record all the same more often than not, a few bytes in place of what Remove frees. If it does
        // not, the daemon finds neither shim nor record, and reports the end as unknown: it is told nothing that is not so.
        let written = write_record(host_path(&launch.exit_record_path), record);
        // Execs of a container that has ended were killed with it, or lose their container now.
        for exec in std::mem::take(&mut self.execs) {
            let _ = process::signal_group(exec.pid, 9);
            self.reply(exec.connection, exec.request_id, Answer::Ended(Ended { exit_code: 137 }));
        }
        if written.is_ok() {
            let tokens: Vec<u64> = self.connections.iter().map(Connection::token).collect();
            for token in tokens {
                self.reply(token, 0, Answer::Exited(()));
            }
        }
        self.state = State::Finished;
    }
}
