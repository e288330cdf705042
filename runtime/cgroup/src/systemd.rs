//! systemd as the manager of cgroups: scopes created, changed and stopped over D-Bus
//! (org.freedesktop.systemd1(5)).
//!
//! One connection to the system bus on a dedicated thread, which all callers share by messages. It
//! is made when first needed, and again after it has ended (a bus that was restarted, a systemd
//! that re-executed itself). Callers block, each for at most [`LIMIT`], whatever the bus does;
//! calls of different callers run concurrently, and none waits for one that hangs.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc as answers};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::{Mutex, broadcast, mpsc};
use zbus::zvariant::{OwnedObjectPath, Value as Variant};
use zbus::{Connection, MatchRule, MessageStream, connection};

use crate::unit::{Property, Value};

/// How long a call may take, with the job that it starts. A healthy systemd takes milliseconds; one
/// that is busy with a thousand units, seconds; the kubelet gives up on a container after two
/// minutes.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Beyond that the thread itself does not answer, which would be a bug in this file.
const THREAD_LIMIT: Duration = Duration::from_secs(35);

/// How often a call is made, each with its connection, before it counts as failed. A connection
/// that has ended since its last use is noticed only by using it; and a systemd that re-executes
/// itself answers none of the earlier calls, on new connections either, and re-executes itself
/// again when packages are upgraded. The bus keeps calls until it is back.
const ATTEMPTS: u32 = 5;

/// How often a wait for a job checks whether the job's work is done: the signal of its end is lost
/// with the connection, or when systemd re-executes itself.
const LOOK: Duration = Duration::from_millis(500);

/// Ends of jobs that may wait to be read. All units of the machine count; a caller that falls
/// behind checks for itself, see [`LOOK`].
const JOBS_WAITING: usize = 1024;

const DESTINATION: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// A call to systemd that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SystemdError {
    /// The system bus does not answer.
    #[error("cannot connect to systemd over D-Bus")]
    Connect(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// systemd refused, or the connection ended.
    #[error("{method} failed")]
    Call {
        /// The method of `org.freedesktop.systemd1.Manager`.
        method: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The job was not done.
    #[error("systemd's job ended with {result:?}")]
    Job {
        /// As in the signal `JobRemoved`: `canceled`, `timeout`, `failed`, `dependency`, `skipped`.
        result: String,
    },
    /// No answer in time.
    #[error("systemd did not answer within {} s", LIMIT.as_secs())]
    Silent,
    /// The thread that talks to systemd is gone.
    #[error("the thread that talks to systemd has ended")]
    Thread,
}

enum Request {
    Start { unit: String, properties: Vec<Property>, process: u32 },
    Set { unit: String, properties: Vec<Property> },
    Stop { unit: String },
}

type Answer = Result<(), SystemdError>;

/// The connection to systemd. Clones share it; it ends with the last.
#[derive(Clone)]
pub struct Systemd {
    requests: mpsc::UnboundedSender<(Request, answers::SyncSender<Answer>)>,
}

impl fmt::Debug for Systemd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Systemd")
    }
}

impl Systemd {
    /// Starts the thread. No connection is made yet.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn new() -> std::io::Result<Self> {
        // On this thread alone: zbus takes its timers and sockets from the runtime that it is
        // called in.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (requests, received) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name("berth-systemd".to_owned())
            .spawn(move || runtime.block_on(serve(received)))?;
        Ok(Self { requests })
    }

    /// Makes a scope around `process`, with these properties, and waits until it is there.
    pub(crate) fn start(&self, unit: &str, properties: Vec<Property>, process: u32) -> Answer {
        self.ask(Request::Start { unit: unit.to_owned(), properties, process })
    }

    /// Changes properties until the next boot, and waits until the files have them.
    pub(crate) fn set(&self, unit: &str, properties: Vec<Property>) -> Answer {
        self.ask(Request::Set { unit: unit.to_owned(), properties })
    }

    /// Stops a unit, with whatever runs in it. Returns when it is stopped or was absent; it waits
    /// no longer than `within`, and the unit may stop later.
    pub(crate) fn stop(&self, unit: &str, within: Duration) -> Answer {
        self.ask_within(Request::Stop { unit: unit.to_owned() }, within.min(THREAD_LIMIT))
    }

    /// A service that answers nothing, and the calls it got.
    #[cfg(test)]
    pub(crate) fn silent() -> (Self, mpsc::UnboundedReceiver<impl Sized>) {
        let (requests, received) = mpsc::unbounded_channel();
        (Self { requests }, received)
    }

    fn ask(&self, request: Request) -> Answer {
        self.ask_within(request, THREAD_LIMIT)
    }

    fn ask_within(&self, request: Request, within: Duration) -> Answer {
        let (answer, answered) = answers::sync_channel(1);
        self.requests.send((request, answer)).map_err(|_| SystemdError::Thread)?;
        match answered.recv_timeout(within) {
            Ok(answer) => answer,
            Err(answers::RecvTimeoutError::Timeout) => Err(SystemdError::Silent),
            Err(answers::RecvTimeoutError::Disconnected) => Err(SystemdError::Thread),
        }
    }
}

/// The end of a job: `JobRemoved`.
#[derive(Debug, Clone)]
struct JobEnd {
    job: OwnedObjectPath,
    result: String,
}

/// A connection that worked when it was last used.
#[derive(Clone)]
struct Bus {
    connection: Connection,
    jobs: broadcast::Sender<JobEnd>,
    /// Set when the peer has closed the connection: a call would wait for its answer forever.
    ended: Arc<AtomicBool>,
}

async fn serve(mut requests: mpsc::UnboundedReceiver<(Request, answers::SyncSender<Answer>)>) {
    let bus = Arc::new(Mutex::new(None));
    while let Some((request, answer)) = requests.recv().await {
        let bus = bus.clone();
        tokio::spawn(async move {
            let result = match tokio::time::timeout(LIMIT, carry_out(&bus, &request)).await {
                Ok(result) => result,
                Err(_) => {
                    // It may be dead without notice; the next call finds out with a new one. The
                    // lock is held for no longer than another caller takes to connect, and that
                    // caller has the same limit.
                    bus.lock().await.take();
                    Err(SystemdError::Silent)
                }
            };
            // The caller may have given up.
            let _ = answer.send(result);
        });
    }
}

async fn carry_out(shared: &Mutex<Option<Bus>>, request: &Request) -> Answer {
    let mut attempts = 1;
    loop {
        let result = attempt(shared, request).await;
        match &result {
            Err(SystemdError::Call { source, .. }) if attempts < ATTEMPTS && is_lost(source.as_ref()) => {
                attempts += 1;
                shared.lock().await.take();
            }
            _ => return result,
        }
    }
}

async fn attempt(shared: &Mutex<Option<Bus>>, request: &Request) -> Answer {
    let bus = {
        let mut shared = shared.lock().await;
        match shared.as_ref() {
            Some(bus) if !bus.ended.load(Ordering::Acquire) => bus.clone(),
            _ => shared.insert(connect().await?).clone(),
        }
    };
    match request {
        Request::Start { unit, properties, process } => start(&bus, unit, properties, *process).await,
        Request::Set { unit, properties } => set(&bus, unit, properties).await,
        Request::Stop { unit } => stop(&bus, unit).await,
    }
}

async fn connect() -> Result<Bus, SystemdError> {
    let fail = |error: zbus::Error| SystemdError::Connect(Box::new(error));
    let connection = connection::Builder::system().map_err(fail)?.build().await.map_err(fail)?;
    let rule = MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .sender(DESTINATION)
        .and_then(|rule| rule.path(PATH))
        .and_then(|rule| rule.interface(MANAGER))
        .and_then(|rule| rule.member("JobRemoved"))
        .map_err(fail)?
        .build();
    let mut ends =
        MessageStream::for_match_rule(rule, &connection, Some(JOBS_WAITING)).await.map_err(fail)?;
    // systemd sends signals only to subscribers.
    call(&connection, "Subscribe", &()).await?;
    let (jobs, _) = broadcast::channel(JOBS_WAITING);
    let told = jobs.clone();
    let ended = Arc::new(AtomicBool::new(false));
    let ends_here = ended.clone();
    tokio::spawn(async move {
        while let Some(Ok(message)) = ends.next().await {
            if let Ok((_, job, _, result)) =
                message.body().deserialize::<(u32, OwnedObjectPath, String, String)>()
            {
                // The caller may have stopped waiting.
                let _ = told.send(JobEnd { job, result });
            }
        }
        ends_here.store(true, Ordering::Release);
    });
    Ok(Bus { connection, jobs, ended })
}

async fn call<B>(
    connection: &Connection,
    method: &'static str,
    body: &B,
) -> Result<zbus::Message, SystemdError>
where
    B: serde::Serialize + zbus::zvariant::DynamicType,
{
    connection
        .call_method(Some(DESTINATION), PATH, Some(MANAGER), method, body)
        .await
        .map_err(|error| SystemdError::Call { method, source: Box::new(error) })
}

/// Whether the connection failed, and not the call.
fn is_lost(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref::<zbus::Error>(), Some(zbus::Error::InputOutput(_)))
        || is_named(error, "org.freedesktop.DBus.Error.NoReply")
        || is_named(error, "org.freedesktop.DBus.Error.Disconnected")
}

fn is_named(error: &(dyn std::error::Error + 'static), name: &str) -> bool {
    matches!(error.downcast_ref::<zbus::Error>(), Some(zbus::Error::MethodError(found, _, _)) if found.as_str() == name)
}

fn variants(properties: &[Property]) -> Vec<(&str, Variant<'_>)> {
    properties
        .iter()
        .map(|(name, value)| {
            let value = match value {
                Value::Text(text) => Variant::from(text.as_str()),
                Value::Flag(flag) => Variant::from(*flag),
                Value::Number(number) => Variant::from(*number),
                Value::Bits(bits) => Variant::from(bits.as_slice()),
                Value::Processes(pids) => Variant::from(pids.as_slice()),
                Value::Signal(signal) => Variant::from(*signal),
                Value::Units(units) => Variant::from(units.as_slice()),
                Value::Devices(devices) => Variant::from(devices.clone()),
            };
            (*name, value)
        })
        .collect()
}

/// The last argument of `StartTransientUnit`: units that come with it. There are none.
type Auxiliary<'a> = Vec<(&'a str, Vec<(&'a str, Variant<'a>)>)>;

async fn start(bus: &Bus, unit: &str, properties: &[Property], process: u32) -> Answer {
    const METHOD: &str = "StartTransientUnit";
    // Before the call, so that the end cannot come before there is a listener.
    let mut ends = bus.jobs.subscribe();
    let body = (unit, "fail", variants(properties), Auxiliary::new());
    let reply = match call(&bus.connection, METHOD, &body).await {
        Err(SystemdError::Call { source, .. })
            if is_named(source.as_ref(), "org.freedesktop.systemd1.UnitExists") =>
        {
            // A retry after a connection that ended during the first attempt, which systemd
            // received all the same.
            if is_in(process, unit) {
                return Ok(());
            }
            // Left over from a failed unit of that name.
            call(&bus.connection, "ResetFailedUnit", &(unit,)).await?;
            call(&bus.connection, METHOD, &body).await?
        }
        other => other?,
    };
    finished(&mut ends, &reply, METHOD, || is_in(process, unit)).await
}

async fn set(bus: &Bus, unit: &str, properties: &[Property]) -> Answer {
    call(&bus.connection, "SetUnitProperties", &(unit, true, variants(properties))).await?;
    // systemd writes the files after it has answered, but before it takes the next message.
    call(&bus.connection, "GetUnit", &(unit,)).await.map(drop)
}

async fn stop(bus: &Bus, unit: &str) -> Answer {
    const METHOD: &str = "StopUnit";
    let mut ends = bus.jobs.subscribe();
    let reply = match call(&bus.connection, METHOD, &(unit, "replace")).await {
        Err(SystemdError::Call { source, .. })
            if is_named(source.as_ref(), "org.freedesktop.systemd1.NoSuchUnit") =>
        {
            return Ok(());
        }
        other => other?,
    };
    // A job whose end was missed is over when the unit is; the caller looks at the cgroup itself.
    let limit = Duration::from_secs(5);
    tokio::time::timeout(limit, finished(&mut ends, &reply, METHOD, || false)).await.unwrap_or(Ok(()))
}

/// Waits for the end of the job that `reply` names, or until `done` says that its work is.
async fn finished(
    ends: &mut broadcast::Receiver<JobEnd>,
    reply: &zbus::Message,
    method: &'static str,
    done: impl Fn() -> bool,
) -> Answer {
    let job: OwnedObjectPath =
        reply.body().deserialize().map_err(|error| SystemdError::Call { method, source: Box::new(error) })?;
    loop {
        match tokio::time::timeout(LOOK, ends.recv()).await {
            Ok(Ok(end)) if end.job == job => {
                return if end.result == "done" {
                    Ok(())
                } else {
                    Err(SystemdError::Job { result: end.result })
                };
            }
            Ok(Ok(_) | Err(broadcast::error::RecvError::Lagged(_))) => continue,
            Ok(Err(broadcast::error::RecvError::Closed)) => tokio::time::sleep(LOOK).await,
            Err(_) => {}
        }
        if done() {
            return Ok(());
        }
    }
}

/// Whether the process is in the scope: systemd sets every property of a scope before it moves the
/// processes into it.
fn is_in(process: u32, unit: &str) -> bool {
    let path = format!("/proc/{process}/cgroup");
    let Ok(text) = std::fs::read_to_string(Path::new(&path)) else { return false };
    text.lines().any(|line| line.rsplit('/').next() == Some(unit))
}
