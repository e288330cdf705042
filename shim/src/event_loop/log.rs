//! The container's log: opening and reopening it, and continuing when it has room again.

use std::time::{Duration, Instant};

use berth_shim_proto::control::{Failed, reply::Answer};
use berth_sys::poll::Ready;

use super::{Asker, Shim, State};
use crate::failure::refused;
use crate::log_queue::{Heard, Log};

/// How long reopening it may take. The daemon waits a little longer.
const REOPEN: Duration = Duration::from_secs(8);

impl State {
    pub(super) fn log(&self) -> Option<&Log> {
        match self {
            Self::Preparing { making, .. } => making.log.as_ref(),
            _ => self.output()?.log(),
        }
    }

    pub(super) fn log_mut(&mut self) -> Option<&mut Log> {
        match self {
            Self::Preparing { making, .. } => making.log.as_mut(),
            _ => self.output_mut()?.log_mut(),
        }
    }
}

impl Shim {
    pub(super) fn log_ready(&mut self, ready: Ready) {
        let Some(log) = self.state.log_mut() else { return };
        let heard = log.ready(ready, &self.poll);
        self.act_on(heard);
        self.finish_if_drained(false);
    }

    /// Handles a reaped child that may be the log's writer; returns whether it was.
    pub(super) fn log_child_ended(&mut self, pid: i32) -> bool {
        if self.writer.as_mut().is_some_and(|writer| writer.reaped(pid)) {
            return true;
        }
        let Some(log) = self.state.log_mut() else { return false };
        let Some(heard) = log.child_ended(pid, &self.poll) else { return false };
        self.act_on(heard);
        true
    }

    fn act_on(&mut self, heard: Vec<Heard>) {
        for heard in heard {
            match heard {
                Heard::Opened(Ok(())) => self.main_waits(),
                Heard::Opened(Err(failed)) => self.main_failed(failed),
                Heard::Reopened(result) => {
                    if let Some(Some((asker, _))) = self.reopens.pop_front() {
                        self.tell(asker, result.map_or_else(Answer::Failed, Answer::Done));
                    }
                }
                Heard::Moved => {
                    if let Some(output) = self.state.output_mut() {
                        let untold = output.go_on(&self.poll);
                        self.say_last_words(untold);
                    }
                }
            }
        }
    }

    /// Reopens the log by its path. Returns whether that is already done because there is no log.
    pub(super) fn reopen_log(&mut self, asker: Asker) -> Result<bool, Failed> {
        let (State::Starting { output, .. } | State::Running { output, .. }) = &mut self.state else {
            return Err(refused("reopen the log", "the container is not running"));
        };
        let Some(log) = output.log_mut() else { return Ok(true) };
        log.reopen(&self.poll)?;
        self.reopens.push_back(Some((asker, Instant::now() + REOPEN)));
        // Held entries may have been sent before it; then nothing else reports that there is room.
        let untold = output.go_on(&self.poll);
        self.say_last_words(untold);
        Ok(false)
    }

    /// Answers the requests that have waited too long. The log may still be reopened later.
    pub(super) fn fail_late_reopens(&mut self, now: Instant) {
        let Some(failed) = self.state.log_mut().map(|log| log.late_again()) else { return };
        let late = |waits: &mut Option<(Asker, Instant)>| waits.take_if(|(_, deadline)| *deadline <= now);
        let late: Vec<_> = self.reopens.iter_mut().filter_map(late).collect();
        for (asker, _) in late {
            self.tell(asker, Answer::Failed(failed.clone()));
        }
    }
}
