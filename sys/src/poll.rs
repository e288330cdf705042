//! Waiting for many descriptors at once: `epoll(7)`, and signals as one of them: `signalfd(2)`.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What a watched descriptor is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The number that [`Poll::watch`] was given.
    pub token: u64,
    /// There is something to read, or an end or error to be found by reading.
    pub readable: bool,
    /// There is room to write, or an error to be found by writing.
    pub writable: bool,
    /// There is an error, or the other end is closed: `EPOLLERR` or `EPOLLHUP`.
    pub failed: bool,
}

/// What a descriptor is watched for. Errors and hang-ups are always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Only these.
    Failure,
    /// Something to read.
    Input,
    /// Room to write.
    Room,
    /// Both.
    InputAndRoom,
}

impl Interest {
    fn flags(self) -> EpollFlags {
        match self {
            Self::Failure => EpollFlags::empty(),
            Self::Input => EpollFlags::EPOLLIN,
            Self::Room => EpollFlags::EPOLLOUT,
            Self::InputAndRoom => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
        }
    }
}

/// A set of watched descriptors; level-triggered. Closing a descriptor (its last copy) ends the
/// watch.
#[derive(Debug)]
pub struct Poll(Epoll);

impl Poll {
    /// An empty set.
    ///
    /// # Errors
    /// `EMFILE` at the descriptor limit.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?))
    }

    /// Watches `descriptor` under the number `token`.
    ///
    /// # Errors
    /// `EEXIST` when it is watched already, `EPERM` for a regular file.
    pub fn watch(&self, descriptor: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.0.add(descriptor, EpollEvent::new(interest.flags(), token))?)
    }

    /// Watches a file of the kernel, such as a control file of a cgroup, for changes of its
    /// content, which come as `EPOLLPRI`, under the number `token`:
    /// Documentation/admin-guide/cgroup-v2.rst, "Interface Files". Reading it ends the readiness.
    /// When the cgroup is removed, the file is ready forever: then [`Poll::forget`] it.
    ///
    /// # Errors
    /// `EEXIST` when it is watched already, `EPERM` for a file that does not report changes.
    pub fn watch_content(&self, descriptor: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        Ok(self.0.add(descriptor, EpollEvent::new(EpollFlags::EPOLLPRI, token))?)
    }

    /// Changes what a watched descriptor is watched for.
    ///
    /// # Errors
    /// `ENOENT` when it is not watched.
    pub fn change(&self, descriptor: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.0.modify(descriptor, &mut EpollEvent::new(interest.flags(), token))?)
    }

    /// Ends the watch.
    ///
    /// # Errors
    /// `ENOENT` when it is not watched.
    pub fn forget(&self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        Ok(self.0.delete(descriptor)?)
    }

    /// Waits until something is ready or `timeout` is over (`None`: forever). After a signal
    /// nothing is ready.
    ///
    /// # Errors
    /// None in practice.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<Ready>> {
        let mut events = [EpollEvent::empty(); 16];
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            // Rounded up, so that a wait for the last fraction of a millisecond does not spin.
            Some(time) => {
                EpollTimeout::try_from(time + Duration::from_micros(999)).unwrap_or(EpollTimeout::MAX)
            }
        };
        let count = match self.0.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        Ok(events[..count]
            .iter()
            .map(|event| {
                let failed = event.events().intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
                Ready {
                    token: event.data(),
                    readable: failed || event.events().contains(EpollFlags::EPOLLIN),
                    writable: failed || event.events().contains(EpollFlags::EPOLLOUT),
                    failed,
                }
            })
            .collect())
    }
}

/// Ends of children, as a descriptor to watch.
#[derive(Debug)]
pub struct ChildSignals(SignalFd);

impl ChildSignals {
    /// Blocks `SIGCHLD` in this process and opens a descriptor that becomes readable when one
    /// comes.
    ///
    /// # Errors
    /// `EMFILE` at the descriptor limit.
    pub fn new() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?;
        Ok(Self(SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// Takes the pending signals, so that the descriptor is no longer readable.
    pub fn clear(&self) {
        // Only the wake-up matters; who ended is found by waitid. WouldBlock ends the loop, as does
        // any error.
        while let Ok(Some(_)) = self.0.read_signal() {}
    }
}

impl std::os::fd::AsFd for ChildSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
