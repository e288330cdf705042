//! Images that are imported from a path of the host: an archive, or a directory with a layout.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_image::{ArchiveFile, Layout};
use berth_sys::beneath::Root;
use berth_sys::file::READ_NONBLOCKING;

use super::connection::{Heard, Worker};
use super::message::{Ask, Below, ReadFile, Tell, bytes_of, path_of};
use super::pool::{Answered, Kind, PATIENCE, Scope, Slot};
use super::{Failed, HostPathError, HostPaths, lost};

/// The largest piece of a file in one message.
const PIECE: usize = 64 * 1024;

/// What is imported, of which workers open and read the files.
#[derive(Debug)]
pub(super) struct Imported {
    pub(super) host: Arc<HostPaths>,
    pub(super) top: PathBuf,
}

impl Imported {
    fn read(&self, member: Option<&Path>, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        let ask = Ask::Read(ReadFile { path: bytes_of(&self.top), member: member.map(bytes_of), offset });
        let scope = Scope { only_looks: true, ..Scope::new(Kind::Paths, ask.paths()) };
        let paths = scope.paths.clone();
        let Answered { worker, slot, tell, .. } = self.host.put(ask, scope).map_err(failed)?;
        let stream = Stream {
            host: self.host.clone(),
            paths,
            source: Some((worker, slot)),
            has_ended: false,
            piece: io::Cursor::default(),
        };
        stream.begin(tell).map(|stream| Box::new(stream) as Box<dyn Read + Send>)
    }
}

impl Layout for Imported {
    fn has(&self, member: &Path) -> io::Result<bool> {
        let below = Below { top: bytes_of(&self.top), path: bytes_of(member) };
        match self.host.ask(Ask::Member(below)) {
            Ok(_) => Ok(true),
            Err(HostPathError::Failed(error)) if error.source().kind() == io::ErrorKind::NotFound => {
                Ok(false)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn open(&self, member: &Path) -> io::Result<Box<dyn Read + Send>> {
        self.read(Some(member), 0)
    }
}

impl ArchiveFile for Imported {
    fn read_from(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        self.read(None, offset)
    }
}

fn failed(error: HostPathError) -> io::Error {
    match error {
        HostPathError::Failed(failed) => failed.source(),
        error => io::Error::new(io::ErrorKind::TimedOut, error),
    }
}

/// A file as a worker reads it. A reader that is slow keeps the worker waiting, and is not waited
/// for; the worker is, for [`PATIENCE`] at a time.
struct Stream {
    host: Arc<HostPaths>,
    paths: Vec<PathBuf>,
    /// `None` after the end or a failure.
    source: Option<(Worker, Slot)>,
    has_ended: bool,
    piece: io::Cursor<Vec<u8>>,
}

impl Stream {
    /// After the first answer.
    fn begin(mut self, tell: Tell) -> io::Result<Self> {
        match tell {
            Tell::Done(_) => {
                // Others need not wait for it: it takes as long as its reader.
                if let Some((_, slot)) = &self.source {
                    slot.is_in(Vec::new());
                }
                Ok(self)
            }
            tell => Err(self.end(tell)),
        }
    }

    /// Gives the worker back after something that is no content.
    fn end(&mut self, tell: Tell) -> io::Error {
        match tell {
            Tell::Failed(failure) => {
                self.give_back();
                failed(HostPathError::Failed(Failed::from(failure)))
            }
            _ => failed(self.lost()),
        }
    }

    fn give_back(&mut self) {
        if let Some((worker, _slot)) = self.source.take() {
            self.host.keep(worker);
        }
    }

    fn lost(&self) -> HostPathError {
        lost(&super::shown(&self.paths))
    }

    fn next_piece(&mut self) -> io::Result<()> {
        let Some((mut worker, slot)) = self.source.take() else { return Err(failed(self.lost())) };
        match worker.listen(PATIENCE, |_| {}) {
            Ok(Heard::Answer(tell, _)) => {
                self.source = Some((worker, slot));
                match tell {
                    Tell::Content(piece) if piece.is_empty() => {
                        self.has_ended = true;
                        self.give_back();
                    }
                    Tell::Content(piece) => self.piece = io::Cursor::new(piece),
                    tell => return Err(self.end(tell)),
                }
                Ok(())
            }
            Ok(Heard::Silence(limit, _)) => {
                let scope = Scope { only_looks: true, ..Scope::new(Kind::Paths, self.paths.clone()) };
                Err(failed(self.host.give_up(worker, scope, None, limit)))
            }
            Err(error) => {
                self.host.abandon(&worker, &error);
                Err(failed(self.lost()))
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let length = self.piece.read(buffer)?;
            if length > 0 || buffer.is_empty() || self.has_ended {
                return Ok(length);
            }
            self.next_piece()?;
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some((worker, slot)) = self.source.take() {
            self.host.dismiss(worker, slot, std::mem::take(&mut self.paths));
        }
    }
}

/// Opens an archive. `None` for a directory.
pub(super) fn open(path: &Path) -> io::Result<Option<File>> {
    let file = File::options().read(true).custom_flags(READ_NONBLOCKING).open(path)?;
    match file.metadata()?.file_type() {
        kind if kind.is_dir() => Ok(None),
        kind if kind.is_file() => Ok(Some(file)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a directory")),
    }
}

/// Opens a file in the directory `top`. Links lead nowhere else.
pub(super) fn open_member(top: &Path, path: &Path) -> io::Result<File> {
    Root::open(top)?.open_regular(path)
}

/// Opens a file that is to be read.
pub(super) fn open_to_read(read: &ReadFile) -> io::Result<(File, u64)> {
    let path = path_of(&read.path);
    let file = match &read.member {
        Some(member) => open_member(path, path_of(member))?,
        None => open(path)?.ok_or(io::ErrorKind::IsADirectory)?,
    };
    Ok((file, read.offset))
}

/// Gives the pieces of a file from some byte on.
pub(super) fn read(&(ref file, mut offset): &(File, u64), give: &mut dyn FnMut(Vec<u8>)) -> io::Result<()> {
    loop {
        let mut piece = vec![0; PIECE];
        match file.read_at(&mut piece, offset) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                piece.truncate(length);
                offset += length as u64;
                give(piece);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::fs::symlink;
    use std::time::Instant;

    use berth_shim_proto::frame;
    use berth_sys::socket;
    use tokio::runtime::Handle;

    use super::super::message::{Answer, Failure};
    use super::super::pool::Busy;
    use super::super::worker;
    use super::*;
    use crate::lock;

    #[test]
    fn files_and_directories_are_opened_and_links_lead_nowhere_else() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        std::fs::write(at("archive"), "content").unwrap();
        symlink("archive", at("link")).unwrap();
        symlink("/etc/passwd", at("out")).unwrap();
        assert!(open(top.path()).unwrap().is_none());
        assert!(open(&at("link")).unwrap().is_some());
        assert_eq!(open(&at("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(open(Path::new("/dev/null")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let member = |name: &str| open_member(top.path(), Path::new(name)).map_err(|error| error.kind());
        assert!(member("archive").is_ok() && member("link").is_ok());
        assert_eq!(member("out").unwrap_err(), io::ErrorKind::NotFound);
    }

    /// What is there to read after what was opened, in pieces.
    fn pieces(read_file: &ReadFile) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        read(&open_to_read(read_file).unwrap(), &mut |piece| pieces.push(piece)).unwrap();
        pieces
    }

    #[test]
    fn a_file_is_read_from_any_byte_on_and_in_bounded_pieces() {
        let top = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..PIECE * 2 + 7).map(|at| (at % 251).to_le_bytes()[0]).collect();
        std::fs::write(top.path().join("blob"), &bytes).unwrap();
        let path = bytes_of(top.path());
        let member = ReadFile { path, member: Some(b"blob".to_vec()), offset: 5 };
        let file = ReadFile { path: bytes_of(&top.path().join("blob")), member: None, offset: 5 };
        for asked in [&member, &file] {
            let pieces = pieces(asked);
            assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [PIECE, PIECE, 2]);
            assert!(pieces.concat() == bytes[5..]);
        }
        assert!(pieces(&ReadFile { offset: 1 << 40, ..member }).is_empty());
    }

    /// A stream from a worker that this test is.
    fn stream(host: &Arc<HostPaths>) -> (Stream, OwnedFd) {
        let (connection, theirs) = socket::stream_pair().unwrap();
        let shared = host.shared.clone();
        lock(&shared.workers).busy.push(Busy { question: 7, paths: Vec::new(), since: Instant::now() });
        // No process has this number.
        let source = Some((Worker::new(i32::MAX, connection), Slot { shared, question: 7 }));
        let paths = vec![PathBuf::from("/somewhere")];
        (Stream { host: host.clone(), paths, source, has_ended: false, piece: io::Cursor::default() }, theirs)
    }

    #[tokio::test]
    async fn a_stream_that_breaks_is_never_a_short_file() {
        let host = Arc::new(HostPaths::new(Handle::current()));
        let content = |bytes: &[u8]| Tell::Content(bytes.to_vec());
        let unreadable = Tell::Failed(Failure { errno: 5, ..Default::default() });
        for (said, expected) in [
            (vec![content(b"whole"), content(b"")], Ok("whole")),
            (vec![content(b"")], Ok("")),
            (vec![content(b"half")], Err("has ended")),
            (vec![content(b"half"), unreadable], Err("os error 5")),
            (vec![content(b"half"), Tell::Done(true)], Err("has ended")),
        ] {
            let (mut stream, theirs) = stream(&host);
            for tell in said {
                let answer = Answer::from(tell);
                let frame = frame::encode(&answer).unwrap();
                worker::send_all(theirs.as_fd(), &frame, &[]).unwrap();
            }
            drop(theirs);
            let mut text = String::new();
            let outcome = stream.read_to_string(&mut text).map(|_| text);
            match (outcome, expected) {
                (Ok(text), Ok(expected)) => assert_eq!(text, expected),
                (Err(error), Err(words)) => {
                    assert!(error.to_string().contains(words), "{error}");
                    assert!(stream.read(&mut [0]).is_err(), "whoever asks again");
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
