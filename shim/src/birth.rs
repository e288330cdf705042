//! A process that has not executed its program yet: its identity, its progress, and its deadline.
//!
//! ```text
//!  direct      child: report, (go), exec
//!  by a maker  maker: report (main process only), successor, end;  successor: (go), exec
//! ```
//! The shim never blocks on such a process. It may hang in a filesystem, or be stopped by others in
//! its pid namespace; the loop continues, and kills it at its deadline.
//!
//! The kernel identifies the process: the maker is the shim's own child, created by `clone3(2)`. It
//! names the successor by its own name, which is read after it has ended and before it is reaped;
//! the successor has to be a child of the shim, and no unknown child is reaped before that. So the
//! pids cannot be reused while they are in use here.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use berth_shim_proto::control::{Created, Failed};
use berth_sys::process;
use berth_sys::process::SIGKILL;

use crate::failure::refused;
use crate::handshake::{self, Report, ShimEnd};

/// How long a main process may take from the start until the exec. The daemon waits a little
/// longer, and the daemon's caller only a little longer than that.
const START: Duration = Duration::from_secs(10);

/// The same for a process of exec, which also has to prepare. The daemon ends a request with a
/// shorter limit.
const ENTER: Duration = Duration::from_secs(30);

/// How long preparing a container may take, including mounts of slow filesystems. The daemon waits
/// a little longer.
const PREPARE: Duration = Duration::from_secs(60);

/// A process before its exec.
#[derive(Debug)]
pub(crate) struct Birth {
    end: ShimEnd,
    /// The maker, until it is reaped. In a direct birth, the process itself.
    maker: Option<i32>,
    /// The process, once known and until it is reaped.
    process: Option<i32>,
    /// Whether the process was ever known.
    named: bool,
    /// Whether it may continue as soon as it is known.
    at_once: bool,
    /// Whether it was allowed to continue.
    released: bool,
    report: Option<Report>,
    deadline: Instant,
}

/// The progress of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It is still on its way.
    Pending,
    /// It has executed its program.
    Executed,
}

impl Birth {
    /// The birth of the container's main process, the child `pid` itself.
    pub(crate) fn direct(end: ShimEnd, pid: i32) -> Self {
        Self { process: Some(pid), named: true, ..Self::by_maker(end, pid) }
    }

    /// The birth of the container's main process, which the child `maker` creates.
    pub(crate) fn by_maker(end: ShimEnd, maker: i32) -> Self {
        Self {
            end,
            maker: Some(maker),
            process: None,
            named: false,
            at_once: false,
            released: false,
            report: None,
            deadline: Instant::now() + PREPARE,
        }
    }

    /// The birth of a process of exec, which the child `maker` creates and which continues as soon
    /// as it is known.
    pub(crate) fn of_exec(end: ShimEnd, maker: i32) -> Self {
        Self { at_once: true, deadline: Instant::now() + ENTER, ..Self::by_maker(end, maker) }
    }

    /// The descriptor that becomes readable when there is a message.
    pub(crate) fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.end.sources()
    }

    /// Its deadline.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The process, if it is known and was not reaped.
    pub(crate) fn process(&self) -> Option<i32> {
        self.process
    }

    /// Whether a process may exist that is not known yet: until then no unknown child may be
    /// reaped.
    pub(crate) fn expects_successor(&self) -> bool {
        !self.named && self.maker.is_some()
    }

    /// The pids to reap.
    pub(crate) fn children(&self) -> impl Iterator<Item = i32> {
        let process = self.process.filter(|process| self.maker != Some(*process));
        self.maker.into_iter().chain(process)
    }

    /// Receives messages.
    ///
    /// # Errors
    /// Why it will not execute its program. The caller has to kill it.
    pub(crate) fn advance(&mut self) -> Result<Progress, Failed> {
        if let Some(report) = self.end.hear_report()? {
            self.report = Some(report);
        }
        if !self.named {
            self.look_for_successor();
            if self.named && self.at_once {
                self.release()?;
            }
        }
        match self.end.hear_words() {
            Some(Some(failed)) => Err(failed),
            Some(None) if self.named && self.released => Ok(Progress::Executed),
            Some(None) if self.named => Err(refused("prepare the process", handshake::KILLED)),
            // Once its maker has ended, it is known or does not exist.
            Some(None) | None => Ok(Progress::Pending),
        }
    }

    /// Reads the name of a maker that has ended and has not been reaped.
    fn look_for_successor(&mut self) {
        let Some(maker) = self.maker else { return };
        if !matches!(process::ended_child(Some(maker)), Ok(Some(_))) {
            return;
        }
        let name = std::fs::read_to_string(format!("/proc/{maker}/comm")).unwrap_or_default();
        if let Some(pid) = handshake::successor(&name)
            && process::is_child(pid).unwrap_or(false)
        {
            (self.process, self.named) = (Some(pid), true);
        }
    }

    /// What it resolved, once it waits for its start.
    pub(crate) fn take_ready(&mut self) -> Option<(Created, Option<OwnedFd>)> {
        self.process?;
        self.report.take().map(|Report { created, terminal }| (created, terminal))
    }

    /// Lets a waiting process continue.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn go(&mut self) -> Result<(), Failed> {
        self.deadline = Instant::now() + START;
        self.release()
    }

    fn release(&mut self) -> Result<(), Failed> {
        self.end.go()?;
        self.released = true;
        Ok(())
    }

    /// Notes that a child was reaped, so that its pid may be reused. An error if the program can no
    /// longer start.
    pub(crate) fn reaped(&mut self, pid: i32) -> Result<(), Failed> {
        if self.maker == Some(pid) {
            self.maker = None;
        }
        if self.process == Some(pid) {
            self.process = None;
        }
        if self.process.is_none() && (self.named || self.maker.is_none()) {
            return Err(refused("prepare the process", handshake::KILLED));
        }
        Ok(())
    }

    /// Kills both maker and process, as far as they exist; the loop reaps them like other children.
    pub(crate) fn kill(&self) {
        for pid in self.children() {
            // It may have ended on its own.
            let _ = process::signal_child(pid, SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::handshake::ChildEnd;

    /// A child of this process that ends when its standard input does.
    fn child() -> Child {
        Command::new("cat").stdin(Stdio::piped()).spawn().unwrap()
    }

    fn pid(child: &Child) -> i32 {
        i32::try_from(child.id()).unwrap()
    }

    /// A child that ends at once and leaves this name; not reaped.
    fn maker(name: &str) -> Child {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join(name);
        std::os::unix::fs::symlink("/bin/true", &program).unwrap();
        let child = Command::new(program).spawn().unwrap();
        while process::ended_child(Some(pid(&child))).unwrap().is_none() {
            std::thread::yield_now();
        }
        child
    }

    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn of_exec(maker: &Child) -> (Birth, ChildEnd) {
        let (end, child) = handshake::pair(false).unwrap();
        (Birth::of_exec(end, pid(maker)), child)
    }

    /// The outcome of an end. A process that another test has just forked may hold a copy of the
    /// pipe until its exec.
    fn heard(birth: &mut Birth) -> Result<Progress, Failed> {
        loop {
            match birth.advance() {
                Ok(Progress::Pending) => std::thread::yield_now(),
                other => return other,
            }
        }
    }

    #[test]
    fn a_successor_that_is_no_child_of_the_shim_is_not_believed() {
        for name in ["+1", "+0", "+-1", "+2147483647", "berth-shim", "x+1"] {
            let maker = maker(name);
            let (mut birth, _end) = of_exec(&maker);
            assert_eq!(birth.advance().unwrap(), Progress::Pending, "{name}");
            assert_eq!(birth.process(), None, "{name}");
            assert!(birth.reaped(pid(&maker)).is_err(), "{name}");
            end(maker);
        }
    }

    #[test]
    fn an_exec_goes_on_when_it_is_known_and_is_over_when_its_process_closes_the_pipe() {
        let process = child();
        let maker = maker(&handshake::name_of_maker(pid(&process)));
        let (mut birth, child_end) = of_exec(&maker);
        assert!(birth.expects_successor());
        assert_eq!(birth.advance().unwrap(), Progress::Pending);
        child_end.wait_for_go().unwrap();
        assert_eq!((birth.process(), birth.expects_successor()), (Some(pid(&process)), false));
        assert!(birth.reaped(pid(&maker)).is_ok());
        drop(child_end);
        assert_eq!(heard(&mut birth).unwrap(), Progress::Executed);
        assert!(birth.reaped(pid(&process)).is_err());
        end(process);
        end(maker);
        // Their numbers are free now.
        birth.kill();
    }

    #[test]
    fn a_maker_that_runs_has_not_named_anybody() {
        let maker = child();
        let (mut birth, child_end) = of_exec(&maker);
        // Messages of a successor that is not known prove nothing.
        drop(child_end);
        for _ in 0..100 {
            assert_eq!(birth.advance().unwrap(), Progress::Pending);
        }
        assert!(birth.expects_successor() && birth.deadline() > Instant::now());
        end(maker);
    }

    #[test]
    fn an_end_before_the_word_to_go_on_is_a_death() {
        let (shim_end, child_end) = handshake::pair(true).unwrap();
        let process = child();
        let mut birth = Birth::direct(shim_end, pid(&process));
        assert_eq!(birth.advance().unwrap(), Progress::Pending);
        drop(child_end);
        assert_eq!(heard(&mut birth).unwrap_err().detail, handshake::KILLED);
        assert!(birth.reaped(pid(&process)).is_err());
        end(process);
    }
}
