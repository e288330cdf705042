//! A process on its way to its program: who it is, how far it has come, and how long it may take.
//!
//! ```text
//!  direct     child ──R──> ready ──go──> exec
//!  by a maker maker ──R (main process only)──N──> (ends); successor ──go (main process only)──> exec
//! ```
//! The shim never waits for such a process. It may hang in a filesystem, or be stopped by others in its pid namespace; the loop
//! goes on, and kills it when its time is up.
//!
//! Who the process is comes from the kernel: the maker is the shim's own child, made by `clone3(2)`, and the only one whose word
//! on a successor counts; the successor has to be a child of the shim, and no child that is not known is reaped before the maker
//! has spoken or ended. So the numbers are their own for as long as this says that they are there.

use crate::failure::refused;
use crate::handshake::{self, ShimEnd, Word};
use berth_shim_proto::control::{Created, Failed};
use berth_sys::process;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

const SIGKILL: i32 = 9;

/// How long a main process may take from the word to go on until it is its program. The daemon waits a little longer, and its caller
/// for little more than that.
const START: Duration = Duration::from_secs(10);

/// The same for a process of exec, which has to prepare as well. A request with a shorter limit is ended by the daemon.
const ENTER: Duration = Duration::from_secs(30);

/// How long preparing a container may take: mounts of slow filesystems are in it. The daemon waits a little longer.
const PREPARE: Duration = Duration::from_secs(60);

/// The process, not a program yet.
#[derive(Debug)]
pub(crate) struct Birth {
    end: ShimEnd,
    /// Until it is reaped. In a direct birth it is the process itself.
    maker: Option<i32>,
    /// Once it is known, until it is reaped.
    process: Option<i32>,
    /// Whether the process has ever been known.
    named: bool,
    /// Whether it has been told to go on, or needs not be told.
    released: bool,
    ready: Option<(Box<Created>, Option<OwnedFd>)>,
    deadline: Instant,
}

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It goes on.
    Pending,
    /// It is its program.
    Executed,
}

impl Birth {
    /// Of the container's main process, the child `pid` itself.
    pub(crate) fn direct(end: ShimEnd, pid: i32) -> Self {
        Self { process: Some(pid), named: true, ..Self::by_maker(end, pid) }
    }

    /// Of the container's main process, which the child `maker` makes.
    pub(crate) fn by_maker(end: ShimEnd, maker: i32) -> Self {
        Self {
            end,
            maker: Some(maker),
            process: None,
            named: false,
            released: false,
            ready: None,
            deadline: Instant::now() + PREPARE,
        }
    }

    /// Of a process of exec, which the child `maker` makes and which starts at once.
    pub(crate) fn of_exec(end: ShimEnd, maker: i32) -> Self {
        Self { released: true, deadline: Instant::now() + ENTER, ..Self::by_maker(end, maker) }
    }

    /// To wait for words.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// When it has taken too long.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The process, if it is known and was not reaped.
    pub(crate) fn process(&self) -> Option<i32> {
        self.process
    }

    /// Whether a process may be there that nobody knows yet: until then no child that is not known may be reaped.
    pub(crate) fn expects_successor(&self) -> bool {
        !self.named && self.maker.is_some()
    }

    /// Who is to be reaped.
    pub(crate) fn children(&self) -> impl Iterator<Item = i32> {
        let process = self.process.filter(|process| self.maker != Some(*process));
        self.maker.into_iter().chain(process)
    }

    /// Hears what was said.
    ///
    /// # Errors
    /// Why it will not become its program. It is then to be killed.
    pub(crate) fn advance(&mut self) -> Result<Progress, Failed> {
        const STEP: &str = "prepare the process";
        while let Some(word) = self.end.hear(self.maker)? {
            match word {
                Word::Ready { created, terminal } if self.ready.is_none() => {
                    self.ready = Some((created, terminal));
                }
                Word::Successor(pid) if !self.named && Some(pid) != self.maker => {
                    if !process::is_child(pid).unwrap_or(false) {
                        return Err(refused(STEP, handshake::KILLED));
                    }
                    (self.process, self.named) = (Some(pid), true);
                }
                Word::Ready { .. } | Word::Successor(_) => {
                    return Err(refused(STEP, "it reported twice"));
                }
                Word::Failed(failed) => return Err(failed),
                Word::End if self.named && self.released => return Ok(Progress::Executed),
                Word::End => return Err(refused(STEP, handshake::KILLED)),
            }
        }
        Ok(Progress::Pending)
    }

    /// What it resolved, once it waits for its start.
    pub(crate) fn take_ready(&mut self) -> Option<(Created, Option<OwnedFd>)> {
        self.process?;
        self.ready.take().map(|(created, terminal)| (*created, terminal))
    }

    /// Lets a process that waits go on.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn go(&mut self) -> Result<(), Failed> {
        self.end.go()?;
        self.released = true;
        self.deadline = Instant::now() + START;
        Ok(())
    }

    /// Notes that a child was reaped, so that its number may be another's from now on. An error when with it there will be no program.
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

    /// Kills whoever of it is there; the end is found as that of other children is.
    pub(crate) fn kill(&self) {
        for pid in self.children() {
            // It may have ended by itself.
            let _ = process::signal_child(pid, SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::ChildEnd;
    use std::process::{Child, Command, Stdio};

    /// A child of this process that ends when its standard input does.
    fn child() -> Child {
        Command::new("cat").stdin(Stdio::piped()).spawn().unwrap()
    }

    fn pid(child: &Child) -> i32 {
        i32::try_from(child.id()).unwrap()
    }

    /// This process speaks for the maker.
    fn of_exec() -> (Birth, ChildEnd) {
        let (end, child) = handshake::pair().unwrap();
        (Birth::of_exec(end, i32::try_from(std::process::id()).unwrap()), child)
    }

    /// What comes of an end. A process that another test has just forked may hold a copy of the socket until its exec.
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
        for victim in [1, 0, -1, i32::MIN, i32::MAX] {
            let (mut birth, end) = of_exec();
            end.succeeded_by(victim).unwrap();
            assert_eq!(birth.advance().unwrap_err().detail, handshake::KILLED, "{victim}");
            assert_eq!(birth.process(), None);
        }
    }

    #[test]
    fn an_exec_is_over_when_its_process_closes_the_socket() {
        let (mut birth, end) = of_exec();
        assert!(birth.expects_successor());
        let mut process = child();
        end.succeeded_by(pid(&process)).unwrap();
        assert_eq!(birth.advance().unwrap(), Progress::Pending);
        assert_eq!((birth.process(), birth.expects_successor()), (Some(pid(&process)), false));
        drop(end);
        assert_eq!(heard(&mut birth).unwrap(), Progress::Executed);
        process.kill().unwrap();
        process.wait().unwrap();
    }

    #[test]
    fn a_second_successor_is_not_believed() {
        let (mut birth, end) = of_exec();
        let (mut one, mut two) = (child(), child());
        end.succeeded_by(pid(&one)).unwrap();
        end.succeeded_by(pid(&two)).unwrap();
        assert!(birth.advance().is_err());
        birth.maker = None;
        birth.kill();
        one.wait().unwrap();
        assert!(process::is_child(pid(&two)).unwrap(), "it is not killed for what was said of it");
        two.kill().unwrap();
        two.wait().unwrap();
    }

    #[test]
    fn an_end_before_the_word_to_go_on_is_a_death() {
        let (end, child_end) = handshake::pair().unwrap();
        let mut process = child();
        let mut birth = Birth::direct(end, pid(&process));
        drop(child_end);
        assert_eq!(heard(&mut birth).unwrap_err().detail, handshake::KILLED);
        assert!(birth.reaped(pid(&process)).is_err());
        process.kill().unwrap();
        process.wait().unwrap();
        // Its number is nobody's now.
        birth.kill();
    }

    #[test]
    fn nothing_is_waited_for() {
        let (mut birth, end) = of_exec();
        assert_eq!(birth.advance().unwrap(), Progress::Pending);
        assert!(birth.deadline() > Instant::now());
        drop(end);
    }
}
