//! Programs of exec: those that run in the container besides its own.
//!
//! ```text
//!  Entering --its program--> Running --reaped--> Ended --its output passed on--> (answered)
//!     \--failed or too long, answered
//! ```
//! A program of exec belongs to its connection, and is killed when that ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use berth_shim_proto::control::{Ended, ExecRequest, Failed, Resize, reply::Answer};
use berth_shim_proto::launch::Cgroup;
use berth_sys::process::{self, RLIMIT_NOFILE};
use berth_sys::{socket, tty};

use super::{Asker, SIGKILL, Shim, State};
use crate::birth::{Birth, Progress};
use crate::failure::{Step, from_io, refused};
use crate::launch::{self, Streams};
use crate::relay::{self, Ends, Way};
use crate::session;

/// Descriptors that streams leave free for everything else: the container, daemons, and processes
/// that are starting.
const RESERVED_DESCRIPTORS: u64 = 64;

/// The most descriptors that an exec uses while it starts.
const DESCRIPTORS_OF_ONE: usize = 16;

/// How many children that were killed before their program may be unable to end. Each is one that
/// waits for a directory that the container keeps locked, or for its filesystem.
const MOST_ABANDONED: usize = 64;

/// A program of exec: starting, running, or ended.
#[derive(Debug)]
pub(super) struct Exec {
    /// The token of its wake-ups. Its streams are the group with this number.
    pub(super) token: u64,
    /// The connection that owns it, and the request to answer at its end.
    asker: Asker,
    pub(super) stage: Stage,
    terminal: Option<Terminal>,
}

/// The state of an [`Exec`].
#[derive(Debug)]
pub(super) enum Stage {
    Entering(Box<Birth>),
    /// Not reaped yet, so the pid is valid.
    Running {
        pid: i32,
    },
    /// Reaped. Its output is being passed on.
    Ended {
        exit_code: i32,
    },
}

/// The terminal of an exec.
#[derive(Debug)]
enum Terminal {
    /// The process creates it, and passes it on before its exec.
    Expected {
        handed_over: OwnedFd,
        /// Where the daemon waits for its side.
        taker: OwnedFd,
        size: Option<Resize>,
    },
    Open,
}

impl Exec {
    /// Its process, before the exec.
    pub(super) fn birth(&self) -> Option<&Birth> {
        match &self.stage {
            Stage::Entering(birth) => Some(birth),
            Stage::Running { .. } | Stage::Ended { .. } => None,
        }
    }

    /// Its program, until it is reaped.
    pub(super) fn running(&self) -> Option<i32> {
        match &self.stage {
            Stage::Running { pid } => Some(*pid),
            Stage::Entering(_) | Stage::Ended { .. } => None,
        }
    }
}

impl Shim {
    pub(super) fn exec(
        &mut self,
        request: &ExecRequest,
        descriptors: Vec<OwnedFd>,
        asker: Asker,
    ) -> Result<(), Failed> {
        const STEP: &str = "exec in the container";
        let State::Running { container, .. } = &self.state else {
            return Err(refused(STEP, "it is not running"));
        };
        if self.abandoned.len() >= MOST_ABANDONED {
            let detail = format!(
                "{} earlier ones were killed on their way in and cannot end: a filesystem of the container \
                 hangs, or it keeps its cgroup locked; end the container",
                self.abandoned.len()
            );
            return Err(refused(STEP, detail));
        }
        self.check_descriptors(STEP)?;
        let (birth, streams) = launch::exec(container, request, descriptors)?;
        let token = self.new_tokens(1);
        let watched = self.watch(&birth, token).and_then(|()| match streams {
            Streams::Pipes(pipes) => self.relay(pipes, token).map(|()| None),
            Streams::Terminal { handed_over, taker } => {
                Ok(Some(Terminal::Expected { handed_over, taker, size: None }))
            }
        });
        match watched {
            Ok(terminal) => {
                let stage = Stage::Entering(Box::new(birth));
                self.execs.push(Exec { token, asker, stage, terminal });
                Ok(())
            }
            Err(error) => {
                birth.kill();
                self.unwatch(&birth);
                self.relays.end(token, &self.poll);
                Err(from_io(&error, STEP, ""))
            }
        }
    }

    /// Whether there are descriptors for one more exec or client. Running out would cause failures
    /// in the middle of an operation, or when a daemon connects.
    pub(super) fn check_descriptors(&self, step: &str) -> Result<(), Failed> {
        let (most, _) = process::rlimit(RLIMIT_NOFILE).step(step, "")?;
        let of_clients = match &self.state {
            State::Waiting { output, .. }
            | State::Starting { output, .. }
            | State::Running { output, .. } => output.descriptors_of_clients(),
            _ => 0,
        };
        let used = self.relays.descriptors() + self.execs.len() * DESCRIPTORS_OF_ONE + of_clients;
        if u64::try_from(used).is_ok_and(|used| used + RESERVED_DESCRIPTORS <= most) {
            return Ok(());
        }
        let detail = format!(
            "the container's shim has as many streams open as its limit of {most} descriptors allows; \
             close some of them"
        );
        Err(refused(step, detail))
    }

    /// Begins the flows of the group `group`.
    fn relay(&mut self, pipes: Vec<Ends>, group: u64) -> std::io::Result<()> {
        pipes.into_iter().try_for_each(|ends| {
            let token = self.new_tokens(relay::TOKENS);
            self.relays.add(ends, group, token, &self.poll)
        })
    }

    pub(super) fn hear_exec(&mut self, index: usize) {
        let Some(exec) = self.execs.get_mut(index) else { return };
        let Stage::Entering(birth) = &mut exec.stage else { return };
        match birth.advance() {
            Err(failed) => self.fail_exec(index, failed),
            Ok(Progress::Executed) => {
                if let Some(pid) = birth.process()
                    && let Stage::Entering(birth) = std::mem::replace(&mut exec.stage, Stage::Running { pid })
                {
                    self.unwatch(&birth);
                    self.open_terminal(index, pid);
                }
            }
            Ok(Progress::Pending) => {}
        }
    }

    /// Takes the terminal of an exec that now runs its program, and gives the daemon one end of a
    /// socket for it.
    fn open_terminal(&mut self, index: usize, pid: i32) {
        let Some(exec) = self.execs.get_mut(index) else { return };
        let group = exec.token;
        let Some(Terminal::Expected { handed_over, taker, size }) = exec
            .terminal
            .replace(Terminal::Open)
            .filter(|terminal| matches!(terminal, Terminal::Expected { .. }))
        else {
            exec.terminal = None;
            return;
        };
        let opened = take_terminal(handed_over.as_fd(), taker.as_fd(), size)
            .and_then(|ends| self.relay(ends.into(), group).step(TERMINAL, ""));
        if let Err(failed) = opened {
            let _ = session::end(pid, SIGKILL, self.cgroup());
            self.fail_exec(index, failed);
        }
    }

    /// Ends an exec before its program has started.
    pub(super) fn fail_exec(&mut self, index: usize, failed: Failed) {
        let exec = self.execs.swap_remove(index);
        if let Some(birth) = exec.birth() {
            birth.kill();
            self.unwatch(birth);
            self.abandoned.extend(birth.children());
        }
        self.relays.end(exec.token, &self.poll);
        self.reply(exec.asker.connection, exec.asker.request_id, Answer::Failed(failed));
    }

    /// Fails every exec that has missed its deadline.
    pub(super) fn fail_late_execs(&mut self, now: Instant, failed: &Failed) {
        for index in (0..self.execs.len()).rev() {
            let birth = self.execs.get(index).and_then(Exec::birth);
            if birth.is_some_and(|birth| birth.deadline() <= now) {
                self.fail_exec(index, failed.clone());
            }
        }
    }

    /// Handles a reaped child that may belong to an exec.
    pub(super) fn exec_child_ended(&mut self, pid: i32, exit_code: i32) {
        self.abandoned.retain(|abandoned| *abandoned != pid);
        for index in (0..self.execs.len()).rev() {
            let Some(exec) = self.execs.get_mut(index) else { continue };
            match &mut exec.stage {
                Stage::Running { pid: of_exec } if *of_exec == pid => {
                    exec.stage = Stage::Ended { exit_code };
                    let group = exec.token;
                    self.relays.settle(group, &self.poll);
                    self.answer_if_settled(group);
                }
                Stage::Running { .. } | Stage::Ended { .. } => {}
                Stage::Entering(birth) => {
                    if let Err(failed) = birth.reaped(pid) {
                        self.fail_exec(index, failed);
                    }
                }
            }
        }
    }

    /// Reports the end of an exec once its output is relayed. Output of other processes continues.
    pub(super) fn answer_if_settled(&mut self, group: u64) {
        let Some(index) = self.execs.iter().position(|exec| exec.token == group) else { return };
        let Some(Exec { stage: Stage::Ended { exit_code }, asker, .. }) = self.execs.get(index) else {
            return;
        };
        if self.relays.is_settled(group) {
            let (asker, answer) = (*asker, Answer::Ended(Ended { exit_code: *exit_code }));
            self.execs.swap_remove(index);
            self.reply(asker.connection, asker.request_id, answer);
        }
    }

    pub(super) fn signal_exec(&self, token: u64, request_id: u64, signal: i32) -> Result<(), Failed> {
        let asker = Asker { connection: token, request_id };
        match self.execs.iter().find(|exec| exec.asker == asker).map(|exec| &exec.stage) {
            Some(Stage::Running { pid }) => session::end(*pid, signal, self.cgroup())
                .map_err(|error| from_io(&error, "signal the program", signal)),
            // There is no program yet that could handle a signal, so any signal ends it.
            Some(Stage::Entering(birth)) => {
                birth.kill();
                Ok(())
            }
            Some(Stage::Ended { .. }) | None => Err(refused("signal the program", "it has ended")),
        }
    }

    /// Sets the size of the terminal of an exec, now or as soon as it has one.
    pub(super) fn resize_exec(&mut self, connection: u64, resize: Resize) -> Result<(), Failed> {
        let asker = Asker { connection, request_id: resize.request_id };
        let exec = self.execs.iter_mut().find(|exec| exec.asker == asker);
        let exec = exec.ok_or_else(|| refused(RESIZE, "it has ended"))?;
        match &mut exec.terminal {
            Some(Terminal::Expected { size, .. }) => {
                *size = Some(resize);
                Ok(())
            }
            Some(Terminal::Open) => match self.relays.source(exec.token) {
                Some(terminal) => set_size(terminal, resize),
                None => Err(refused(RESIZE, "it is closed")),
            },
            None => Err(refused(RESIZE, "the program has none")),
        }
    }

    /// Kills the execs of a closed connection. Their ends are handled as those of other children.
    pub(super) fn end_execs_of(&self, connection: u64) {
        for exec in self.execs.iter().filter(|exec| exec.asker.connection == connection) {
            self.kill_exec(exec);
        }
    }

    /// Ends all execs of a container that has ended: they were killed with it, or lose their
    /// container now.
    pub(super) fn end_execs(&mut self) {
        for exec in std::mem::take(&mut self.execs) {
            self.kill_exec(&exec);
            let exit_code = match exec.stage {
                Stage::Ended { exit_code } => exit_code,
                Stage::Entering(_) | Stage::Running { .. } => 137,
            };
            self.reply(exec.asker.connection, exec.asker.request_id, Answer::Ended(Ended { exit_code }));
        }
    }

    fn kill_exec(&self, exec: &Exec) {
        match &exec.stage {
            Stage::Entering(birth) => birth.kill(),
            Stage::Running { pid } => {
                // It may have ended already.
                let _ = session::end(*pid, SIGKILL, self.cgroup());
            }
            Stage::Ended { .. } => {}
        }
    }

    fn cgroup(&self) -> Option<&Cgroup> {
        self.state.launch().map(|launch| &launch.cgroup)
    }
}

const TERMINAL: &str = "open a terminal";

const RESIZE: &str = "resize the terminal";

/// The flows of a received terminal, whose other side is sent to the daemon.
fn take_terminal(
    handed_over: BorrowedFd<'_>,
    taker: BorrowedFd<'_>,
    size: Option<Resize>,
) -> Result<[Ends; 2], Failed> {
    // It has executed its program, so it has already sent this.
    berth_sys::file::set_nonblocking(handed_over).step(TERMINAL, "")?;
    let (_, descriptors) = socket::receive(handed_over, &mut [0]).step(TERMINAL, "")?;
    let terminal = descriptors
        .into_iter()
        .next()
        .ok_or_else(|| refused(TERMINAL, "no descriptor came with the request"))?;
    if let Some(size) = size {
        set_size(terminal.as_fd(), size)?;
    }
    let (ours, theirs) = socket::stream_pair().step(TERMINAL, "")?;
    // A daemon that does not read has room for this byte. One that is gone ends the program in
    // other ways.
    berth_sys::file::set_nonblocking(taker).step(TERMINAL, "")?;
    let _ = socket::send(taker, b"T", &[theirs.as_fd()]);
    let copies = (terminal.try_clone().step(TERMINAL, "")?, ours.try_clone().step(TERMINAL, "")?);
    Ok([
        Ends { way: Way::Out, from: terminal, to: ours },
        Ends { way: Way::In, from: copies.1, to: copies.0 },
    ])
}

pub(super) fn set_size(terminal: BorrowedFd<'_>, Resize { columns, rows, .. }: Resize) -> Result<(), Failed> {
    let number = |number: u32| u16::try_from(number).map_err(|_| refused(RESIZE, "the size is out of range"));
    tty::set_size(terminal, number(columns)?, number(rows)?).step(RESIZE, "")
}
