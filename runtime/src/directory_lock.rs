//! One daemon for a root, and one for a state: each clears away what it finds there and does not
//! know.
//!
//! A directory is locked by flock(2) of one of several files in it, its *places*. A process that
//! can lock one of them has the directory, provided that no other place is locked but by processes
//! that were killed, cannot end, and will never write again ([`berth_sys::ending`]): a disk or a
//! container may keep one waiting in the kernel forever, with all that it has open.
//!
//! Each daemon locks the first place that is free, and looks at all others after that. So of two
//! that start at the same time, whatever they have seen before, at least one sees the other and
//! gives way.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use berth_sys::ending::{Ending, ending};

/// Every lock of a file: proc_locks(5).
const LOCKS: &str = "/proc/locks";

/// Why a directory cannot be had.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Somebody has it.
    Taken(Holder),
    /// A file cannot be opened or locked.
    File {
        /// The operation.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Who has a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Unknown when it is in another pid namespace, or has ended and a child that it was making has
    /// the lock still, for a moment.
    pid: Option<i32>,
    ending: Ending,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.pid, self.ending) {
            (None, _) => f.write_str("a process that is ending or cannot be seen from here"),
            (Some(pid), Ending::Killed) => write!(
                f,
                "process {pid}, which was killed but waits in the kernel for a disk or a lock, and may still write when that is over"
            ),
            (Some(pid), Ending::Over) => write!(
                f,
                "process {pid}, which was killed but waits in the kernel, as do those that had this before it"
            ),
            (Some(pid), _) => write!(f, "process {pid}"),
        }
    }
}

/// A directory that no other process has locked. Dropping it releases the lock.
#[derive(Debug)]
pub(crate) struct Locked {
    _place: File,
    /// Processes that were killed, cannot end, and had it before.
    pub(crate) over: Vec<i32>,
}

/// Takes the directory whose places are these, if it can be had now. A place is a directory, or a
/// file that is made if it is absent.
///
/// # Errors
/// [`Refused`].
pub(crate) fn try_take(places: &[PathBuf]) -> Result<Locked, Refused> {
    let mut over = Vec::new();
    let mut taken = None;
    for (number, place) in places.iter().enumerate() {
        let file = open(place)?;
        if lock(&file, place)? {
            taken = Some((number, file));
            break;
        }
        over.push(must_be_over(&file)?);
    }
    let Some((taken, file)) = taken else {
        let pid = over.last().copied();
        return Err(Refused::Taken(Holder { pid, ending: Ending::Over }));
    };
    // Those before it once more: somebody may have one by now.
    over.clear();
    for place in places.iter().enumerate().filter(|(number, _)| *number != taken).map(|(_, place)| place) {
        let other = open(place)?;
        if !lock(&other, place)? {
            over.push(must_be_over(&other)?);
        }
    }
    Ok(Locked { _place: file, over })
}

fn open(place: &Path) -> Result<File, Refused> {
    let opened = match File::open(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            File::options().create(true).truncate(false).write(true).open(place)
        }
        opened => opened,
    };
    opened.map_err(|source| Refused::File { action: "open", path: place.to_owned(), source })
}

fn lock(file: &File, place: &Path) -> Result<bool, Refused> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(source)) => {
            Err(Refused::File { action: "lock", path: place.to_owned(), source })
        }
    }
}

/// Who has the lock of `file`, when that will never write again.
fn must_be_over(file: &File) -> Result<i32, Refused> {
    // What cannot be found out counts as alive.
    let inode = file.metadata().map(|found| (found.dev(), found.ino()));
    let pid =
        inode.ok().zip(std::fs::read_to_string(LOCKS).ok()).and_then(|(inode, locks)| owner(&locks, inode));
    let Some(pid) = pid else { return Err(Refused::Taken(Holder { pid: None, ending: Ending::Alive })) };
    match ending(pid).unwrap_or(Ending::Alive) {
        Ending::Over => Ok(pid),
        ending => Err(Refused::Taken(Holder { pid: Some(pid), ending })),
    }
}

/// The process that has flock(2)ed the file with this device and inode, in the text of [`LOCKS`]:
/// `1: FLOCK  ADVISORY  WRITE 708 08:01:1048610 0 EOF`.
fn owner(locks: &str, (device, inode): (u64, u64)) -> Option<i32> {
    // makedev(3).
    let major = ((device >> 8) & 0xfff) | ((device >> 32) & 0xffff_f000);
    let minor = (device & 0xff) | ((device >> 12) & 0xffff_ff00);
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        // One that waits has an arrow here.
        (words.next()? == "FLOCK").then_some(())?;
        let pid = words.nth(2)?.parse().ok()?;
        (words.next()? == file && pid > 0).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(directory: &Path) -> Vec<PathBuf> {
        std::fs::create_dir_all(directory.join("directory")).unwrap();
        vec![directory.join("lock"), directory.join("directory"), directory.to_owned()]
    }

    #[test]
    fn a_directory_has_one_owner_who_is_told_by_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let places = places(directory.path());
        let own = i32::try_from(std::process::id()).unwrap();
        let first = try_take(&places).unwrap();
        assert!(first.over.is_empty());
        let Err(Refused::Taken(holder)) = try_take(&places) else { panic!("two owners") };
        assert_eq!(holder, Holder { pid: Some(own), ending: Ending::Alive });
        drop(first);
        // Whichever place it is that somebody has.
        for place in &places {
            let file = File::open(place).unwrap();
            file.try_lock().unwrap();
            assert!(matches!(try_take(&places), Err(Refused::Taken(_))), "{}", place.display());
        }
        try_take(&places).unwrap();
    }

    #[test]
    fn the_owner_of_a_lock_is_found_by_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 08:01:7 0 EOF\n\
            2: FLOCK  ADVISORY  WRITE 12 08:01:8 0 EOF\n\
            2: -> FLOCK  ADVISORY  WRITE 13 08:01:7 0 EOF\n\
            3: FLOCK  ADVISORY  WRITE 0 08:01:7 0 EOF\n\
            4: FLOCK  ADVISORY  WRITE 14 08:01:7 0 EOF\n\
            5: FLOCK\nbroken\n";
        assert_eq!(owner(locks, (0x801, 7)), Some(14));
        assert_eq!(owner(locks, (0x801, 8)), Some(12));
        assert_eq!(owner(locks, (0x802, 8)), None);
        assert_eq!(owner("", (0x801, 7)), None);
    }
}
