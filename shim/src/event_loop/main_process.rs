//! The container's main process: from its creation to the record of its end.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Instant, SystemTime};

use berth_shim_proto::control::{Failed, Started, reply::Answer};
use berth_shim_proto::exit_record::ExitRecord;
use berth_shim_proto::launch::{Launch, PidNamespace};
use berth_sys::process::{self, Ended as ProcessEnded};

use super::{
    Asker, DRAIN, RECORD_AGAIN, SIGKILL, Shim, State, TOKEN_LOG, TOKEN_MAIN, TOKEN_OOM, TOKEN_OUTPUT,
};
use crate::birth::Progress;
use crate::exit::{drop_reservation, unix_ns, write_record};
use crate::failure::{from_io, refused};
use crate::handshake;
use crate::host_path::host_path;
use crate::launch::{self, Container};
use crate::log_queue::Log;
use crate::stdio::Output;

/// The exit code of a container whose program could not be started, as in shells and docker: POSIX
/// "Exit Status for Commands".
fn start_failure_code(failed: &Failed) -> i32 {
    failed.shell_code().unwrap_or(128)
}

impl Shim {
    pub(super) fn create(
        &mut self,
        launch: Launch,
        descriptors: Vec<OwnedFd>,
        asker: Asker,
    ) -> Result<(), Failed> {
        if !matches!(self.state, State::Empty) {
            return Err(refused("prepare the container", "this shim already has one"));
        }
        let writer = self.writer.take().ok_or_else(|| refused("open the log", "it has no writer"))?;
        let log = Log::open(&launch, writer, TOKEN_LOG, &self.poll)?;
        let making = launch::create(launch, descriptors, log)?;
        if let Err(error) = self.watch(&making.birth, TOKEN_MAIN) {
            making.birth.kill();
            return Err(from_io(&error, "watch the container's process", ""));
        }
        self.state = State::Preparing { making: Box::new(making), asker };
        Ok(())
    }

    pub(super) fn start(&mut self, asker: Asker) -> Result<(), Failed> {
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

    /// Receives messages of the main process before its exec.
    pub(super) fn hear_main(&mut self) {
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

    /// Moves a prepared container to Waiting.
    pub(super) fn main_waits(&mut self) {
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
                    // Without it the counter is read at the end, which is nearly always soon
                    // enough.
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

    /// The main process has executed its program.
    pub(super) fn main_runs(&mut self) {
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Starting { container, output, birth, asker } => {
                self.unwatch(&birth);
                drop(birth);
                let started = Started { at_unix_ns: unix_ns(SystemTime::now()) };
                self.state = State::Running { container, output, started };
                self.tell(asker, Answer::Started(started));
            }
            other => self.state = other,
        }
    }

    /// The main process will not execute its program. It is killed; what that means depends on the
    /// state.
    pub(super) fn main_failed(&mut self, failed: Failed) {
        if let Some(birth) = self.state.birth() {
            birth.kill();
            self.unwatch(birth);
        }
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Preparing { mut making, asker } => {
                if let Some(log) = &mut making.log {
                    log.close(&self.poll);
                }
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
                // It will be reaped, and its end recorded then; until then there are no more
                // messages.
                self.state = State::Waiting { container, output, birth };
            }
            other => self.state = other,
        }
    }

    pub(super) fn drain(&mut self, container: Container, output: Output, record: ExitRecord) {
        if !matches!(container.launch.namespaces.pid, Some(PidNamespace::Own(()))) {
            crate::exit::end_the_rest(&container.launch.cgroup);
        }
        let launch = Box::new(container.launch);
        self.state = State::Draining { launch, output, record, deadline: Instant::now() + DRAIN };
    }

    pub(super) fn signal(&self, signal: i32) -> Result<(), Failed> {
        match self.state.container() {
            Some(container) => process::signal_pidfd(container.pidfd.as_fd(), signal)
                .map_err(|error| from_io(&error, "signal the container", signal)),
            None => Err(refused("signal the container", "it has no process")),
        }
    }

    pub(super) fn discard(&mut self) {
        if let Some(birth) = self.state.birth() {
            birth.kill();
        }
        if let Some(container) = self.state.container() {
            let _ = process::signal_pidfd(container.pidfd.as_fd(), SIGKILL);
        }
        self.state = State::Finished;
    }

    pub(super) fn main_ended(&mut self, ended: ProcessEnded) {
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
                // There is nothing left to kill.
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

    /// Records the end as soon as the output is complete and in the log. `now`: the time to wait
    /// for that is up.
    pub(super) fn finish_if_drained(&mut self, now: bool) {
        let State::Draining { output, .. } = &mut self.state else { return };
        let mut is_stuck = false;
        if !output.ended() {
            if !now {
                return;
            }
            is_stuck = output.log().is_some_and(Log::is_full);
            let untold = output.cut(&self.poll);
            self.say_last_words(untold);
        }
        let State::Draining { output, record, deadline, .. } = &mut self.state else { return };
        if let Some(log) = output.log_mut() {
            let is_new = log.end(&self.poll);
            if !log.has_ended() {
                if is_new && !is_stuck {
                    *deadline = Instant::now() + DRAIN;
                    return;
                }
                if !now {
                    return;
                }
                log.make_last_room(&self.poll);
                log.give_up(&self.poll);
            }
            record.log_bytes_lost = log.lost_bytes();
            record.log_incomplete = !log.is_complete();
            log.close(&self.poll);
        }
        // Execs of a container that has ended were killed with it, or lose their container now.
        self.end_execs();
        if let State::Draining { launch, record, .. } = std::mem::replace(&mut self.state, State::Empty) {
            self.state = State::Recording { launch, record, again: Instant::now() };
            self.record();
        }
    }

    /// Records the end and reports it. Room was reserved, so a full disk does not matter; after any
    /// other error of the disk, the message is sent, and recording is retried until a daemon has
    /// received it.
    pub(super) fn record(&mut self) {
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
