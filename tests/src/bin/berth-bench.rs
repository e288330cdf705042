//! `make bench`: the same CRI calls on several runtimes in one run, side by side.
//!
//! Called as `berth-bench NAME SOCKET DAEMON_PID [NAME SOCKET DAEMON_PID]...`; `scripts/bench`
//! starts the runtimes. Each has the image [`IMAGE`], is idle, and has no other load. The runtimes
//! take turns round by round, so that what the machine does besides meets them alike. Times are
//! those of one client on the socket; memory is the proportional set size of `proc_pid_smaps(5)`,
//! in which a page that n processes share counts 1/n for each.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use berth_cri::MAX_MESSAGE_BYTES;
use berth_cri::v1::runtime_service_client::RuntimeServiceClient;
use berth_cri::v1::{
    AttachRequest, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatusRequest,
    CreateContainerRequest, ExecRequest, ExecSyncRequest, ImageSpec, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    ListContainerStatsRequest, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest,
};
use berth_streaming::client::{self, Target};
use berth_streaming::command::{Outcome, Wanted};
use bytes::Bytes;
use nix::sched::{CloneFlags, setns};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

/// The image of every container: that of `scripts/build-image demo`.
const IMAGE: &str = "localhost/berth/demo:latest";

/// Rounds of one pod per runtime.
const ROUNDS: usize = 30;

/// Rounds before those, whose times do not count: caches are cold, and a runtime may set things up
/// on first use.
const WARM_UP: usize = 3;

/// Execs in each round's container.
const EXECS: usize = 5;

/// Pods that are started one beside the other, and how many at a time. A node's kubelet allows 110
/// pods.
const CROWD: usize = 100;
const AT_A_TIME: usize = 8;

/// Lists of all containers' stats, with the crowd there.
const LISTS: usize = 10;

/// What a container writes to its log for the throughput: a file of this many lines of a hundred
/// bytes, this many times.
const LOG_FILES: u64 = 20;
const LOG_FILE_LINES: u64 = 100_000;
const LOG_LINE_BYTES: u64 = 100;

/// Time for that, on a slow machine.
const LOG_PATIENCE: Duration = Duration::from_secs(120);

/// Bytes that go through the streams of a command in each direction.
const STREAM_BYTES: usize = 500_000_000;

/// Clients that are attached and silent, and pods that they are attached to: a container takes 256.
const ATTACHED: usize = 1000;
const ATTACHED_TO: usize = 5;

/// Commands that wait with their streams open.
const WAITING: usize = 100;

/// Short commands, after which the daemon holds what it held before; and a few before those, for
/// what it allocates once.
const SHORT: usize = 500;
const SHORT_WARM_UP: usize = 50;

/// How long that may take, and how long a stream may take to answer, on a slow machine.
const STREAM_PATIENCE: Duration = Duration::from_secs(120);

/// A runtime to measure.
struct Runtime {
    name: String,
    daemon_pid: u32,
    client: RuntimeServiceClient<Channel>,
    /// For the log directories of the pods.
    logs: tempfile::TempDir,
    found: Found,
}

/// The measurements of one runtime.
#[derive(Default)]
struct Found {
    idle_daemon_bytes: u64,
    run_pod: Vec<Duration>,
    create: Vec<Duration>,
    start: Vec<Duration>,
    pod_in_sum: Vec<Duration>,
    exec: Vec<Duration>,
    streamed_exec: Vec<Duration>,
    stop_container: Vec<Duration>,
    stop_pod: Vec<Duration>,
    remove_pod: Vec<Duration>,
    crowd: Duration,
    crowd_removed: Duration,
    list_stats: Vec<Duration>,
    log: Duration,
    stream_out: Duration,
    stream_in: Duration,
    bytes_per_attached: u64,
    bytes_per_waiting: u64,
    left_by_short: Held,
    own_bytes_per_pod: u64,
    daemon_growth_per_pod: u64,
}

/// What a daemon has open and in memory.
#[derive(Debug, Default, Clone, Copy)]
struct Held {
    descriptors: usize,
    threads: usize,
    bytes: u64,
}

/// One of the lists in [`Found`].
type Times = fn(&Found) -> &[Duration];

/// The time that a crowd took.
type Crowd = fn(&Found) -> Duration;

/// One of the sizes in bytes.
type Size = fn(&Found) -> u64;

/// A pod with one container.
struct Pod {
    sandbox: String,
    container: String,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut runtimes = Vec::new();
    for triple in arguments.chunks(3) {
        let [name, socket, pid] = triple else {
            bail!("three words for each runtime: NAME SOCKET DAEMON_PID")
        };
        runtimes.push(Runtime::connect(name, socket, pid)?);
    }
    ensure!(!runtimes.is_empty(), "name a runtime: NAME SOCKET DAEMON_PID");

    for runtime in &mut runtimes {
        runtime.found.idle_daemon_bytes = pss_bytes(runtime.daemon_pid)?;
    }
    for round in 0..WARM_UP + ROUNDS {
        for runtime in &mut runtimes {
            let context = format!("{}, round {round}", runtime.name);
            runtime.one_pod(round).await.context(context)?;
        }
        note(&format!("\rround {} of {}", round + 1, WARM_UP + ROUNDS));
    }
    for runtime in &mut runtimes {
        note(&format!("\r{CROWD} pods on {}      ", runtime.name));
        let context = format!("{}, {CROWD} pods", runtime.name);
        runtime.crowd().await.context(context)?;
    }
    for runtime in &mut runtimes {
        note(&format!("\ra log on {}          ", runtime.name));
        let context = format!("{}, a log", runtime.name);
        runtime.log().await.context(context)?;
    }
    for runtime in &mut runtimes {
        note(&format!("\rstreams on {}         ", runtime.name));
        let context = format!("{}, streams", runtime.name);
        runtime.streams().await.context(context)?;
    }
    note("\r                                \r");
    print(&table(&runtimes))
}

impl Runtime {
    fn connect(name: &str, socket: &str, pid: &str) -> Result<Self> {
        let channel =
            Endpoint::from_shared(format!("unix://{socket}")).context("naming the socket")?.connect_lazy();
        Ok(Self {
            name: name.to_owned(),
            daemon_pid: pid.parse().with_context(|| format!("{pid:?} is no process id"))?,
            client: RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
            logs: tempfile::tempdir().context("making a directory for logs")?,
            found: Found::default(),
        })
    }

    fn pod_config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs.path().join(name).to_string_lossy().into_owned(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    /// One pod from its start to its end, each step timed.
    async fn one_pod(&mut self, round: usize) -> Result<()> {
        let config = self.pod_config(&format!("pod-{round}"));
        let mut client = self.client.clone();
        let begin = Instant::now();
        let (pod, [run, create, start]) = start_pod(&mut client, config, sleeping()).await?;
        let in_sum = begin.elapsed();

        let mut execs = Vec::new();
        for _ in 0..EXECS {
            let request = ExecSyncRequest {
                container_id: pod.container.clone(),
                cmd: vec!["true".to_owned()],
                timeout: 10,
            };
            let (answer, took) = timed(client.exec_sync(request)).await.context("ExecSync")?;
            ensure!(answer.exit_code == 0, "true ended with {}", answer.exit_code);
            execs.push(took);
        }
        let mut streamed = Vec::new();
        for _ in 0..EXECS {
            let begin = Instant::now();
            let code = self.exec(&pod, &["false"]).await?.ended().await?;
            streamed.push(begin.elapsed());
            ensure!(code == 1, "false ended with {code}");
        }
        let ends = end_pod(&mut client, &pod).await?;
        if round >= WARM_UP {
            self.found.run_pod.push(run);
            self.found.create.push(create);
            self.found.start.push(start);
            self.found.pod_in_sum.push(in_sum);
            self.found.exec.extend(execs);
            self.found.streamed_exec.extend(streamed);
            self.found.stop_container.push(ends[0]);
            self.found.stop_pod.push(ends[1]);
            self.found.remove_pod.push(ends[2]);
        }
        Ok(())
    }

    /// A container that writes lines as fast as they are taken from it.
    async fn log(&mut self) -> Result<()> {
        let mut client = self.client.clone();
        let line = "x".repeat(usize::try_from(LOG_LINE_BYTES - 1)?);
        let bytes = LOG_FILE_LINES * LOG_LINE_BYTES;
        let script = format!(
            "yes {line} | head -c {bytes} >/tmp/lines; cat /proc/uptime >&2; \
             for i in $(seq {LOG_FILES}); do cat /tmp/lines; done; cat /proc/uptime >&2"
        );
        let config = self.pod_config("log");
        let path = self.logs.path().join("log/main.log");
        let command = vec!["sh".to_owned(), "-c".to_owned(), script];
        let (pod, _) = start_pod(&mut client, config, command).await?;
        let begin = Instant::now();
        let request = ContainerStatusRequest { container_id: pod.container.clone(), verbose: false };
        loop {
            let answer = client.container_status(request.clone()).await.context("ContainerStatus")?;
            let status = answer.into_inner().status.unwrap_or_default();
            if status.state() == ContainerState::ContainerExited {
                break;
            }
            ensure!(begin.elapsed() < LOG_PATIENCE, "the log was not written within {LOG_PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.found.log = log_time(&path).with_context(|| format!("reading {}", path.display()))?;
        end_pod(&mut client, &pod).await?;
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// Runs a command with streams, as a kubelet does for `kubectl exec`.
    async fn exec(&self, pod: &Pod, command: &[&str]) -> Result<Streamed> {
        let request = ExecRequest {
            container_id: pod.container.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty: false,
            stdin: true,
            stdout: true,
            stderr: true,
        };
        let answer = self.client.clone().exec(request).await.context("Exec")?;
        let wanted = Wanted { stdin: true, stdout: true, stderr: true, terminal: false };
        self.stream(&answer.into_inner().url, wanted).await
    }

    /// Connects to a URL of the streaming server.
    async fn stream(&self, url: &str, wanted: Wanted) -> Result<Streamed> {
        let target = Target::of_url(url)?;
        let (network, address) = (format!("/proc/{}/ns/net", self.daemon_pid), target.authority.clone());
        // The server listens on the loopback interface of the runtime's network.
        let connected = tokio::task::spawn_blocking(move || {
            let connecting = std::thread::spawn(move || -> Result<TcpStream> {
                setns(fs::File::open(network)?, CloneFlags::CLONE_NEWNET)?;
                Ok(TcpStream::connect(address)?)
            });
            connecting.join().map_err(|_| anyhow!("the connecting thread panicked"))?
        });
        let stream = connected.await?.context("connecting to the streaming server")?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Streamed(client::command(tokio::net::TcpStream::from_std(stream)?, &target, wanted).await?))
    }

    /// The cost and throughput of streams.
    async fn streams(&mut self) -> Result<()> {
        let mut client = self.client.clone();
        let script = "while sleep 1000000; do :; done";
        let command = vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()];
        let (pod, _) = start_pod(&mut client, self.pod_config("streams"), command.clone()).await?;

        let begin = Instant::now();
        let mut out = self.exec(&pod, &["head", "-c", &STREAM_BYTES.to_string(), "/dev/zero"]).await?;
        let mut came = 0;
        if let Some(stdout) = &mut out.0.stdout {
            while let Some(bytes) = stdout.receive().await {
                came += bytes.len();
            }
        }
        ensure!(came == STREAM_BYTES && out.ended().await? == 0, "{came} bytes came");
        self.found.stream_out = begin.elapsed();

        let begin = Instant::now();
        let mut counting = self.exec(&pod, &["wc", "-c"]).await?;
        let stdin = counting.0.stdin.take().context("no standard input")?;
        let piece = Bytes::from(vec![0; 32 * 1024]);
        let mut left = STREAM_BYTES;
        while left > 0 {
            let next = piece.slice(..left.min(piece.len()));
            left -= next.len();
            stdin.send(next).await?;
        }
        stdin.finish().await?;
        let counted = counting.says().await?;
        self.found.stream_in = begin.elapsed();
        ensure!(counted.trim() == STREAM_BYTES.to_string(), "{counted} bytes went");
        drop(counting);

        let before = self.own_anonymous(std::slice::from_ref(&pod))?;
        let mut waiting = Vec::new();
        for _ in 0..WAITING {
            let mut command = self.exec(&pod, &["sh", "-c", "echo up; read line"]).await?;
            ensure!(command.says().await? == "up\n");
            waiting.push(command);
        }
        let more = self.own_anonymous(std::slice::from_ref(&pod))?.saturating_sub(before);
        self.found.bytes_per_waiting = more / u64::try_from(WAITING)?;
        drop(waiting);

        let mut before = Held::default();
        for number in 0..SHORT_WARM_UP + SHORT {
            if number == SHORT_WARM_UP {
                before = self.settled().await?;
            }
            self.exec(&pod, &["true"]).await?.ended().await?;
        }
        let after = self.settled().await?;
        self.found.left_by_short = Held {
            descriptors: after.descriptors.saturating_sub(before.descriptors),
            threads: after.threads.saturating_sub(before.threads),
            bytes: after.bytes.saturating_sub(before.bytes),
        };

        let mut pods = vec![pod];
        for number in 1..ATTACHED_TO {
            let config = self.pod_config(&format!("streams-{number}"));
            pods.push(start_pod(&mut client, config, command.clone()).await?.0);
        }
        self.settled().await?;
        let before = self.own_anonymous(&pods)?;
        let wanted = Wanted { stdout: true, stderr: true, ..Wanted::default() };
        let mut attached = Vec::new();
        for pod in pods.iter().cycle().take(ATTACHED) {
            let request = AttachRequest {
                container_id: pod.container.clone(),
                stdout: true,
                stderr: true,
                ..AttachRequest::default()
            };
            let url = client.attach(request).await.context("Attach")?.into_inner().url;
            attached.push(self.stream(&url, wanted).await?);
        }
        // They exist once the daemon has nothing more to do.
        self.settled().await?;
        let more = self.own_anonymous(&pods)?.saturating_sub(before);
        self.found.bytes_per_attached = more / u64::try_from(ATTACHED)?;
        drop(attached);
        for pod in &pods {
            end_pod(&mut client, pod).await?;
        }
        Ok(())
    }

    /// Anonymous memory of the daemon and of its processes for pods.
    fn own_anonymous(&self, pods: &[Pod]) -> Result<u64> {
        Ok(own_bytes(pods, "Pss_Anon:")? + memory_bytes(self.daemon_pid, "Pss_Anon:")?)
    }

    /// The daemon's resources once they no longer change.
    async fn settled(&self) -> Result<Held> {
        let process = format!("/proc/{}", self.daemon_pid);
        let begin = Instant::now();
        let mut last = (0, 0);
        loop {
            let count =
                |name: &str| Ok::<_, std::io::Error>(fs::read_dir(format!("{process}/{name}"))?.count());
            let now = (count("fd")?, count("task")?);
            if now == last {
                let bytes = memory_bytes(self.daemon_pid, "Pss_Anon:")?;
                return Ok(Held { descriptors: now.0, threads: now.1, bytes });
            }
            ensure!(begin.elapsed() < STREAM_PATIENCE, "the daemon does not come to rest");
            last = now;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Many pods at once: how fast they start, what they cost while they exist, how fast they end.
    async fn crowd(&mut self) -> Result<()> {
        let daemon_before = pss_bytes(self.daemon_pid)?;
        let configs = (0..CROWD).map(|number| self.pod_config(&format!("crowd-{number}"))).collect();
        let client = self.client.clone();
        let begin = Instant::now();
        let pods = side_by_side(configs, |config| {
            let mut client = client.clone();
            async move { Ok(start_pod(&mut client, config, sleeping()).await?.0) }
        })
        .await?;
        self.found.crowd = begin.elapsed();

        let mut client = client;
        for _ in 0..LISTS {
            let (answer, took) = timed(client.list_container_stats(ListContainerStatsRequest::default()))
                .await
                .context("ListContainerStats")?;
            ensure!(answer.stats.len() == CROWD, "the list has {} containers", answer.stats.len());
            self.found.list_stats.push(took);
        }
        let pods_count = u64::try_from(CROWD)?;
        self.found.own_bytes_per_pod = own_bytes(&pods, "Pss:")? / pods_count;
        self.found.daemon_growth_per_pod =
            pss_bytes(self.daemon_pid)?.saturating_sub(daemon_before) / pods_count;

        let begin = Instant::now();
        side_by_side(pods, |pod| {
            let mut client = client.clone();
            async move { end_pod(&mut client, &pod).await.map(|_| ()) }
        })
        .await?;
        self.found.crowd_removed = begin.elapsed();
        Ok(())
    }
}

/// A command or a container on the other end of a stream.
struct Streamed(client::Command);

impl Streamed {
    /// Waits for its end; returns the exit code.
    async fn ended(&mut self) -> Result<i32> {
        match self.0.ending.outcome().await {
            Some(Outcome::Exited(code)) => Ok(code),
            other => bail!("the command ended with {other:?}"),
        }
    }

    /// The next line of its output.
    async fn says(&mut self) -> Result<String> {
        let stdout = self.0.stdout.as_mut().context("no standard output")?;
        let mut said = Vec::new();
        while !said.ends_with(b"\n") {
            let bytes = tokio::time::timeout(STREAM_PATIENCE, stdout.receive()).await?;
            said.extend_from_slice(&bytes.context("its output has ended")?);
        }
        Ok(String::from_utf8(said)?)
    }
}

/// The namespaces that a kubelet requests when the pod's manifest does not mention them: a pid
/// namespace for each container, the rest shared.
fn namespaces() -> NamespaceOption {
    NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() }
}

/// The command of containers whose program does not matter.
fn sleeping() -> Vec<String> {
    vec!["sleep".to_owned(), "1000000".to_owned()]
}

/// Between the two times that the container wrote to standard error, before and after its lines:
/// seconds since the boot, with two decimals (`proc_uptime(5)`). An error when a line is missing.
fn log_time(path: &Path) -> Result<Duration> {
    let mut times = Vec::new();
    let mut lines = 0;
    for line in BufReader::new(fs::File::open(path)?).lines() {
        // TIME STREAM TAG CONTENT (KEP "CRI log format")
        let line = line?;
        let mut words = line.splitn(4, ' ').skip(1);
        match (words.next(), words.next(), words.next()) {
            (Some("stderr"), _, Some(uptimes)) => {
                let uptime = uptimes.split(' ').next().unwrap_or_default();
                times.push(uptime.parse::<f64>()?);
            }
            (Some("stdout"), Some("F"), _) => lines += 1,
            _ => bail!("a line says {line:?}"),
        }
    }
    ensure!(lines == LOG_FILES * LOG_FILE_LINES, "the log has {lines} lines");
    match times.as_slice() {
        [begin, end] => Ok(Duration::from_secs_f64((end - begin).max(0.0))),
        _ => bail!("the log has {} times", times.len()),
    }
}

/// RunPodSandbox, CreateContainer and StartContainer, with the time that each took.
async fn start_pod(
    client: &mut RuntimeServiceClient<Channel>,
    config: PodSandboxConfig,
    command: Vec<String>,
) -> Result<(Pod, [Duration; 3])> {
    let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
    let (answer, run) = timed(client.run_pod_sandbox(request)).await.context("RunPodSandbox")?;
    let sandbox = answer.pod_sandbox_id;

    let container = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: IMAGE.to_owned(), ..ImageSpec::default() }),
        command,
        log_path: "main.log".to_owned(),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    };
    let request = CreateContainerRequest {
        pod_sandbox_id: sandbox.clone(),
        config: Some(container),
        sandbox_config: Some(config),
    };
    let (answer, create) = timed(client.create_container(request)).await.context("CreateContainer")?;
    let container = answer.container_id;
    let request = StartContainerRequest { container_id: container.clone() };
    let (_, start) = timed(client.start_container(request)).await.context("StartContainer")?;
    Ok((Pod { sandbox, container }, [run, create, start]))
}

/// StopContainer without grace, StopPodSandbox and RemovePodSandbox, with the time that each took.
/// The container is removed in between, untimed, as a kubelet does.
async fn end_pod(client: &mut RuntimeServiceClient<Channel>, pod: &Pod) -> Result<[Duration; 3]> {
    let request = StopContainerRequest { container_id: pod.container.clone(), timeout: 0 };
    let (_, container) = timed(client.stop_container(request)).await.context("StopContainer")?;
    let request = RemoveContainerRequest { container_id: pod.container.clone() };
    client.remove_container(request).await.context("RemoveContainer")?;
    let request = StopPodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
    let (_, stop) = timed(client.stop_pod_sandbox(request)).await.context("StopPodSandbox")?;
    let request = RemovePodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
    let (_, remove) = timed(client.remove_pod_sandbox(request)).await.context("RemovePodSandbox")?;
    Ok([container, stop, remove])
}

/// The answer of a call, and how long it took.
async fn timed<T>(
    call: impl Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>,
) -> std::result::Result<(T, Duration), tonic::Status> {
    let begin = Instant::now();
    let answer = call.await?;
    Ok((answer.into_inner(), begin.elapsed()))
}

/// Runs `work` for every item, [`AT_A_TIME`] at a time.
async fn side_by_side<I, T, F>(items: Vec<I>, work: impl Fn(I) -> F) -> Result<Vec<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let mut items = items.into_iter();
    let mut running = JoinSet::new();
    let mut done = Vec::new();
    for item in items.by_ref().take(AT_A_TIME) {
        running.spawn(work(item));
    }
    while let Some(result) = running.join_next().await {
        done.push(result??);
        if let Some(item) = items.next() {
            running.spawn(work(item));
        }
    }
    Ok(done)
}

/// The memory of what the runtime keeps for these pods beside the programs in the containers, by
/// a line of `smaps_rollup`, in bytes.
fn own_bytes(pods: &[Pod], key: &str) -> Result<u64> {
    let gone = |error: &anyhow::Error| {
        let errno = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        matches!(errno, Some(nix::libc::ENOENT | nix::libc::ESRCH))
    };
    // One that has ended since it was found holds nothing any more.
    let bytes = |pid| match memory_bytes(pid, key) {
        Err(error) if gone(&error) => Ok(0),
        bytes => bytes,
    };
    own_processes(pods)?.into_iter().map(bytes).sum()
}

/// The parents of the programs in the containers (shims), their other children (which write the
/// logs), and the processes in the sandboxes' own cgroups (pause).
fn own_processes(pods: &[Pod]) -> Result<BTreeSet<u32>> {
    let (mut own, mut others) = (BTreeSet::new(), Vec::new());
    for entry in fs::read_dir("/proc").context("listing processes")? {
        let name = entry.context("listing processes")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Processes come and go meanwhile.
        let Ok(cgroups) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { continue };
        if pods.iter().any(|pod| cgroups.contains(&pod.container)) {
            own.extend(parent(pid));
        } else if pods.iter().any(|pod| cgroups.contains(&pod.sandbox)) {
            own.insert(pid);
        } else {
            others.push(pid);
        }
    }
    let shims = own.clone();
    own.extend(others.into_iter().filter(|pid| parent(*pid).is_some_and(|parent| shims.contains(&parent))));
    ensure!(!own.is_empty(), "no process of the runtime was found");
    Ok(own)
}

/// The parent of a process, from `proc_pid_status(5)`.
fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// The proportional set size of a process in bytes, from `/proc/PID/smaps_rollup`
/// (`proc_pid_smaps(5)`).
fn pss_bytes(pid: u32) -> Result<u64> {
    memory_bytes(pid, "Pss:")
}

/// A line of that file, in bytes.
fn memory_bytes(pid: u32, key: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let kib = text.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix(" kB"));
    let kib: u64 =
        kib.and_then(|kib| kib.trim().parse().ok()).with_context(|| format!("{path} has no {key}"))?;
    Ok(kib * 1024)
}

/// A row per measurement, a column per runtime, and the last one's time or memory as a multiple of
/// the first one's.
fn table(runtimes: &[Runtime]) -> String {
    let mut text = format!("{:<46}", format!("median of {ROUNDS} (95 of 100 within)"));
    for runtime in runtimes {
        let _ = write!(text, "{:>24}", runtime.name);
    }
    if runtimes.len() > 1 {
        let _ = write!(text, "{:>14}", "last : first");
    }
    text.push('\n');
    let times: [(&str, Times); 10] = [
        ("RunPodSandbox", |found| &found.run_pod),
        ("CreateContainer", |found| &found.create),
        ("StartContainer", |found| &found.start),
        ("the three in sequence", |found| &found.pod_in_sum),
        ("ExecSync of true", |found| &found.exec),
        ("Exec of false over SPDY, with its exit code", |found| &found.streamed_exec),
        ("StopContainer without grace", |found| &found.stop_container),
        ("StopPodSandbox", |found| &found.stop_pod),
        ("RemovePodSandbox", |found| &found.remove_pod),
        ("ListContainerStats, 100 pods", |found| &found.list_stats),
    ];
    for (name, of) in times {
        let cost = |found: &Found| quantile(of(found), 50).as_secs_f64();
        row(&mut text, name, runtimes, cost, |found| {
            let times = of(found);
            format!("{:.2} ms ({:.2})", milliseconds(quantile(times, 50)), milliseconds(quantile(times, 95)))
        });
    }
    let crowds: [(&str, Crowd); 2] = [
        ("100 pods, 8 at a time: started per second", |found| found.crowd),
        ("100 pods, 8 at a time: ended per second", |found| found.crowd_removed),
    ];
    for (name, of) in crowds {
        row(&mut text, name, runtimes, |found| of(found).as_secs_f64(), |found| per_second(of(found)));
    }
    let log_cost = |found: &Found| found.log.as_secs_f64();
    row(&mut text, "log throughput, lines of 100 bytes", runtimes, log_cost, |found| {
        let bytes = u32::try_from(LOG_FILES * LOG_FILE_LINES * LOG_LINE_BYTES).unwrap_or(u32::MAX);
        format!("{:.0} MB/s", f64::from(bytes) / 1e6 / found.log.as_secs_f64())
    });
    let streams: [(&str, Crowd); 2] = [
        ("Exec over SPDY, output", |found| found.stream_out),
        ("Exec over SPDY, input", |found| found.stream_in),
    ];
    for (name, of) in streams {
        row(
            &mut text,
            name,
            runtimes,
            |found| of(found).as_secs_f64(),
            |found| {
                let bytes = f64::from(u32::try_from(STREAM_BYTES).unwrap_or(u32::MAX));
                format!("{:.0} MB/s", bytes / 1e6 / of(found).as_secs_f64())
            },
        );
    }
    let sizes: [(&str, Size); 6] = [
        ("an attached client, of 1,000 (anonymous)", |found| found.bytes_per_attached),
        ("a waiting Exec, of 100 (anonymous)", |found| found.bytes_per_waiting),
        ("left by 500 short Execs (anonymous)", |found| found.left_by_short.bytes),
        ("own memory per pod of one container (PSS)", |found| found.own_bytes_per_pod),
        ("the daemon's growth per pod (PSS)", |found| found.daemon_growth_per_pod),
        ("the daemon before the first pod (PSS)", |found| found.idle_daemon_bytes),
    ];
    for (name, of) in sizes {
        row(&mut text, name, runtimes, |found| kib(of(found)), |found| format!("{:.0} KiB", kib(of(found))));
    }
    let _ = write!(text, "{:<46}", "left by 500 short Execs (descriptors, threads)");
    for runtime in runtimes {
        let Held { descriptors, threads, .. } = runtime.found.left_by_short;
        let _ = write!(text, "{:>24}", format!("{descriptors}, {threads}"));
    }
    text.push('\n');
    text
}

/// `cost` is the subject of the row as a number of which less is better; its ratio ends the row.
fn row(
    text: &mut String,
    name: &str,
    runtimes: &[Runtime],
    cost: impl Fn(&Found) -> f64,
    cell: impl Fn(&Found) -> String,
) {
    let _ = write!(text, "{name:<46}");
    for runtime in runtimes {
        let _ = write!(text, "{:>24}", cell(&runtime.found));
    }
    if let [first, .., last] = runtimes {
        let _ = write!(text, "{:>14.1}", cost(&last.found) / cost(&first.found));
    }
    text.push('\n');
}

/// The value that `percent` of `times` do not exceed.
fn quantile(times: &[Duration], percent: usize) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    let rank = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(rank).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn per_second(time: Duration) -> String {
    let pods = f64::from(u32::try_from(CROWD).unwrap_or(u32::MAX));
    format!("{:.1}", pods / time.as_secs_f64())
}

fn kib(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX))
}

fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("printing")
}

/// Shows progress at a terminal; errors are ignored.
fn note(text: &str) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    let _ = std::io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let times: Vec<Duration> = (1..=20).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile(&times, 50), Duration::from_millis(10));
        assert_eq!(quantile(&times, 95), Duration::from_millis(19));
        assert_eq!(quantile(&times[..1], 50), Duration::from_millis(20));
        assert_eq!(quantile(&[], 50), Duration::ZERO);
    }

    #[test]
    fn the_memory_of_this_process_is_known() {
        assert!(pss_bytes(std::process::id()).unwrap() > 0);
    }
}
