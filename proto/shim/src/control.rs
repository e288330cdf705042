//! Requests of the daemon, and the answers of a shim.
//!
//! A connection carries requests one way, and replies and events the other. Replies bear the number
//! of their request and may come in another order: an exec is answered when it ends.

use crate::launch::{Launch, Process};

/// A request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// Chosen by the daemon; not 0.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The call.
    #[prost(oneof = "request::Call", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11")]
    pub call: Option<request::Call>,
}

/// The calls of a [`Request`].
pub mod request {
    use super::{AttachRequest, ExecRequest, Launch, Resize, SignalExec};

    /// The call.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Call {
        /// Create the container up to the exec of its program. Once, as the first request. The
        /// frame carries descriptors when the plan says so. Answer: `Created`.
        #[prost(message, tag = "2")]
        Create(Box<Launch>),
        /// Let the program run. Answer: `Started`, or `Failed` when its exec failed or took too
        /// long; then the container is over. Never without an outcome: until then the shim answers
        /// other requests.
        #[prost(message, tag = "3")]
        Start(()),
        /// Run another program in it. The frame carries two or three descriptors: standard output,
        /// error, and input. With a terminal it carries one: a stream socket, on which a descriptor
        /// for both input and output comes with a byte. Answer: `Ended`, once all that the program
        /// wrote has been passed on. The program is killed when the connection ends before.
        #[prost(message, tag = "4")]
        Exec(ExecRequest),
        /// Send this signal to the main process only. Answer: `Done`.
        #[prost(int32, tag = "5")]
        Signal(i32),
        /// Send a signal to the process group of a running exec. Answer: `Done`.
        #[prost(message, tag = "6")]
        SignalExec(SignalExec),
        /// Reopen the log path. Answer: `Done`.
        #[prost(message, tag = "7")]
        ReopenLog(()),
        /// Answer: `State`.
        #[prost(message, tag = "8")]
        State(()),
        /// Give up a container that was not started: end the waiting child and the shim. Answer:
        /// none, the connection ends.
        #[prost(message, tag = "9")]
        Discard(()),
        /// Give a terminal a size. Answer: `Done`. For shims of [`Phase::version`] 2 and
        /// later.
        ///
        /// [`Phase::version`]: super::Phase::version
        #[prost(message, tag = "10")]
        Resize(Resize),
        /// Pass the streams of the container's own program on, from now on. The frame carries a
        /// pipe for each one that is wanted: standard output, error, and input. Answer: `Done`. An
        /// output that ends is closed; the client leaves by closing all of them. For shims of
        /// [`Phase::version`] 2 and later.
        ///
        /// [`Phase::version`]: super::Phase::version
        #[prost(message, tag = "11")]
        Attach(AttachRequest),
    }
}

/// A program to run in a running container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExecRequest {
    /// The program and its arguments.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub args: Vec<Vec<u8>>,
    /// A new terminal as standard input, output and error. For shims of [`Phase::version`] 1 and
    /// later; an older one refuses the request, because a descriptor is missing.
    #[prost(bool, tag = "2")]
    pub terminal: bool,
}

/// A signal for a running exec.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct SignalExec {
    /// The `id` of its request.
    #[prost(uint64, tag = "1")]
    pub request_id: u64,
    /// The signal.
    #[prost(int32, tag = "2")]
    pub signal: i32,
}

/// Which streams of the container's program are wanted.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct AttachRequest {
    /// Standard output; of a terminal, all output.
    #[prost(bool, tag = "1")]
    pub stdout: bool,
    /// Standard error.
    #[prost(bool, tag = "2")]
    pub stderr: bool,
    /// Standard input.
    #[prost(bool, tag = "3")]
    pub stdin: bool,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Resize {
    /// The `id` of the exec whose terminal it is; 0 for the container's own.
    #[prost(uint64, tag = "1")]
    pub request_id: u64,
    /// At most 65535.
    #[prost(uint32, tag = "2")]
    pub columns: u32,
    /// At most 65535.
    #[prost(uint32, tag = "3")]
    pub rows: u32,
}

/// A reply, or an event when `id` is 0.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reply {
    /// The request's number, or 0.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The answer.
    #[prost(oneof = "reply::Answer", tags = "2, 3, 4, 5, 6, 7, 8")]
    pub answer: Option<reply::Answer>,
}

/// The answers of a [`Reply`].
pub mod reply {
    use super::{Created, Ended, Failed, Phase, Started};
    use crate::exit_record::ExitRecord;

    /// The answer.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Answer {
        /// The container waits for its start.
        #[prost(message, tag = "2")]
        Created(Created),
        /// Its program runs.
        #[prost(message, tag = "3")]
        Started(Started),
        /// An exec ended.
        #[prost(message, tag = "4")]
        Ended(Ended),
        /// It succeeded.
        #[prost(message, tag = "5")]
        Done(()),
        /// It failed.
        #[prost(message, tag = "6")]
        Failed(Failed),
        /// The state.
        #[prost(message, tag = "7")]
        State(Phase),
        /// Event: the container ended like this. The same is in its exit record, unless that could
        /// not be written. The last message; the connection ends.
        #[prost(message, tag = "8")]
        Exited(ExitRecord),
    }
}

/// A container that waits for its start.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Created {
    /// The host's pid of its main process.
    #[prost(int32, tag = "1")]
    pub pid: i32,
    /// When that started, in clock ticks since boot: proc_pid_stat(5), field 22.
    #[prost(uint64, tag = "2")]
    pub start_time: u64,
    /// Who it runs as.
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    /// Its primary group.
    #[prost(uint32, tag = "4")]
    pub gid: u32,
    /// All its supplementary groups, the primary one included.
    #[prost(uint32, repeated, tag = "5")]
    pub groups: Vec<u32>,
    /// Settings that were applied with a weaker value that does not affect isolation, as text.
    #[prost(string, repeated, tag = "6")]
    pub notes: Vec<String>,
    /// Its home directory, of the container's passwd file.
    #[prost(bytes = "vec", tag = "7")]
    pub home: Vec<u8>,
}

/// A container whose program runs.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Started {
    /// When exec succeeded, in nanoseconds since the epoch.
    #[prost(int64, tag = "1")]
    pub at_unix_ns: i64,
}

/// An exec that ended.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Ended {
    /// The exit code, or 128 + the signal that ended it.
    #[prost(int32, tag = "1")]
    pub exit_code: i32,
}

/// A failed request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failed {
    /// The step that failed, in words that follow "cannot".
    #[prost(string, tag = "1")]
    pub step: String,
    /// The kernel's error number; 0 when it was no system call that failed.
    #[prost(int32, tag = "2")]
    pub errno: i32,
    /// Details: a path, a name, the kernel's message. May be empty.
    #[prost(string, tag = "3")]
    pub detail: String,
}

/// The step that is exec itself.
pub const EXECUTE: &str = "execute";

impl Failed {
    /// What a shell returns for a command that it cannot start: 127 not found, 126 not executable
    /// (POSIX, "Command Search and Execution").
    #[must_use]
    pub fn shell_code(&self) -> Option<i32> {
        const ENOENT: i32 = 2;
        const ENOEXEC: i32 = 8;
        const EACCES: i32 = 13;
        match (self.step.as_str(), self.errno) {
            (EXECUTE, ENOENT) => Some(127),
            (EXECUTE, ENOEXEC | EACCES) => Some(126),
            _ => None,
        }
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot {}", self.step)?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        if self.errno != 0 {
            let text = std::io::Error::from_raw_os_error(self.errno).to_string();
            // "No such file or directory (os error 2)": the number says nothing to a person.
            write!(f, ": {}", text.split(" (os error").next().unwrap_or(&text).to_lowercase())?;
        }
        Ok(())
    }
}

impl std::error::Error for Failed {}

/// The phase of a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Phase {
    /// It waits for its start, or runs since then.
    #[prost(message, optional, tag = "1")]
    pub created: Option<Created>,
    /// When it was started, if it was.
    #[prost(message, optional, tag = "2")]
    pub started: Option<Started>,
    /// It was asked to start and is not its program yet; the outcome comes as an event, `Started`
    /// or `Exited`.
    #[prost(bool, tag = "3")]
    pub starting: bool,
    /// What the shim knows beyond the first version of this protocol: 1, terminals for exec; 2, it
    /// keeps what programs have open to itself and passes bytes on, `Resize` and `Attach`. Before,
    /// the streams of an exec are the program's own, and what comes on the socket is the terminal's
    /// other end.
    #[prost(uint32, tag = "4")]
    pub version: u32,
}

/// The version of this protocol, as [`Phase::version`] has it.
pub const VERSION: u32 = 2;

/// Makes the process of an exec from the container's main one: same user, capabilities and filter,
/// other program. With a terminal it has a `TERM`, as other runtimes give it one.
#[must_use]
pub fn exec_process(main: &Process, request: &ExecRequest) -> Process {
    let mut process = Process { args: request.args.clone(), terminal: request.terminal, ..main.clone() };
    if request.terminal && !process.env.iter().any(|variable| variable.starts_with(b"TERM=")) {
        process.env.push(b"TERM=xterm".to_vec());
    }
    process
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_a_terminal_knows_which_kind_it_is() {
        let term = |env: &[&str], terminal| {
            let main = Process {
                env: env.iter().map(|variable| variable.as_bytes().to_vec()).collect(),
                terminal: true,
                ..Process::default()
            };
            let request = ExecRequest { args: vec![b"sh".to_vec()], terminal };
            let process = exec_process(&main, &request);
            assert_eq!(process.terminal, terminal);
            process.env.concat()
        };
        assert_eq!(term(&["A=b"], true), b"A=bTERM=xterm");
        assert_eq!(term(&["TERM=vt100"], true), b"TERM=vt100");
        assert_eq!(term(&["A=b"], false), b"A=b");
    }
}
