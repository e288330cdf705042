//! Notifications for the service manager: that the daemon serves, what it does, that it is alive,
//! that it ends.
//!
//! The protocol of sd_notify(3): datagrams of `NAME=value` lines to the socket that `NOTIFY_SOCKET`
//! names, a path or, behind an `@`, an abstract name. Without the variable nothing is sent. Nothing
//! here can keep the daemon from serving: a failure to send is logged and ignored.
//!
//! Shims and programs of the daemon get no environment, so none of them can send notifications.

use std::ffi::{OsStr, OsString};
use std::future::Future;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

use berth_cri::v1;
use berth_cri::v1::image_service_client::ImageServiceClient;
use berth_cri::v1::runtime_service_client::RuntimeServiceClient;
use tonic::transport::Endpoint;

/// How long a datagram may wait. The manager reads at once unless it is in trouble itself, and then
/// the daemon need not be.
const SEND_LIMIT: Duration = Duration::from_secs(1);

/// The longest pause before a failed probe is retried.
const AGAIN: Duration = Duration::from_secs(1);

/// The longest status line; systemd shows it in one line, and error messages may be long.
const MAX_STATUS_BYTES: usize = 200;

/// An id that no object has, since ids are random; well-formed, so that it is looked up.
const NOBODY: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The connection to the service manager, if there is one.
#[derive(Debug)]
pub(crate) struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// From `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` of the daemon's environment.
    pub(crate) fn from_environment() -> Self {
        Self::new(|name| std::env::var_os(name), std::process::id())
    }

    fn new(variable: impl Fn(&str) -> Option<OsString>, own_pid: u32) -> Self {
        let Some(name) = variable("NOTIFY_SOCKET") else { return Self { manager: None, watchdog: None } };
        let manager = match address(&name).and_then(|address| Ok((socket()?, address))) {
            Ok(manager) => Some(manager),
            Err(error) => {
                tracing::warn!(socket = %name.display(), %error, "cannot reach the service manager; it will get no notifications");
                None
            }
        };
        let watchdog =
            watchdog(variable("WATCHDOG_USEC").as_deref(), variable("WATCHDOG_PID").as_deref(), own_pid);
        Self { watchdog: manager.as_ref().and(watchdog), manager }
    }

    /// A status line for `systemctl status`.
    pub(crate) fn status(&self, text: &str) {
        self.send(&status_line(text));
    }

    /// Connections are accepted.
    pub(crate) fn ready(&self, status: &str) {
        self.send(&format!("READY=1\n{}", status_line(status)));
    }

    /// The configuration is being reloaded; [`ready`](Self::ready) says that it was.
    pub(crate) fn reloading(&self) {
        self.send("RELOADING=1\nSTATUS=reloading the configuration\n");
    }

    /// The daemon is stopping.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=stopping; pods keep running\n");
    }

    /// Notifies the watchdog while the daemon is alive: whenever half of the watchdog's time is
    /// over, `probe` has to succeed, within a quarter of it. A failed probe is retried, soon enough
    /// for the watchdog: see [`again`]. Its result is shown as the status. Never ends; without a
    /// watchdog it does nothing.
    pub(crate) async fn keep_alive<F>(&self, probe: impl Fn() -> F)
    where
        F: Future<Output = Result<String, ProbeError>>,
    {
        let Some(watchdog) = self.watchdog else { return std::future::pending().await };
        // First a pause, since it is started before the socket exists.
        let first = (watchdog / 2, watchdog / 4);
        let (mut pause, mut limit) = first;
        loop {
            tokio::time::sleep(pause).await;
            let outcome =
                tokio::time::timeout(limit, probe()).await.unwrap_or(Err(ProbeError::Late { limit }));
            match outcome {
                Ok(status) => {
                    self.send(&format!("WATCHDOG=1\n{}", status_line(&status)));
                    (pause, limit) = first;
                }
                // Without a notification, the manager restarts the daemon; pods do not notice.
                Err(error) => {
                    tracing::error!(error = %crate::chain(&error), "the daemon does not answer its own requests");
                    (pause, limit) = again(watchdog);
                }
            }
        }
    }

    fn send(&self, text: &str) {
        let Some((socket, address)) = &self.manager else { return };
        if let Err(error) = socket.send_to_addr(text.as_bytes(), address) {
            tracing::warn!(%error, "cannot notify the service manager");
        }
    }
}

/// The pause before a probe is retried, and its time limit. Of the watchdog's time a half and a
/// quarter have passed at most when the first has failed; with a sixteenth and an eighth the second
/// is done in time.
fn again(watchdog: Duration) -> (Duration, Duration) {
    (AGAIN.min(watchdog / 16), watchdog / 8)
}

fn socket() -> std::io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(SEND_LIMIT))?;
    Ok(socket)
}

fn address(name: &OsStr) -> std::io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(Path::new(name)),
        // vsock addresses are for machines as a whole, sd_notify(3).
        _ => Err(std::io::ErrorKind::Unsupported.into()),
    }
}

/// The watchdog's time, if it watches this process: sd_watchdog_enabled(3).
fn watchdog(microseconds: Option<&OsStr>, pid: Option<&OsStr>, own_pid: u32) -> Option<Duration> {
    let number = |text: &OsStr| text.to_str()?.parse::<u64>().ok();
    if let Some(pid) = pid
        && number(pid) != Some(u64::from(own_pid))
    {
        return None;
    }
    number(microseconds?).filter(|microseconds| *microseconds > 0).map(Duration::from_micros)
}

/// One line of a datagram: the text must not contain another assignment.
fn status_line(text: &str) -> String {
    let mut end = text.len().min(MAX_STATUS_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text: String = text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("STATUS={text}\n")
}

/// Why a probe failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// The connection is not accepted.
    #[error("cannot connect to the daemon's own socket")]
    Connect(#[source] tonic::transport::Error),
    /// A call.
    #[error("{call} failed")]
    Call {
        /// The call.
        call: &'static str,
        /// The answer.
        #[source]
        source: tonic::Status,
    },
    /// No answer.
    #[error("no answer within {limit:?}")]
    Late {
        /// The time limit.
        limit: Duration,
    },
}

/// Acts as a kubelet does, as a client of the daemon's own socket: connects, lists sandboxes and
/// containers (the registry's lock) and looks for an image (the store's). The answers are empty, so
/// that the probe costs the same on a full node.
pub(crate) async fn ask_the_daemon(socket: &Path) -> Result<(), ProbeError> {
    let uri = [b"unix://", socket.as_os_str().as_bytes()].concat();
    let channel = Endpoint::from_shared(uri).map_err(ProbeError::Connect)?.connect().await;
    let channel = channel.map_err(ProbeError::Connect)?;
    let failed = |call| move |source| ProbeError::Call { call, source };
    let mut runtime = RuntimeServiceClient::new(channel.clone());
    let filter = v1::PodSandboxFilter { id: NOBODY.to_owned(), ..v1::PodSandboxFilter::default() };
    runtime
        .list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) })
        .await
        .map_err(failed("ListPodSandbox"))?;
    let filter = v1::ContainerFilter { id: NOBODY.to_owned(), ..v1::ContainerFilter::default() };
    runtime
        .list_containers(v1::ListContainersRequest { filter: Some(filter) })
        .await
        .map_err(failed("ListContainers"))?;
    let image = v1::ImageSpec { image: format!("sha256:{NOBODY}"), ..v1::ImageSpec::default() };
    ImageServiceClient::new(channel)
        .image_status(v1::ImageStatusRequest { image: Some(image), verbose: false })
        .await
        .map_err(failed("ImageStatus"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn notifier(manager: &UnixDatagram, watchdog_us: Option<&str>) -> Notifier {
        let address = manager.local_addr().unwrap();
        let name = address.as_abstract_name().map_or_else(
            || address.as_pathname().unwrap().as_os_str().to_owned(),
            |name| OsStr::from_bytes(&[b"@", name].concat()).to_owned(),
        );
        Notifier::new(
            |variable| match variable {
                "NOTIFY_SOCKET" => Some(name.clone()),
                "WATCHDOG_USEC" => watchdog_us.map(OsString::from),
                _ => None,
            },
            1,
        )
    }

    fn received(manager: &UnixDatagram) -> String {
        let mut bytes = [0; 1024];
        manager.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let length = manager.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_manager_behind_a_path_or_an_abstract_name_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let name = format!("berth-notify-{}", std::process::id());
        for manager in [
            UnixDatagram::bind(directory.path().join("notify")).unwrap(),
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap(),
        ] {
            let notifier = notifier(&manager, None);
            notifier.ready("serves");
            assert_eq!(received(&manager), "READY=1\nSTATUS=serves\n");
            notifier.stopping();
            assert!(received(&manager).starts_with("STOPPING=1\n"));
        }
    }

    #[test]
    fn no_manager_or_an_odd_one_is_no_trouble() {
        for name in [None, Some(""), Some("@"), Some("relative"), Some("vsock:2:1"), Some("/nobody/listens")]
        {
            let notifier =
                Notifier::new(|variable| name.filter(|_| variable == "NOTIFY_SOCKET").map(OsString::from), 1);
            notifier.ready("serves");
        }
    }

    #[test]
    fn the_watchdog_counts_only_when_it_watches_this_process() {
        for (microseconds, pid, expected) in [
            (Some("60000000"), None, Some(60)),
            (Some("60000000"), Some("7"), Some(60)),
            (Some("60000000"), Some("8"), None),
            (Some("60000000"), Some(""), None),
            (Some("0"), None, None),
            (Some("-1"), None, None),
            (Some("soon"), None, None),
            (Some("99999999999999999999"), None, None),
            (None, Some("7"), None),
        ] {
            let found = watchdog(microseconds.map(OsStr::new), pid.map(OsStr::new), 7);
            assert_eq!(found, expected.map(Duration::from_secs), "{microseconds:?} {pid:?}");
        }
    }

    #[test]
    fn a_status_is_one_line_whatever_is_in_it() {
        for (text, line) in [
            ("serves", "STATUS=serves\n".to_owned()),
            ("", "STATUS=\n".to_owned()),
            ("no\nREADY=1\0", "STATUS=no READY=1 \n".to_owned()),
            (&"ü".repeat(150), format!("STATUS={}\n", "ü".repeat(100))),
            (&format!("x{}", "ü".repeat(150)), format!("STATUS=x{}\n", "ü".repeat(99))),
        ] {
            assert_eq!(status_line(text), line);
        }
    }

    #[tokio::test]
    async fn the_watchdog_hears_nothing_from_a_probe_that_fails_or_hangs() {
        let directory = tempfile::tempdir().unwrap();
        let manager = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        // 40 ms: a probe has 10, and another comes after 20.
        let notifier = notifier(&manager, Some("40000"));
        let probes = AtomicUsize::new(0);
        let probe = || async {
            match probes.fetch_add(1, Ordering::Relaxed) {
                0 => Err(ProbeError::Late { limit: Duration::ZERO }),
                1 => std::future::pending().await,
                nth => Ok(format!("probe {nth}")),
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(2), async {
            tokio::select! {
                () = notifier.keep_alive(probe) => {}
                () = async { while probes.load(Ordering::Relaxed) < 4 { tokio::time::sleep(Duration::from_millis(1)).await } } => {}
            }
        });
        assert!(waited.await.is_ok());
        assert_eq!(received(&manager), "WATCHDOG=1\nSTATUS=probe 2\n");
    }

    #[test]
    fn after_a_late_probe_another_is_over_before_the_manager_gives_up() {
        for milliseconds in [1, 999, 8000, 30_000, 3_600_000] {
            let watchdog = Duration::from_millis(milliseconds);
            let (pause, limit) = again(watchdog);
            assert!(watchdog / 2 + watchdog / 4 + pause + limit < watchdog, "{watchdog:?}");
            assert!(pause <= Duration::from_secs(1), "{watchdog:?}");
        }
    }

    #[tokio::test]
    async fn a_probe_that_failed_is_tried_again_soon() {
        let directory = tempfile::tempdir().unwrap();
        let manager = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        let notifier = notifier(&manager, Some("2000000"));
        let times = std::sync::Mutex::new(Vec::new());
        let probe = || async {
            let mut times = times.lock().unwrap();
            times.push(std::time::Instant::now());
            if times.len() == 1 {
                Err(ProbeError::Late { limit: Duration::ZERO })
            } else {
                Ok("alive".to_owned())
            }
        };
        tokio::select! {
            () = notifier.keep_alive(probe) => {}
            () = async { while times.lock().unwrap().len() < 2 { tokio::time::sleep(Duration::from_millis(5)).await } } => {}
        }
        let times = times.lock().unwrap();
        assert!(times[1] - times[0] < Duration::from_millis(900), "{times:?}");
    }

    #[tokio::test]
    async fn a_socket_where_nobody_answers_is_not_alive() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("berth.sock");
        assert!(matches!(ask_the_daemon(&socket).await, Err(ProbeError::Connect(_))));
    }
}
