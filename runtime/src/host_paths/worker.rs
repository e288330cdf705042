//! The worker: a process that does what it is asked, one question after the other, until the daemon
//! closes the connection. It has one thread, and nothing but that connection.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use berth_cni::Step;
use berth_model::container::Device;
use berth_shim_proto::frame;
use berth_sys::{file, process, socket};

use super::message::{
    Answer, Ask, AskedCni, At, Below, Failure, FoundDevices, Question, Tell, bytes_of, path_of,
};
use super::{cgroup, cni, import, log_file, profile};
use crate::host_directory;
use crate::oci_spec::{ResolvedDevice, devices, mounts};

/// The word that makes `berthd` a worker. Only the daemon says it.
pub const WORD: &str = "look-at-host-paths";

/// The descriptor of the connection.
const CONNECTION: i32 = 3;

/// Works until the daemon has closed the connection or ended.
///
/// # Errors
/// When this process was not started by a daemon, or the connection fails.
pub fn run() -> io::Result<()> {
    process::close_from(CONNECTION.unsigned_abs() + 1, process::CloseRange::Now)?;
    let connection = file::take_inherited(CONNECTION)?;
    process::set_name(c"berthd-hostpath")?;
    // What plugins leave behind is found here.
    process::become_subreaper()?;
    std::env::set_current_dir("/")?;
    // What it makes is the pods', and has the mode that it is made with.
    process::set_umask(0);
    serve(connection.as_fd())
}

fn serve(connection: BorrowedFd<'_>) -> io::Result<()> {
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        while let Some(question) = frame::take::<Question>(&mut received).map_err(io::Error::other)? {
            let (tell, opened) =
                answer(question, connection).unwrap_or_else(|failure| Tell::Failed(failure).into());
            let answer = Answer::from(tell);
            let frame = match frame::encode(&answer) {
                Ok(frame) => frame,
                Err(error) => {
                    frame::encode(&Answer::from(Tell::Failed(failure(&error)))).map_err(io::Error::other)?
                }
            };
            send_all(connection, &frame, &opened)?;
        }
        match socket::receive(connection, &mut buffer) {
            Ok((0, _)) => return Ok(()),
            Ok((length, _)) => received.extend_from_slice(buffer.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sends the whole frame, and descriptors with its beginning.
pub(super) fn send_all(connection: BorrowedFd<'_>, mut frame: &[u8], files: &[File]) -> io::Result<()> {
    let mut files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    while !frame.is_empty() {
        match socket::send(connection, frame, &files) {
            Ok(sent) => {
                files.clear();
                frame = frame.get(sent..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What is found, and what is open.
pub(super) type Found = (Tell, Vec<File>);

impl From<Tell> for Found {
    fn from(tell: Tell) -> Self {
        (tell, Vec::new())
    }
}

fn answer(question: Question, connection: BorrowedFd<'_>) -> Result<Found, Failure> {
    let tell = match question.ask {
        Some(Ask::Source(path)) => {
            let found = mounts::find_source(path_of(&path)).map_err(|error| failure(&error))?;
            Tell::Path(bytes_of(&found))
        }
        Some(Ask::Directory(path)) => {
            host_directory::make_missing(path_of(&path)).map_err(|(at, error)| failed_at(&at, &error))?;
            Tell::Done(true)
        }
        Some(Ask::Devices(asked)) => {
            let asked: Vec<Device> = asked.devices.into_iter().map(Device::from).collect();
            found(devices::resolve_devices(&asked).map_err(|error| failure(&error))?)
        }
        Some(Ask::DeviceBelow(below)) => {
            let device = devices::find_below(path_of(&below.top), path_of(&below.path));
            found(device.into_iter().collect())
        }
        Some(Ask::HostDevices(())) => found(devices::host_devices().map_err(|error| failure(&error))?),
        Some(Ask::Profile(path)) => {
            Tell::Content(profile::read(path_of(&path)).map_err(|error| failed_at(path_of(&path), &error))?)
        }
        Some(Ask::Rotate(rotate)) => {
            let directory = path_of(&rotate.directory);
            let rotated = log_file::rotate_if_large(directory, path_of(&rotate.name), rotate.limit);
            Tell::Done(rotated.map_err(|error| failed_at(directory, &error))?)
        }
        Some(Ask::OpenControl(open)) => return Ok(cgroup::open(&open)),
        Some(Ask::Tree(asked)) => {
            let at = path_of(&asked.directory);
            Tell::Tree(cgroup::tree(at, asked.known).map_err(|error| failed_at(at, &error))?)
        }
        Some(Ask::RemoveCgroup(asked)) => Tell::Outcomes(cgroup::remove(&asked)),
        Some(Ask::Cni(AskedCni { asked, paths: _ })) => {
            // Plugins get the daemon's, and what is made for them is only for root.
            process::set_umask(0o077);
            let outcome = cni::perform(&asked, connection, &|step| announce(connection, step));
            // The daemon looks for those that cannot end.
            while matches!(process::reap_any(), Ok(Some(_))) {}
            process::set_umask(0);
            Tell::Content(outcome.map_err(|text| Failure { text, ..Failure::default() })?)
        }
        Some(Ask::Import(path)) => {
            let opened = import::open(path_of(&path)).map_err(|error| failed_at(path_of(&path), &error))?;
            Tell::Done(opened.is_none())
        }
        Some(Ask::Member(Below { top, path })) => {
            let at = path_of(&top).join(path_of(&path));
            let opened = import::open_member(path_of(&top), path_of(&path));
            Tell::Done(opened.map(|_| true).map_err(|error| failed_at(&at, &error))?)
        }
        Some(Ask::Read(read)) => {
            let failed = |error| failed_at(path_of(&read.path), &error);
            let file = import::open_to_read(&read).map_err(failed)?;
            say(connection, Tell::Done(true));
            import::read(&file, &mut |piece| say(connection, Tell::Content(piece))).map_err(failed)?;
            Tell::Content(Vec::new())
        }
        Some(Ask::Checkup(daemon)) => {
            let daemon = serde_json::from_slice(&daemon).map_err(|error| failure(&error))?;
            let findings = berth_checkup::look(Path::new("/"), &daemon);
            Tell::Content(serde_json::to_vec(&findings).map_err(|error| failure(&error))?)
        }
        None => {
            return Err(Failure { text: "a question without content".to_owned(), ..Failure::default() });
        }
    };
    Ok(tell.into())
}

/// Says where it is.
fn announce(connection: BorrowedFd<'_>, step: Step<'_>) {
    let (path, milliseconds) = match step {
        Step::Path(path) => (path, None),
        Step::Plugin(path, limit) => (path, Some(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX))),
    };
    say(connection, Tell::At(At { path: bytes_of(path), milliseconds }));
}

/// Says something that is not all. Without a daemon that hears it, nothing more is begun: the next
/// daemon gives back what there is by then, and nothing may come after that.
fn say(connection: BorrowedFd<'_>, tell: Tell) {
    let answer = Answer::from(tell);
    let said =
        frame::encode(&answer).map_err(io::Error::other).and_then(|frame| send_all(connection, &frame, &[]));
    if said.is_err() {
        process::exit_now(1);
    }
}

fn found(devices: Vec<ResolvedDevice>) -> Tell {
    Tell::Devices(FoundDevices { devices: devices.into_iter().map(Into::into).collect() })
}

fn failure(error: &dyn std::error::Error) -> Failure {
    Failure { text: crate::chain(error), ..Failure::default() }
}

fn failed_at(path: &Path, error: &io::Error) -> Failure {
    Failure { text: error.to_string(), path: bytes_of(path), errno: error.raw_os_error().unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::super::message::{AskedDevices, Rotate};
    use super::*;

    /// A worker in a thread, and questions to it.
    fn asked(questions: &[Ask]) -> Vec<Tell> {
        let (ours, theirs) = socket::stream_pair().unwrap();
        let worker = std::thread::spawn(move || serve(theirs.as_fd()));
        let answers = questions.iter().map(|ask| {
            send_all(ours.as_fd(), &frame::encode(&Question::from(ask.clone())).unwrap(), &[]).unwrap();
            let (mut received, mut buffer) = (Vec::new(), [0; 100]);
            loop {
                if let Some(answer) = frame::take::<Answer>(&mut received).unwrap() {
                    return answer.tell.unwrap();
                }
                let (length, _) = socket::receive(ours.as_fd(), &mut buffer).unwrap();
                received.extend_from_slice(&buffer[..length]);
            }
        });
        let answers = answers.collect();
        drop(ours);
        worker.join().unwrap().unwrap();
        answers
    }

    #[test]
    fn questions_are_answered_one_after_the_other_until_there_are_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let top = std::fs::canonicalize(directory.path()).unwrap();
        std::os::unix::fs::symlink("made", top.join("link")).unwrap();
        std::fs::write(top.join("log"), "too much").unwrap();
        std::fs::write(top.join("profile"), "{}").unwrap();
        let bytes = |name: &str| bytes_of(&top.join(name));
        let null = Device {
            container_path: "/dev/x".into(),
            host_path: "/dev/null".into(),
            permissions: "r".into(),
        };
        let answers = asked(&[
            Ask::Directory(bytes("made/below")),
            Ask::Source(bytes("link")),
            Ask::Source(bytes("profile/below")),
            Ask::Directory(bytes("profile/below")),
            Ask::Devices(AskedDevices { devices: vec![(&null).into()] }),
            Ask::HostDevices(()),
            Ask::Profile(bytes("profile")),
            Ask::Rotate(Rotate { directory: bytes(""), name: b"log".to_vec(), limit: 4 }),
        ]);
        let [made, source, failed, at, devices, host, profile, rotated] = answers.as_slice() else {
            panic!("{answers:?}")
        };
        assert_eq!((made, source), (&Tell::Done(true), &Tell::Path(bytes("made"))));
        let Tell::Failed(failed) = failed else { panic!("{failed:?}") };
        assert!(failed.text.contains("cannot look up"), "{failed:?}");
        let Tell::Failed(at) = at else { panic!("{at:?}") };
        assert_eq!((&at.path, at.errno), (&bytes("profile"), 20), "ENOTDIR");
        let Tell::Devices(devices) = devices else { panic!("{devices:?}") };
        let devices: Vec<ResolvedDevice> = devices.devices.iter().cloned().map(Into::into).collect();
        assert_eq!(devices, devices::resolve_devices(&[null]).unwrap());
        assert!(matches!(host, Tell::Devices(found) if found.devices.len() > 5), "{host:?}");
        assert_eq!((profile, rotated), (&Tell::Content(b"{}".to_vec()), &Tell::Done(true)));
        assert!(top.join("log.1").exists());
    }
}
