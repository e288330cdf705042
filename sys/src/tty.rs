//! Pseudo-terminals: pty(7).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::termios::{self, SetArg, Termios};

/// The signal of a process that continues after a stop, when another may have changed its terminal.
pub use libc::SIGCONT;

/// Whether `file` is on a devpts. On any filesystem a file can look like a `ptmx` and answer an
/// `ioctl` with anything, but the filesystem's own type does not lie.
///
/// # Errors
/// When that cannot be determined.
pub fn is_devpts(file: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(nix::sys::statfs::fstatfs(file)?.filesystem_type() == nix::sys::statfs::DEVPTS_SUPER_MAGIC)
}

/// Opens the terminal that belongs to the open `ptmx` descriptor `controller`, without a path
/// lookup: `TIOCGPTPEER`, ioctl_tty(2). A new one is unlocked first.
///
/// # Errors
/// `ENOTTY` when `controller` is not a `ptmx`; `EPERM` when it is not a pseudo-terminal.
pub fn open_other_end(controller: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// ioctl_tty(2), the same number on x86_64 and aarch64.
    const TIOCGPTPEER: libc::c_ulong = 0x5441;
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int through the pointer, which lives over the call.
    if unsafe { libc::ioctl(controller.as_raw_fd(), tiocsptlck(), &raw const unlocked) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TIOCGPTPEER takes open flags as a number.
    let raw = unsafe {
        libc::ioctl(
            controller.as_raw_fd(),
            request(TIOCGPTPEER),
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned `raw` as a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The request argument of `ioctl` is `unsigned long` in glibc and `int` in musl.
#[cfg(target_env = "musl")]
fn request(number: libc::c_ulong) -> libc::c_int {
    libc::c_int::try_from(number).unwrap_or(libc::c_int::MAX)
}

/// The request argument of `ioctl` is `unsigned long` in glibc and `int` in musl.
#[cfg(not(target_env = "musl"))]
fn request(number: libc::c_ulong) -> libc::c_ulong {
    number
}

#[cfg(target_env = "musl")]
fn tiocsptlck() -> libc::c_int {
    0x4004_5431
}

#[cfg(not(target_env = "musl"))]
fn tiocsptlck() -> libc::c_ulong {
    0x4004_5431
}

/// Makes `terminal` the controlling terminal of the calling process, which leads a session without
/// one: `TIOCSCTTY`.
///
/// # Errors
/// `EPERM` when the caller leads no session or has a terminal.
pub fn make_controlling(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes a number.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the size of a terminal in characters: `TIOCSWINSZ`.
///
/// # Errors
/// `ENOTTY` when it is not one.
pub fn set_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a struct winsize through the pointer, which lives over the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The size of a terminal in characters, columns first: `TIOCGWINSZ`.
///
/// # Errors
/// `ENOTTY` when it is not one.
pub fn size(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes a struct winsize through the pointer, which lives over the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((size.ws_col, size.ws_row))
}

/// A terminal in raw mode: input is passed on unchanged, at once, without echo or signals:
/// `cfmakeraw`, termios(3). Dropping this restores the previous settings.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Puts a terminal into raw mode.
    ///
    /// # Errors
    /// `ENOTTY` when it is not one; `EIO` when the caller is in the background and nothing will
    /// bring it back.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let raw = Self { terminal: terminal.try_clone_to_owned()?, before: termios::tcgetattr(terminal)? };
        raw.apply()?;
        Ok(raw)
    }

    /// Sets raw mode once more: a shell changes the settings while its job is stopped.
    ///
    /// # Errors
    /// As tcsetattr(3).
    pub fn apply(&self) -> io::Result<()> {
        let mut raw = self.before.clone();
        termios::cfmakeraw(&mut raw);
        // Without waiting for output, which the user may have stopped.
        Ok(termios::tcsetattr(self.terminal.as_fd(), SetArg::TCSANOW, &raw)?)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone has no settings.
        let _ = termios::tcsetattr(self.terminal.as_fd(), SetArg::TCSANOW, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::termios::LocalFlags;

    use super::*;

    #[test]
    fn both_ends_of_a_terminal_talk() {
        let controller = std::fs::OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap();
        let terminal = open_other_end(controller.as_fd()).unwrap();
        set_size(terminal.as_fd(), 80, 25).unwrap();
        assert_eq!(size(controller.as_fd()).unwrap(), (80, 25));
        std::fs::File::from(terminal).write_all(b"hi\n").unwrap();
        // The kernel may deliver the line in parts.
        let mut line = [0; 4];
        (&controller).read_exact(&mut line).unwrap();
        assert_eq!(&line, b"hi\r\n");
    }

    #[test]
    fn raw_mode_ends_with_its_owner_even_in_a_panic() {
        let controller = std::fs::OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap();
        let terminal = open_other_end(controller.as_fd()).unwrap();
        let flags = || termios::tcgetattr(terminal.as_fd()).unwrap().local_flags;
        let before = flags();
        assert!(before.contains(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG));
        let panicked = std::panic::catch_unwind(|| {
            let _raw = RawMode::enter(terminal.as_fd()).unwrap();
            assert!(!flags().intersects(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG));
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(panicked.is_err());
        assert_eq!(flags(), before);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(RawMode::enter(file.as_fd()).is_err());
    }

    #[test]
    fn a_plain_file_is_no_terminal() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(!is_devpts(file.as_fd()).unwrap());
        let terminals = std::fs::File::open("/dev/pts").unwrap();
        assert!(is_devpts(terminals.as_fd()).unwrap());
        assert!(open_other_end(file.as_fd()).is_err());
        assert!(set_size(file.as_fd(), 1, 1).is_err());
        assert!(size(file.as_fd()).is_err());
    }
}
