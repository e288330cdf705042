//! Usage of pods, as requested by kubelet, Prometheus and cAdvisor.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::cgroup::{Cgroup, Driver};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::pod::{Pod, idle, limit, security, shell};
use berth_tests::program::output;
use berth_tests::repeats::repeats;
use serde_json::Value;
use tonic::Code;

const MIB: u64 = 1 << 20;

/// The number of bytes that a server pod sends to a client pod.
const SENT: u64 = 5_000_000;

fn number(value: Option<v1::UInt64Value>) -> u64 {
    value.map_or(0, |value| value.value)
}

fn stats(daemon: &Daemon, pod: &Pod) -> Result<v1::LinuxPodSandboxStats> {
    let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = daemon.client().pod_sandbox_stats(request)?.stats.context("no stats")?;
    let attributes = stats.attributes.context("no attributes")?;
    assert_eq!((&attributes.id, &attributes.metadata), (&pod.id, &pod.config.metadata));
    stats.linux.context("no Linux")
}

fn default_interface(daemon: &Daemon, pod: &Pod) -> Result<v1::NetworkInterfaceUsage> {
    stats(daemon, pod)?.network.context("no network")?.default_interface.context("no default interface")
}

fn list(daemon: &Daemon, filter: v1::PodSandboxStatsFilter) -> Result<Vec<v1::PodSandboxStats>> {
    let request = v1::ListPodSandboxStatsRequest { filter: Some(filter) };
    Ok(daemon.client().list_pod_sandbox_stats(request)?.stats)
}

/// Makes one pod send [`SENT`] bytes to another.
fn send(server: &Pod, client: &Pod) -> Result<()> {
    server.start(shell(
        "server",
        &format!(
            "mkdir /tmp/www; head -c {SENT} /dev/zero > /tmp/www/big; exec httpd -f -p 8080 -h /tmp/www"
        ),
    ))?;
    let fetch = format!(
        "i=0; until wget -q -O /tmp/got http://{}:8080/big; do i=$((i + 1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done; wc -c < /tmp/got",
        server.ip()?
    );
    assert_eq!(client.script(&fetch, |_| {})?.trim(), SENT.to_string());
    Ok(())
}

/// Restarts the daemon with more lines of configuration.
fn configure(daemon: &Daemon, text: &str) -> Result<()> {
    daemon.stop()?;
    let directory = daemon.directory("berth.toml.d")?;
    fs::write(directory.join("more.toml"), text).context("writing the configuration")?;
    daemon.start_again()
}

#[test]
fn the_traffic_of_pods_is_counted_in_their_own_network() -> Result<()> {
    rootful(|daemon| {
        let (server, client) = (daemon.pod("server")?, daemon.pod("client")?);
        let before = (default_interface(daemon, &server)?, default_interface(daemon, &client)?);
        send(&server, &client)?;
        let after = (default_interface(daemon, &server)?, default_interface(daemon, &client)?);
        assert_eq!(after.0.name, "eth0");
        // Headers and acknowledgements come on top: with segments of 1448 bytes and 66 of headers,
        // 5 %.
        let expected = SENT..SENT + SENT / 5;
        let sent = number(after.0.tx_bytes) - number(before.0.tx_bytes);
        let received = number(after.1.rx_bytes) - number(before.1.rx_bytes);
        assert!(expected.contains(&sent) && expected.contains(&received), "{sent} sent, {received} received");
        assert!(number(after.0.rx_bytes) > number(before.0.rx_bytes), "acknowledgements");
        assert_eq!((number(after.0.tx_errors), number(after.1.rx_errors)), (0, 0));
        // Counting enters the pods' namespaces on a separate thread.
        let host = daemon.host().number()?;
        for thread in fs::read_dir(format!("/proc/{}/task", daemon.pid()?))? {
            let Ok(namespace) = fs::metadata(thread?.path().join("ns/net")) else { continue };
            assert_eq!(namespace.ino(), host, "a thread of the daemon is in another network");
        }
        Ok(())
    })
}

#[test]
fn a_pod_on_the_hosts_network_has_no_network_figures() -> Result<()> {
    rootful(|daemon| {
        let mut config = daemon.pod_config("host");
        let linux = config.linux.as_mut().context("linux")?;
        let options =
            linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default();
        options.network = v1::NamespaceMode::Node.into();
        let options = options.clone();
        let pod = daemon.pod_of(config)?;
        let mut config = idle("main");
        security(&mut config).namespace_options = Some(options);
        pod.start(config)?;
        let stats = stats(daemon, &pod)?;
        assert_eq!(stats.network, None);
        assert!(stats.memory.is_some() && stats.cpu.is_some());
        let metrics = daemon.client().list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest::default())?;
        let of_pod = metrics.pod_metrics.first().context("no metrics")?;
        assert!(!of_pod.metrics.iter().any(|metric| metric.name.starts_with("container_network_")));
        Ok(())
    })
}

#[test]
fn memory_processes_and_processor_time_of_a_pod_are_those_of_its_cgroup() -> Result<()> {
    rootful(|daemon| {
        let name = format!("berth-test-pod{}", std::process::id());
        let parent = Cgroup::create_by(Driver::of_the_environment()?, &name)?;
        let mut config = daemon.pod_config("named");
        config.linux.get_or_insert_default().cgroup_parent = parent.path();
        let named = daemon.pod_of(config)?;
        let sharing = daemon.pod("sharing")?;
        let other = daemon.pod("other")?;
        let fill = format!("head -c {} /dev/zero > /dev/shm/data; echo filled; sleep 1000", 40 * MIB);
        for pod in [&named, &sharing] {
            let main = pod.start(shell("main", &fill))?;
            pod.idle("second")?;
            main.says("filled")?;
        }
        other.idle("main")?;
        for pod in [&named, &sharing] {
            let of_pod = stats(daemon, pod)?;
            let memory = of_pod.memory.context("memory")?;
            let (usage, working_set) = (number(memory.usage_bytes), number(memory.working_set_bytes));
            assert!((40 * MIB..60 * MIB).contains(&usage), "{usage} bytes");
            assert!((40 * MIB..=usage).contains(&working_set), "{working_set} of {usage} bytes");
            assert!(number(memory.rss_bytes) < 20 * MIB, "shared memory is no anonymous memory");
            assert!(number(memory.page_faults) > 0, "{memory:?}");
            let cpu = of_pod.cpu.context("cpu")?;
            assert!(number(cpu.usage_core_nano_seconds) > 1_000_000, "{cpu:?}");
            // Two shells, one with a sleep, and the processes of idle.
            let processes = number(of_pod.process.context("processes")?.process_count);
            assert!((2..=8).contains(&processes), "{processes} processes");
            let mut names: Vec<String> = of_pod
                .containers
                .iter()
                .filter_map(|container| Some(container.attributes.clone()?.metadata?.name))
                .collect();
            names.sort();
            assert_eq!(names, ["main", "second"]);
            assert!(of_pod.containers.iter().all(|container| container.writable_layer.is_some()));
        }
        let small = number(stats(daemon, &other)?.memory.context("memory")?.usage_bytes);
        assert!(small < 20 * MIB, "{small} bytes of others are counted for a pod that shares their parent");
        // A rate takes two samples.
        within(SOON, "the rate is known", || {
            Ok(stats(daemon, &named)?.cpu.and_then(|cpu| cpu.usage_nano_cores))
        })?;
        for pod in [named, sharing, other] {
            pod.remove()?;
        }
        Ok(())
    })
}

#[test]
fn pod_statistics_are_filtered_and_streamed_like_lists() -> Result<()> {
    rootful(|daemon| {
        let labelled = |name: &str, labels: &[(&str, &str)]| {
            let mut config = daemon.pod_config(name);
            config.labels =
                labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            daemon.pod_of(config)
        };
        let one = labelled("one", &[("app", "web"), ("tier", "front")])?;
        let two = labelled("two", &[("app", "web")])?;
        let select = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let beginning = one.id.get(..12).context("an id")?.to_owned();
        for (id, labels, expected) in [
            ("", select(&[]), vec![&one.id, &two.id]),
            (one.id.as_str(), select(&[]), vec![&one.id]),
            (beginning.as_str(), select(&[]), vec![&one.id]),
            ("", select(&[("app", "web")]), vec![&one.id, &two.id]),
            ("", select(&[("app", "web"), ("tier", "front")]), vec![&one.id]),
            (two.id.as_str(), select(&[("tier", "front")]), vec![]),
            ("unknown", select(&[]), vec![]),
        ] {
            let filter = v1::PodSandboxStatsFilter { id: id.to_owned(), label_selector: labels };
            let ids = |stats: Vec<v1::PodSandboxStats>| -> HashSet<String> {
                stats.into_iter().filter_map(|stats| Some(stats.attributes?.id)).collect()
            };
            let expected: HashSet<String> = expected.into_iter().cloned().collect();
            assert_eq!(ids(list(daemon, filter.clone())?), expected, "{filter:?}");
            let request = v1::StreamPodSandboxStatsRequest { filter: Some(filter.clone()) };
            assert_eq!(ids(daemon.client().stream_pod_sandbox_stats(request)?), expected, "{filter:?}");
        }
        let unknown = v1::PodSandboxStatsRequest { pod_sandbox_id: "0".repeat(64) };
        let refused = daemon.client().pod_sandbox_stats(unknown);
        assert_eq!(refused.err().map(|status| status.code()), Some(Code::NotFound));
        Ok(())
    })
}

#[test]
fn a_pod_that_has_ended_has_its_containers_and_nothing_else() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("ended")?;
        let ended = pod.start(shell("main", "head -c 300000 /dev/zero > /data"))?;
        ended.ended()?;
        let still_ready = stats(daemon, &pod)?;
        assert!(still_ready.network.is_some(), "a pod without running containers has its network");
        pod.stop()?;
        let stats = stats(daemon, &pod)?;
        assert!(stats.cpu.is_none() && stats.memory.is_none() && stats.network.is_none(), "{stats:?}");
        let container = stats.containers.first().context("the container")?;
        assert!(number(container.writable_layer.clone().context("a layer")?.used_bytes) >= 300_000);
        assert_eq!(container.cpu, None);
        let metrics = daemon.client().list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest::default())?;
        assert!(metrics.pod_metrics.is_empty(), "{metrics:?}");
        pod.remove()?;
        assert!(list(daemon, v1::PodSandboxStatsFilter::default())?.is_empty());
        Ok(())
    })
}

/// Values by the metric's name and its labels.
type Metrics = BTreeMap<(String, BTreeMap<String, String>), u64>;

/// The metrics of all pods by name and labels; an error if two have the same, which Prometheus does
/// not accept.
fn metrics(daemon: &Daemon) -> Result<Metrics> {
    let client = daemon.client();
    let described = client.list_metric_descriptors(v1::ListMetricDescriptorsRequest::default())?.descriptors;
    let keys: BTreeMap<String, Vec<String>> =
        described.into_iter().map(|kind| (kind.name, kind.label_keys)).collect();
    let mut all = BTreeMap::new();
    for pod in client.stream_pod_sandbox_metrics()? {
        let containers = pod.container_metrics.into_iter().flat_map(|container| container.metrics);
        for metric in pod.metrics.into_iter().chain(containers) {
            let keys = keys.get(&metric.name).with_context(|| format!("{} is not described", metric.name))?;
            ensure!(keys.len() == metric.label_values.len(), "{metric:?} has not the labels {keys:?}");
            let labels = keys.iter().cloned().zip(metric.label_values).collect();
            let value = number(metric.value);
            let before = all.insert((metric.name.clone(), labels), value);
            ensure!(before.is_none(), "{} is there twice with the same labels", metric.name);
        }
    }
    Ok(all)
}

#[test]
fn metrics_have_cadvisors_names_and_labels_and_true_values() -> Result<()> {
    rootful(|daemon| {
        let (server, client) = (daemon.pod("server")?, daemon.pod("client")?);
        let mut config =
            shell("busy", "head -c 30000000 /dev/zero > /dev/shm/x; echo ready; while :; do :; done");
        limit(
            &mut config,
            v1::LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                cpu_quota: 50_000,
                cpu_period: 100_000,
                cpu_shares: 512,
                ..Default::default()
            },
        );
        let busy = client.start(config)?;
        busy.says("ready")?;
        send(&server, &client)?;
        let of_busy = |name: &str, all: &Metrics| {
            let mut found = all.iter().filter(|((kind, labels), _)| {
                kind == name && labels.get("container").is_some_and(|container| container == "busy")
            });
            found.next().map(|((_, labels), value)| (labels.clone(), *value))
        };
        let seconds = within(SOON, "whole seconds of processor time are used", || {
            let all = metrics(daemon)?;
            Ok(of_busy("container_cpu_usage_seconds_total", &all).filter(|(_, seconds)| *seconds >= 2))
        })?;
        let (labels, _) = seconds;
        for (key, value) in [
            ("namespace", "default"),
            ("pod", "client"),
            ("container", "busy"),
            ("image", berth_tests::daemon::IMAGE),
            ("name", "k8s_busy_client_default_uid-of-client_0"),
            ("cpu", "total"),
        ] {
            assert_eq!(labels.get(key).map(String::as_str), Some(value), "{labels:?}");
        }
        assert!(
            labels.get("id").is_some_and(|id| id.starts_with('/') && id.contains(&busy.id)),
            "{labels:?}"
        );
        let all = metrics(daemon)?;
        let value = |name: &str| of_busy(name, &all).map(|(_, value)| value).with_context(|| name.to_owned());
        assert_eq!(value("container_spec_memory_limit_bytes")?, 64 * MIB);
        assert_eq!(
            (value("container_spec_cpu_quota")?, value("container_spec_cpu_period")?),
            (50_000, 100_000)
        );
        assert_eq!(value("container_spec_cpu_shares")?, 512);
        assert!((28 * MIB..64 * MIB).contains(&value("container_memory_working_set_bytes")?));
        within(SOON, "it is held back, as it would use more than half a processor", || {
            let throttled = of_busy("container_cpu_cfs_throttled_periods_total", &metrics(daemon)?);
            Ok(throttled.filter(|(_, periods)| *periods > 0))
        })?;
        assert!(value("container_processes")? >= 1 && value("container_file_descriptors")? >= 3);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        assert!((now - 120..=now).contains(&value("container_start_time_seconds")?));
        let sent = all
            .iter()
            .find(|((kind, labels), _)| {
                kind == "container_network_transmit_bytes_total"
                    && labels.get("pod").is_some_and(|pod| pod == "server")
                    && labels.get("interface").is_some_and(|interface| interface == "eth0")
            })
            .context("no network")?;
        assert!((SENT..SENT + SENT / 5).contains(sent.1), "{sent:?}");
        assert_eq!(sent.0.1.get("container").map(String::as_str), Some("POD"));
        Ok(())
    })
}

#[test]
fn a_hundred_pods_are_counted_without_keeping_anybody_waiting() -> Result<()> {
    const PODS: usize = 100;
    let each = repeats(PODS)? / 4;
    rootful(|daemon| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|thread| {
                    scope.spawn(move || -> Result<()> {
                        for number in 0..each {
                            daemon.pod(&format!("pod-{thread}-{number}"))?.idle("main")?;
                        }
                        Ok(())
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })?;
        let client = daemon.client();
        let time = |call: &dyn Fn() -> Result<usize>| -> Result<Duration> {
            let mut best = Duration::MAX;
            for _ in 0..5 {
                let start = Instant::now();
                assert_eq!(call()?, 4 * each);
                best = best.min(start.elapsed());
            }
            Ok(best)
        };
        let containers =
            time(&|| Ok(client.list_container_stats(v1::ListContainerStatsRequest::default())?.stats.len()))?;
        let pods = time(&|| Ok(list(daemon, v1::PodSandboxStatsFilter::default())?.len()))?;
        let metrics = time(&|| {
            let request = v1::ListPodSandboxMetricsRequest::default();
            Ok(client.list_pod_sandbox_metrics(request)?.pod_metrics.len())
        })?;
        println_figures(&[("containers", containers), ("pods", pods), ("metrics", metrics)]);
        // A machine may be busy; ten times the figure of an idle one.
        assert!(pods < containers + Duration::from_millis(300), "{pods:?}, containers alone {containers:?}");
        Ok(())
    })
}

#[expect(clippy::print_stdout, reason = "figures for whoever runs it with --show-output")]
fn println_figures(figures: &[(&str, Duration)]) {
    for (what, time) in figures {
        println!("{what}: {time:?}");
    }
}

/// One request of a cAdvisor: the status and the body.
fn ask(socket: &Path, request: &str) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket).context("connecting")?;
    stream.set_read_timeout(Some(patience(SOON)))?;
    // A client that is refused early may be unable to send all of it.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
    Ok((status, body.to_owned()))
}

fn get(socket: &Path, path: &str) -> Result<(u16, Value)> {
    let (status, body) = ask(socket, &format!("GET {path} HTTP/1.1\r\nHost: crio\r\n\r\n"))?;
    Ok((status, serde_json::from_str(&body).with_context(|| format!("no JSON: {body:?}"))?))
}

/// Turns on the socket for cAdvisor, at a path of the test's own.
fn answer_cadvisor(daemon: &Daemon) -> Result<PathBuf> {
    let socket = daemon.dir().join("crio/crio.sock");
    configure(
        daemon,
        &format!("[compat]\ncadvisor = true\ncadvisor_socket = {:?}\n", socket.display().to_string()),
    )?;
    Ok(socket)
}

#[test]
fn cadvisor_is_told_whose_a_cgroup_is() -> Result<()> {
    rootful(|daemon| {
        let socket = answer_cadvisor(daemon)?;
        assert_eq!(fs::metadata(&socket)?.permissions().mode() & 0o777, 0o600);
        assert_eq!(
            fs::metadata(socket.parent().context("a directory")?)?.permissions().mode() & 0o777,
            0o755
        );
        let (status, info) = get(&socket, "/info")?;
        assert_eq!(status, 200);
        assert_eq!(info["storage_root"], daemon.root().display().to_string());

        let mut config = daemon.pod_config("web");
        config.labels = [("io.kubernetes.pod.name".to_owned(), "web".to_owned())].into();
        let pod = daemon.pod_of(config)?;
        let cgroup = daemon.cgroup();
        let scope = format!("crio-{}.scope", pod.id);
        assert!(!cgroup.below(&scope).is_empty(), "the pod has its cgroup");
        let (status, empty) = get(&socket, &format!("/containers/{}", pod.id))?;
        assert_eq!((status, empty["pid"].as_i64()), (200, Some(0)), "nothing runs in it");
        assert_eq!(empty["labels"]["io.kubernetes.container.name"], "POD");

        let main = pod.idle("main")?;
        assert!(!cgroup.below(&format!("crio-{}.scope", main.id)).is_empty());
        let (_, of_pod) = get(&socket, &format!("/containers/{}", pod.id))?;
        let pid = of_pod["pid"].as_i64().context("a pid")?;
        let network = |pid: i64| fs::metadata(format!("/proc/{pid}/ns/net")).map(|found| found.ino());
        let pinned = fs::metadata(daemon.state().join("sandboxes").join(&pod.id).join("net"))?.ino();
        assert_eq!(network(pid)?, pinned, "the pid is of a process in the pod's network");
        let (_, of_main) = get(&socket, &format!("/containers/{}", main.id))?;
        assert_eq!(of_main["pid"].as_i64(), Some(main.pid()?.into()));
        for (key, expected) in [
            ("name", "k8s_main_web_default_uid-of-web_0".to_owned()),
            ("image", berth_tests::daemon::IMAGE.to_owned()),
            ("log_path", main.log_path.display().to_string()),
            ("ip_address", pod.ip()?),
        ] {
            assert_eq!(of_main[key], expected, "{key}");
        }
        assert_eq!(of_main["created_time"].as_i64(), Some(main.status()?.created_at));
        assert_eq!(of_main["labels"]["io.kubernetes.container.name"], "main");
        assert_eq!(of_main["labels"]["io.kubernetes.pod.namespace"], "default");

        if cgroup.driver() == Driver::Systemd {
            output(Command::new("systemctl").arg("daemon-reload"))?;
            assert!(!cgroup.below(&scope).is_empty(), "systemd leaves it alone");
        }
        main.stop(0)?;
        assert_eq!(get(&socket, &format!("/containers/{}", pod.id))?.1["pid"], 0);
        pod.stop()?;
        assert!(cgroup.below(&scope).is_empty(), "{:?}", cgroup.below(&scope));
        pod.remove()?;
        assert_eq!(get(&socket, &format!("/containers/{}", pod.id))?.0, 404);
        assert_eq!(get(&socket, &format!("/containers/{}", main.id))?.0, 404);
        daemon.stop()?;
        assert!(!socket.exists() && !socket.parent().context("a directory")?.exists());
        daemon.start_again()
    })
}

#[test]
fn a_pod_with_a_process_of_its_own_is_told_by_one_in_its_network() -> Result<()> {
    rootful(|daemon| {
        let socket = answer_cadvisor(daemon)?;
        let mut config = daemon.pod_config("sharing");
        let linux = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        let options = linux.namespace_options.get_or_insert_default();
        options.pid = v1::NamespaceMode::Pod.into();
        let options = options.clone();
        let pod = daemon.pod_of(config)?;
        let pinned = fs::metadata(daemon.state().join("sandboxes").join(&pod.id).join("net"))?.ino();
        let mut config = idle("main");
        security(&mut config).namespace_options = Some(options);
        pod.start(config)?;
        assert!(!daemon.cgroup().below(&format!("crio-{}.scope", pod.id)).is_empty());
        let (status, of_pod) = get(&socket, &format!("/containers/{}", pod.id))?;
        let pid = of_pod["pid"].as_i64().context("a pid")?;
        assert_eq!((status, fs::metadata(format!("/proc/{pid}/ns/net"))?.ino()), (200, pinned));
        pod.remove()?;
        assert!(daemon.cgroup().below(&pod.id).is_empty());
        Ok(())
    })
}

#[test]
fn a_container_is_told_also_while_it_is_being_made() -> Result<()> {
    rootful(|daemon| {
        let socket = answer_cadvisor(daemon)?;
        let pod = daemon.pod("web")?;
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            // As a cAdvisor does: it requests each cgroup once, as soon as it exists.
            let watcher = scope.spawn(|| -> Result<usize> {
                let mut asked = HashSet::new();
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for path in daemon.cgroup().below("crio-") {
                        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                        if asked.insert(name.clone()) {
                            let id = name.trim_start_matches("crio-").trim_end_matches(".scope");
                            let (status, body) = get(&socket, &format!("/containers/{id}"))?;
                            ensure!(status == 200, "{name}: {status} {body}");
                        }
                    }
                }
                Ok(asked.len())
            });
            let made: Result<Vec<_>, _> = (0..10).map(|number| pod.idle(&format!("c{number}"))).collect();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            let asked = watcher.join().expect("no panic")?;
            made?;
            assert!(asked >= 5, "only {asked} were asked for");
            Ok(())
        })
    })
}

#[test]
fn odd_requests_and_slow_clients_of_the_socket_harm_nobody() -> Result<()> {
    rootful(|daemon| {
        let socket = answer_cadvisor(daemon)?;
        for (request, expected) in [
            ("GET / HTTP/1.1\r\n\r\n".to_owned(), 404),
            ("GET /containers/ HTTP/1.1\r\n\r\n".to_owned(), 404),
            ("GET /containers/../../etc/passwd HTTP/1.1\r\n\r\n".to_owned(), 404),
            (format!("GET /containers/{} HTTP/1.1\r\n\r\n", "0".repeat(64)), 404),
            ("POST /info HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".to_owned(), 405),
            ("DELETE /containers/x HTTP/1.1\r\n\r\n".to_owned(), 405),
            ("nonsense\r\n\r\n".to_owned(), 400),
            (format!("GET /info HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20)), 431),
        ] {
            let (status, _) =
                ask(&socket, &request).with_context(|| request.chars().take(60).collect::<String>())?;
            assert_eq!(status, expected, "{:?}", request.chars().take(60).collect::<String>());
        }
        // More than are accepted at a time, none of which sends anything.
        let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&socket)).collect::<Result<_, _>>()?;
        daemon.pod("web")?.idle("main")?;
        assert_eq!(get(&socket, "/info")?.0, 200, "it is answered when they have been let go");
        drop(silent);
        Ok(())
    })
}

#[test]
fn the_socket_of_a_daemon_that_crashed_is_replaced_and_one_that_another_serves_is_not() -> Result<()> {
    rootful(|daemon| {
        let socket = answer_cadvisor(daemon)?;
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        daemon.kill()?;
        // A crash right after the pod's record was written.
        for cgroup in daemon.cgroup().below(&format!("crio-{}.scope", pod.id)) {
            fs::remove_dir(&cgroup).with_context(|| cgroup.display().to_string())?;
        }
        daemon.start_again()?;
        assert_eq!(get(&socket, &format!("/containers/{}", main.id))?.0, 200);
        assert!(!daemon.cgroup().below(&format!("crio-{}.scope", pod.id)).is_empty(), "it is made again");

        daemon.stop()?;
        fs::create_dir_all(socket.parent().context("a directory")?)?;
        let other = UnixListener::bind(&socket)?;
        daemon.start_again()?;
        assert!(daemon.last_words().contains("another program is listening"), "{}", daemon.last_words());
        let same = UnixStream::connect(&socket)?;
        assert!(other.accept().is_ok());
        drop(same);
        // Without the socket, and with the option off again, everything else is as before.
        assert_eq!(main.sh("echo yes")?, "yes\n");
        configure(daemon, "")?;
        assert!(socket.exists(), "what another serves stays");
        let plain = pod.idle("plain")?;
        let names = daemon.cgroup().below(&plain.id);
        assert!(!names.is_empty() && !names.iter().any(|path| path.to_string_lossy().contains("crio-")));
        let later = daemon.pod("later")?;
        assert!(
            daemon.cgroup().below(&later.id).is_empty(),
            "without the option a pod has no cgroup of its name"
        );
        assert!(number(stats(daemon, &pod)?.cpu.context("cpu")?.usage_core_nano_seconds) > 0);
        main.stop(0)?;
        for gone in [pod, later] {
            gone.remove()?;
            assert!(daemon.cgroup().below(&gone.id).is_empty(), "{:?}", daemon.cgroup().below(&gone.id));
        }
        assert!(daemon.cgroup().below(&main.id).is_empty());
        Ok(())
    })
}

#[test]
fn a_container_without_limits_is_told_to_have_none() -> Result<()> {
    rootful(|daemon| {
        daemon.pod("free")?.start(idle("main"))?;
        let all = metrics(daemon)?;
        let value = |name: &str| all.iter().find(|((kind, _), _)| kind == name).map(|(_, value)| *value);
        assert_eq!(value("container_spec_memory_limit_bytes"), Some(0));
        assert_eq!(value("container_spec_cpu_shares"), Some(1024));
        assert_eq!(value("container_spec_cpu_quota"), None);
        assert_eq!(value("container_cpu_cfs_periods_total"), None);
        Ok(())
    })
}
