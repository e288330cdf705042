//! A real kubelet runs a static pod on the runtime: from its start, through a crash of the daemon
//! and the restart of a container, to its end.
//!
//! One pod and one test, because every step depends on the state that earlier steps left. With the
//! feature `peer` the same runs on containerd: a failure there is a mistake of the test. The daemon
//! is that of the directory that `BERTH_BIN_DIR` names, else of `dist/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::census::mounts_below;
use berth_tests::cgroup::{CpuLimit, Driver};
use berth_tests::cri::Client;
use berth_tests::daemon::{Daemon, IMAGE, rootful};
use berth_tests::deadline::within;
use berth_tests::kubelet::{Instance, Kubelet, Place, Pod};

/// Time for something that the kubelet or the runtime does at once, on a machine that is busy with
/// other things.
const SOON: Duration = Duration::from_secs(60);

/// Time for the kubelet to collect a pod that has ended. It does so once a minute.
const COLLECTION: Duration = Duration::from_secs(180);

/// How long the daemon is away between its end and its new start: not at all, and longer than the
/// kubelet takes to notice. The kubelet lists the runtime's containers once a second.
const ABSENCES: [Duration; 2] = [Duration::ZERO, Duration::from_secs(3)];

/// What the test needs from a runtime, beside its socket.
trait Runtime {
    /// Its CRI socket.
    fn socket(&self) -> &Path;
    /// The directory of all its files.
    fn dir(&self) -> &Path;
    /// The host's ends of the links into pods, one per line.
    fn pod_links(&self) -> Result<String>;
    /// Kills the daemon without a warning, and starts it again after `absence`.
    fn crash(&mut self, absence: Duration) -> Result<()>;
    /// The end of its log.
    fn last_words(&self) -> String;
}

#[test]
fn a_static_pod_lives_survives_a_crash_of_the_daemon_and_ends() -> Result<()> {
    rootful(|daemon| run("kubelet", &mut Berth { daemon, socket: daemon.socket() }))
}

/// A node's runtime and its kubelet are upgraded one after the other, in either order.
#[test]
fn a_kubelet_one_minor_version_older_does_the_same() -> Result<()> {
    rootful(|daemon| run("kubelet-previous", &mut Berth { daemon, socket: daemon.socket() }))
}

/// It looks at the pod because an event says that the container has ended, and then sees all that a
/// kubelet without events sees.
#[test]
fn a_kubelet_that_follows_events_sees_starts_ends_and_restarts() -> Result<()> {
    rootful(|daemon| {
        let mut berth = Berth { daemon, socket: daemon.socket() };
        on_a_kubelet("kubelet", Some("events.conf"), &mut berth, |kubelet, _| {
            let before = starts(kubelet)?;
            began_as_the_manifest_says(kubelet, &before)?;
            within(SOON, "the client counts", || {
                Ok((count(kubelet, &before.name, Instance::Current)? > 100).then_some(()))
            })?;
            let pod = an_exit_is_followed_by_a_restart(kubelet, &before)?;
            let ended = [before.container("init")?, before.container("client")?];
            let log = kubelet.own_log()?;
            for container in ended {
                let followed = log.lines().any(|line| {
                    line.contains("requested pod relist after container termination")
                        && line.contains(&container.id)
                });
                ensure!(followed, "the kubelet acts on the event of the end of {container:?}");
            }
            kubelet.delete_pods()?;
            ends_gracefully(kubelet, &ids(&pod))
        })
    })
}

#[cfg(feature = "peer")]
#[test]
fn the_same_pod_lives_and_ends_on_containerd() -> Result<()> {
    let dir = tempfile::tempdir().context("making a directory for containerd")?;
    let dir = dir.path().join("containerd");
    let bridge = format!("ctd{}", std::process::id());
    let mut peer = Peer { containerd: berth_tests::peer::Containerd::start(&dir, &bridge)?, dir, bridge };
    run("kubelet", &mut peer)
}

fn run(peer: &str, runtime: &mut dyn Runtime) -> Result<()> {
    on_a_kubelet(peer, None, runtime, live_and_end)
}

fn on_a_kubelet(
    peer: &str,
    settings: Option<&str>,
    runtime: &mut dyn Runtime,
    test: impl FnOnce(&Kubelet, &mut dyn Runtime) -> Result<()>,
) -> Result<()> {
    // A kubelet uses directories of the machine, so there is one at a time.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().context("making a directory for the kubelet")?;
    let kubelet = Kubelet::start(Place {
        peer,
        dir: dir.path(),
        socket: runtime.socket(),
        host: None,
        address: false,
        driver: Driver::of_the_environment()?,
        settings,
    })?;
    let outcome = test(&kubelet, runtime);
    outcome.with_context(|| format!("{}\n{}", kubelet.last_words(), runtime.last_words()))
}

fn live_and_end(kubelet: &Kubelet, runtime: &mut dyn Runtime) -> Result<()> {
    let client = Client::new(runtime.socket())?;
    let mounts_before = mounts_below(runtime.dir());

    let pod = starts(kubelet)?;
    began_as_the_manifest_says(kubelet, &pod)?;
    limits_are_those_of_the_manifest(kubelet, &pod)?;

    for absence in ABSENCES {
        let counted = count(kubelet, &pod.name, Instance::Current)?;
        runtime.crash(absence)?;
        within(SOON, "CRI answers again", || Ok(Some(client.version(v1::VersionRequest::default())?)))?;
        containers_live_on(kubelet, &pod, counted)
            .with_context(|| format!("after a crash and {absence:?} without a daemon"))?;
    }

    let pod = an_exit_is_followed_by_a_restart(kubelet, &pod)?;
    probes_go_on(kubelet)?;

    kubelet.delete_pods()?;
    ends_gracefully(kubelet, &ids(&pod))?;
    leaves_nothing(kubelet, &pod, &client, runtime, &mounts_before)
}

/// Gives the kubelet the pod, and waits until it is ready.
fn starts(kubelet: &Kubelet) -> Result<Pod> {
    let evidence = kubelet.evidence();
    kubelet.run_pods("web", &[("IMAGE", IMAGE), ("EVIDENCE", &evidence.to_string_lossy())])?;
    within(SOON, "the pod is ready", || Ok(Some(kubelet.pod("web")?).filter(|pod| pod.ready)))
}

fn ids(pod: &Pod) -> Vec<&str> {
    pod.containers.iter().map(|container| container.id.as_str()).collect()
}

/// The init container came first, both containers run, the volume is one and the same, localhost
/// too, the environment is set, and the hook after the start ran.
fn began_as_the_manifest_says(kubelet: &Kubelet, pod: &Pod) -> Result<()> {
    let init = pod.container("init")?;
    ensure!(init.exit_code() == Some(0), "the init container ended with success: {init:?}");
    for name in ["server", "client"] {
        let container = pod.container(name)?;
        ensure!(
            container.ready && container.restart_count == 0,
            "{name} runs for the first time: {container:?}"
        );
    }

    // The page was written by `init`, served by `server` from the volume, and fetched by `client`
    // over localhost, which wrote it to the volume again.
    let page = format!("page of {}", pod.name);
    let read = format!("client read: {page}");
    within(SOON, "the client tells what it read, in its log", || {
        let log = kubelet.log(&pod.name, "client", Instance::Current)?;
        Ok(log.lines().next().is_some_and(|line| line == read).then_some(()))
    })?;
    let server = kubelet.log(&pod.name, "server", Instance::Current)?;
    ensure!(
        server.starts_with("server greets with good morning, both of you\n"),
        "the environment: {server:?}"
    );
    let post_start = evidence(kubelet, "post-start")?;
    ensure!(post_start.trim_end() == pod.name, "the hook after the start knows the pod: {post_start:?}");
    probes_go_on(kubelet)
}

/// The liveness probe writes a line each time.
fn probes_go_on(kubelet: &Kubelet) -> Result<()> {
    let before = evidence(kubelet, "liveness").unwrap_or_default().lines().count();
    within(SOON, "the liveness probe runs again", || {
        Ok((evidence(kubelet, "liveness")?.lines().count() >= before + 2).then_some(()))
    })
}

/// `cpu: 200m` is a fifth of every period, `64Mi` is a number of bytes (Kubernetes, "Resource
/// units").
fn limits_are_those_of_the_manifest(kubelet: &Kubelet, pod: &Pod) -> Result<()> {
    for (name, memory_bytes, milli_cpu) in [("server", 64 << 20, 200), ("client", 32 << 20, 500)] {
        let id = &pod.container(name)?.id;
        let memory = kubelet.cgroup().memory_limit_bytes(id)?;
        ensure!(memory == memory_bytes, "{name} may use {memory} bytes of memory, not {memory_bytes}");
        let CpuLimit { quota_us, period_us } = kubelet.cgroup().cpu_limit(id)?;
        ensure!(quota_us * 1000 == period_us * milli_cpu, "{name} may run {quota_us} of {period_us} us");
    }
    Ok(())
}

/// No container was touched, and the log has every line: those from before, those of the time
/// without a daemon, and new ones.
fn containers_live_on(kubelet: &Kubelet, before: &Pod, counted: u64) -> Result<()> {
    // A hundred lines are two seconds of the container's life: enough for the kubelet to look at
    // the runtime again.
    within(SOON, "the client's log goes on", || {
        Ok((count(kubelet, &before.name, Instance::Current)? >= counted + 100).then_some(()))
    })?;
    probes_go_on(kubelet)?;
    let pod =
        within(SOON, "the pod is ready", || Ok(Some(kubelet.pod(&before.name)?).filter(|pod| pod.ready)))?;
    for container in &before.containers {
        let now = pod.container(&container.name)?;
        ensure!(now == container, "the container is what it was: {container:?}, and now {now:?}");
    }
    Ok(())
}

/// The client ends with code 3 on request, and is started again; the server is left alone.
fn an_exit_is_followed_by_a_restart(kubelet: &Kubelet, before: &Pod) -> Result<Pod> {
    fs::write(kubelet.evidence().join("exit"), "").context("asking the client to exit")?;
    let pod = within(SOON, "the client runs again and the pod is ready", || {
        let pod = kubelet.pod(&before.name)?;
        let restarted = pod.container("client")?.restart_count == 1;
        Ok(Some(pod).filter(|pod| restarted && pod.ready))
    })?;
    let client = pod.container("client")?;
    ensure!(client.previous_exit_code() == Some(3), "its exit code is kept: {client:?}");
    ensure!(client.id != before.container("client")?.id, "it is a new container: {client:?}");
    ensure!(pod.container("server")? == before.container("server")?, "the server is left alone: {pod:?}");
    let first_life = count(kubelet, &pod.name, Instance::Previous)?;
    ensure!(first_life > 100, "the log of its first life can be read: {first_life} lines");
    within(SOON, "it counts anew", || Ok((count(kubelet, &pod.name, Instance::Current)? > 0).then_some(())))?;
    Ok(pod)
}

/// The hook before the stop ran, then the signal came, and there was time for both. The kubelet's
/// API forgets the pod at once, so the containers' cgroups show when they have ended.
fn ends_gracefully(kubelet: &Kubelet, ids: &[&str]) -> Result<()> {
    within(SOON, "the containers' cgroups are gone", || {
        Ok(ids.iter().all(|id| kubelet.cgroup().below(id).is_empty()).then_some(()))
    })?;
    let pre_stop = evidence(kubelet, "pre-stop").context("the hook before the stop ran")?;
    ensure!(pre_stop.starts_with("page of "), "the hook before the stop saw the volume: {pre_stop:?}");
    let signal = evidence(kubelet, "server-term").context("the server got its signal")?;
    ensure!(signal == "ended\n", "the server ended by itself: {signal:?}");
    ensure!(kubelet.pods()?.is_empty(), "the kubelet has no pod any more");
    Ok(())
}

/// Nothing of the pod is listed or mounted, linked to a pod, or left as a cgroup or a volume.
fn leaves_nothing(
    kubelet: &Kubelet,
    pod: &Pod,
    client: &Client,
    runtime: &dyn Runtime,
    mounts_before: &[PathBuf],
) -> Result<()> {
    within(COLLECTION, "the kubelet has the runtime remove the pod", || {
        Ok(everything(client)?.is_empty().then_some(()))
    })?;
    within(SOON, "no cgroup of the pod is left", || {
        Ok(kubelet.cgroup().below(&pod.uid).is_empty().then_some(()))
    })?;
    within(SOON, "the pod's volumes are gone", || Ok(kubelet.pod_directories().is_empty().then_some(())))?;
    let mut mounts = mounts_below(runtime.dir());
    mounts.retain(|mount| !mounts_before.contains(mount));
    ensure!(mounts.is_empty(), "nothing is left mounted: {mounts:?}");
    let links = runtime.pod_links()?;
    ensure!(links.is_empty(), "no link into a pod is left: {links}");
    Ok(())
}

/// How far the client has counted. Its lines must be 1, 2, 3 ... without a gap or a repetition.
fn count(kubelet: &Kubelet, pod: &str, instance: Instance) -> Result<u64> {
    let log = kubelet.log(pod, "client", instance)?;
    let mut counted = 0;
    for line in log.lines() {
        let Some(number) = line.strip_prefix("count ") else { continue };
        let number: u64 = number.parse().with_context(|| format!("the log says {line:?}"))?;
        ensure!(number == counted + 1, "the log says {number} after {counted}");
        counted = number;
    }
    Ok(counted)
}

fn evidence(kubelet: &Kubelet, name: &str) -> Result<String> {
    let path = kubelet.evidence().join(name);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// The ids of all containers and sandboxes, also of those that have ended.
fn everything(client: &Client) -> Result<Vec<String>> {
    let containers = client.containers(v1::ContainerFilter::default())?;
    let sandboxes = client.sandboxes(v1::PodSandboxFilter::default())?;
    let ids = containers.into_iter().map(|container| container.id);
    Ok(ids.chain(sandboxes.into_iter().map(|sandbox| sandbox.id)).collect())
}

/// Berth. The kubelet is in the host's network: they only meet on the socket.
struct Berth<'daemon> {
    daemon: &'daemon Daemon,
    socket: PathBuf,
}

impl Runtime for Berth<'_> {
    fn socket(&self) -> &Path {
        &self.socket
    }

    fn dir(&self) -> &Path {
        self.daemon.dir()
    }

    fn pod_links(&self) -> Result<String> {
        self.daemon.host().run("ip", &["-oneline", "link", "show", "type", "veth"])
    }

    fn crash(&mut self, absence: Duration) -> Result<()> {
        self.daemon.kill()?;
        sleep(absence);
        self.daemon.start_again()
    }

    fn last_words(&self) -> String {
        self.daemon.last_words()
    }
}

/// containerd with runc.
#[cfg(feature = "peer")]
struct Peer {
    containerd: berth_tests::peer::Containerd,
    dir: PathBuf,
    bridge: String,
}

#[cfg(feature = "peer")]
impl Runtime for Peer {
    fn socket(&self) -> &Path {
        self.containerd.socket()
    }

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn pod_links(&self) -> Result<String> {
        let mut ip = std::process::Command::new("ip");
        berth_tests::program::output(ip.args(["-oneline", "link", "show", "master", &self.bridge]))
    }

    fn crash(&mut self, absence: Duration) -> Result<()> {
        self.containerd.kill()?;
        sleep(absence);
        self.containerd.start_again()
    }

    fn last_words(&self) -> String {
        berth_tests::program::last_lines("containerd", &self.dir.join("log"))
    }
}
