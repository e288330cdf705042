//! `ListMetricDescriptors` and `ListPodSandboxMetrics`: what a kubelet with the gate
//! `PodAndContainerStatsFromCRI` passes on to Prometheus, at `/metrics/cadvisor`, word for word.
//!
//! Names, help texts' meaning, types and labels are cAdvisor's (0.56, `metrics/prometheus.go`),
//! because dashboards and rules are written for them. Values are integers in the CRI: seconds lose
//! their fractions. A metric is only described here if it is measured; one that this machine's
//! kernel does not offer is described and has no values.
//!
//! Two samples of one metric with the same labels would spoil the whole answer for Prometheus.
//! Containers differ by `id`, their cgroup; the network of pods by `name`, which has the pod's uid
//! and attempt in it; figures of a pod's cgroup are reported once for each cgroup, and not at all
//! for one that pods share.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use berth_cgroup::{CpuStats, Detail, DeviceIo, MemoryStats, Pressure, Stats, SwapStats};
use berth_cri::v1;
use berth_model::state::ContainerState;

use super::error::CallError;
use super::pages::{Items, METRICS_PAGE, pages};
use super::runtime_service::RuntimeService;
use super::stats::value;
use crate::cadvisor;
use crate::clock::unix_ns;
use crate::container::Container;
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::usage::disk::Disk;
use crate::usage::pod::{self, Counted};
use crate::usage::{Samples, processes};

/// The labels of every metric, as the kubelet adds them to cAdvisor's; a metric's own labels
/// follow.
const LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

/// cAdvisor's name for the container that represents a pod's network.
const POD: &str = "POD";

/// The period of a cpu quota, in µs, and the weight in shares that a cgroup has by default:
/// `cpu.cfs_period_us` and `cpu.shares` in Documentation/scheduler/sched-bwc.rst and
/// sched-design-CFS.rst.
const DEFAULT_PERIOD_US: u64 = 100_000;
const DEFAULT_SHARES: u64 = 1024;

/// A metric.
#[derive(Debug)]
struct Kind {
    name: &'static str,
    help: &'static str,
    counter: bool,
    /// Labels besides [`LABELS`].
    labels: &'static [&'static str],
}

macro_rules! kinds {
    ($($constant:ident = $kind:ident $name:literal $labels:tt $help:literal;)*) => {
        $(const $constant: Kind = kinds!(@ $kind $name $labels $help);)*
        /// All metrics, in the order of their descriptions.
        const KINDS: &[Kind] = &[$($constant),*];
    };
    (@ counter $name:literal $labels:tt $help:literal) => {
        Kind { name: $name, help: $help, counter: true, labels: &$labels }
    };
    (@ gauge $name:literal $labels:tt $help:literal) => {
        Kind { name: $name, help: $help, counter: false, labels: &$labels }
    };
}

kinds! {
    CPU_USAGE = counter "container_cpu_usage_seconds_total" ["cpu"] "Processor time used, in seconds.";
    CPU_USER = counter "container_cpu_user_seconds_total" [] "Processor time used in user mode, in seconds.";
    CPU_SYSTEM = counter "container_cpu_system_seconds_total" [] "Processor time used in the kernel, in seconds.";
    CPU_PERIODS = counter "container_cpu_cfs_periods_total" [] "Periods of the cpu quota that have passed.";
    CPU_THROTTLED_PERIODS = counter "container_cpu_cfs_throttled_periods_total" [] "Periods in which the cpu quota was used up.";
    CPU_THROTTLED = counter "container_cpu_cfs_throttled_seconds_total" [] "Time spent waiting for the next period of the cpu quota, in seconds.";
    CPU_WAITING = counter "container_pressure_cpu_waiting_seconds_total" [] "Time in which some tasks waited for a processor, in seconds.";
    CPU_STALLED = counter "container_pressure_cpu_stalled_seconds_total" [] "Time in which all tasks waited for a processor, in seconds.";
    MEMORY_USAGE = gauge "container_memory_usage_bytes" [] "Memory in use, page cache included.";
    MEMORY_WORKING_SET = gauge "container_memory_working_set_bytes" [] "Memory in use, without inactive page cache.";
    MEMORY_RSS = gauge "container_memory_rss" [] "Anonymous memory, in bytes.";
    MEMORY_CACHE = gauge "container_memory_cache" [] "Page cache, in bytes.";
    MEMORY_MAPPED = gauge "container_memory_mapped_file" [] "Mapped files in memory, in bytes.";
    MEMORY_KERNEL = gauge "container_memory_kernel_usage" [] "Memory of the kernel, in bytes.";
    MEMORY_SWAP = gauge "container_memory_swap" [] "Swap in use, in bytes.";
    MEMORY_MAX_USAGE = gauge "container_memory_max_usage_bytes" [] "Peak memory use, in bytes.";
    MEMORY_LIMIT_HITS = counter "container_memory_failcnt" [] "How often memory reached its limit.";
    MEMORY_FAULTS = counter "container_memory_failures_total" ["failure_type", "scope"] "Page faults: pgfault all, pgmajfault those that had to read.";
    MEMORY_WAITING = counter "container_pressure_memory_waiting_seconds_total" [] "Time in which some tasks waited for memory, in seconds.";
    MEMORY_STALLED = counter "container_pressure_memory_stalled_seconds_total" [] "Time in which all tasks waited for memory, in seconds.";
    OOM_EVENTS = counter "container_oom_events_total" [] "Processes killed by the OOM killer.";
    NETWORK_RX_BYTES = counter "container_network_receive_bytes_total" ["interface"] "Bytes received.";
    NETWORK_RX_PACKETS = counter "container_network_receive_packets_total" ["interface"] "Packets received.";
    NETWORK_RX_DROPPED = counter "container_network_receive_packets_dropped_total" ["interface"] "Packets received and dropped.";
    NETWORK_RX_ERRORS = counter "container_network_receive_errors_total" ["interface"] "Receive errors.";
    NETWORK_TX_BYTES = counter "container_network_transmit_bytes_total" ["interface"] "Bytes sent.";
    NETWORK_TX_PACKETS = counter "container_network_transmit_packets_total" ["interface"] "Packets sent.";
    NETWORK_TX_DROPPED = counter "container_network_transmit_packets_dropped_total" ["interface"] "Packets dropped when sending.";
    NETWORK_TX_ERRORS = counter "container_network_transmit_errors_total" ["interface"] "Transmit errors.";
    FS_USAGE = gauge "container_fs_usage_bytes" ["device"] "Bytes in the writable layer.";
    FS_LIMIT = gauge "container_fs_limit_bytes" ["device"] "Bytes of the filesystem that the writable layer is on.";
    FS_INODES_FREE = gauge "container_fs_inodes_free" ["device"] "Free inodes of the filesystem that the writable layer is on.";
    FS_INODES = gauge "container_fs_inodes_total" ["device"] "Inodes of the filesystem that the writable layer is on.";
    FS_READ_BYTES = counter "container_fs_reads_bytes_total" ["device"] "Bytes read from the device.";
    FS_READS = counter "container_fs_reads_total" ["device"] "Reads from the device.";
    FS_WRITE_BYTES = counter "container_fs_writes_bytes_total" ["device"] "Bytes written to the device.";
    FS_WRITES = counter "container_fs_writes_total" ["device"] "Writes to the device.";
    BLKIO_USAGE = counter "container_blkio_device_usage_total" ["device", "major", "minor", "operation"] "Bytes read from and written to the device.";
    IO_WAITING = counter "container_pressure_io_waiting_seconds_total" [] "Time in which some tasks waited for disks, in seconds.";
    IO_STALLED = counter "container_pressure_io_stalled_seconds_total" [] "Time in which all tasks waited for disks, in seconds.";
    PROCESSES = gauge "container_processes" [] "Processes.";
    THREADS = gauge "container_threads" [] "Threads.";
    THREADS_MAX = gauge "container_threads_max" [] "Limit on threads; 0 means no limit.";
    FILE_DESCRIPTORS = gauge "container_file_descriptors" [] "Open files.";
    SOCKETS = gauge "container_sockets" [] "Open sockets.";
    ULIMITS = gauge "container_ulimits_soft" ["ulimit"] "Soft limits of the first process.";
    SPEC_CPU_PERIOD = gauge "container_spec_cpu_period" [] "The period of the cpu quota, in microseconds.";
    SPEC_CPU_QUOTA = gauge "container_spec_cpu_quota" [] "The cpu quota in each period, in microseconds.";
    SPEC_CPU_SHARES = gauge "container_spec_cpu_shares" [] "CPU weight, in shares.";
    SPEC_MEMORY_LIMIT = gauge "container_spec_memory_limit_bytes" [] "Memory limit, in bytes; 0 means no limit.";
    SPEC_SWAP_LIMIT = gauge "container_spec_memory_swap_limit_bytes" [] "Limit on swap alone, in bytes; 0 means no limit.";
    START_TIME = gauge "container_start_time_seconds" [] "When it was started, in seconds since 1970.";
    LAST_SEEN = gauge "container_last_seen" [] "When it was last looked at, in seconds since 1970.";
}

impl RuntimeService {
    pub(super) fn list_metric_descriptors(
        &self,
        _request: v1::ListMetricDescriptorsRequest,
    ) -> Result<v1::ListMetricDescriptorsResponse, CallError> {
        Ok(v1::ListMetricDescriptorsResponse { descriptors: descriptors() })
    }

    pub(super) async fn list_pod_sandbox_metrics(
        &self,
        _request: v1::ListPodSandboxMetricsRequest,
    ) -> Result<v1::ListPodSandboxMetricsResponse, CallError> {
        Ok(v1::ListPodSandboxMetricsResponse { pod_metrics: self.metrics_of_pods().await? })
    }

    pub(super) async fn stream_pod_sandbox_metrics(
        &self,
        _request: v1::StreamPodSandboxMetricsRequest,
    ) -> Result<Items<v1::StreamPodSandboxMetricsResponse>, CallError> {
        let pods = self.metrics_of_pods().await?;
        pages(METRICS_PAGE, &pods, |pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        })
    }

    async fn metrics_of_pods(&self) -> Result<Vec<v1::PodSandboxMetrics>, CallError> {
        let sandboxes = self.node.registry.sandboxes();
        self.blocking(move |node, samples| of_pods(node, samples, sandboxes)).await
    }
}

fn descriptors() -> Vec<v1::MetricDescriptor> {
    KINDS
        .iter()
        .map(|kind| v1::MetricDescriptor {
            name: kind.name.to_owned(),
            help: kind.help.to_owned(),
            label_keys: LABELS.iter().chain(kind.labels).map(|key| (*key).to_owned()).collect(),
        })
        .collect()
}

/// The metrics of these pods, as far as they are ready. Blocking.
fn of_pods(node: &Node, samples: &Samples, sandboxes: Vec<Arc<Sandbox>>) -> Vec<v1::PodSandboxMetrics> {
    let mut disk = Disk::new(node);
    let mut told = HashSet::new();
    let mut pods = pod::count(node, sandboxes);
    pods.retain(Counted::is_ready);
    pods.iter().map(|pod| of_pod(node, samples, &mut disk, &mut told, pod)).collect()
}

fn of_pod(
    node: &Node,
    samples: &Samples,
    disk: &mut Disk,
    told: &mut HashSet<String>,
    pod: &Counted,
) -> v1::PodSandboxMetrics {
    let sandbox = &pod.sandbox;
    let metadata = &sandbox.config().metadata;
    let mut container_metrics = Vec::new();
    for container in &pod.containers {
        // One that has vanished or cannot be read is left out.
        let Some(metrics) = of_container(node, samples, disk, sandbox, container) else { continue };
        let container_id = container.id().to_string();
        container_metrics.push(v1::ContainerMetrics { container_id, metrics });
    }
    let cgroup = sandbox.cgroup_parent().path();
    let mut metrics = Metrics::new([cgroup, "", "", &metadata.namespace, &metadata.name, ""]);
    if !pod::shares_cgroup(sandbox)
        && told.insert(cgroup.to_owned())
        && let Some(used) = pod::usage_of_pod(node, sandbox, Detail::All, std::iter::empty())
    {
        metrics.put_usage(&used, node.cgroups.hierarchy.is_unified());
    }
    let mut metrics = metrics.done;
    if let Some(traffic) = &pod.traffic {
        let name = cadvisor::pod_name(metadata);
        let mut network = Metrics::new([cgroup, &name, "", &metadata.namespace, &metadata.name, POD]);
        for interface in std::iter::once(&traffic.main).chain(&traffic.others) {
            for (kind, value) in [
                (&NETWORK_RX_BYTES, interface.rx_bytes),
                (&NETWORK_RX_PACKETS, interface.rx_packets),
                (&NETWORK_RX_DROPPED, interface.rx_dropped),
                (&NETWORK_RX_ERRORS, interface.rx_errors),
                (&NETWORK_TX_BYTES, interface.tx_bytes),
                (&NETWORK_TX_PACKETS, interface.tx_packets),
                (&NETWORK_TX_DROPPED, interface.tx_dropped),
                (&NETWORK_TX_ERRORS, interface.tx_errors),
            ] {
                network.put(kind, &[&interface.name], Some(value));
            }
        }
        metrics.append(&mut network.done);
    }
    v1::PodSandboxMetrics { pod_sandbox_id: sandbox.id().to_string(), metrics, container_metrics }
}

/// The metrics of a running container.
fn of_container(
    node: &Node,
    samples: &Samples,
    disk: &mut Disk,
    sandbox: &Sandbox,
    container: &Container,
) -> Option<Vec<v1::Metric>> {
    let ContainerState::Running { started_at_unix_ns } = container.state() else { return None };
    let used = container.cgroup().stats(Detail::All).ok()??;
    let (record, pod) = (container.record(), &sandbox.config().metadata);
    let name = cadvisor::container_name(&record.config.metadata, pod);
    let mut metrics = Metrics::new([
        container.cgroup().path(),
        &name,
        &record.image_name,
        &pod.namespace,
        &pod.name,
        &record.config.metadata.name,
    ]);
    let unified = node.cgroups.hierarchy.is_unified();
    metrics.put_usage(&used, unified);

    let limits = container.resources();
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let quota = positive(limits.cpu_quota_us);
    metrics.put(&SPEC_CPU_QUOTA, &[], quota);
    metrics.put(&SPEC_CPU_PERIOD, &[], positive(limits.cpu_period_us).or(Some(DEFAULT_PERIOD_US)));
    metrics.put(&SPEC_CPU_SHARES, &[], positive(limits.cpu_shares).or(Some(DEFAULT_SHARES)));
    if let Some(cpu) = used.cpu.as_ref().filter(|_| quota.is_some()) {
        metrics.put_throttling(cpu);
    }
    if let Some(memory) = &used.memory {
        metrics.put(&SPEC_MEMORY_LIMIT, &[], Some(memory.limit_bytes.unwrap_or(0)));
    }
    if let Some(swap) = &used.swap {
        metrics.put(&SPEC_SWAP_LIMIT, &[], Some(swap_limit(swap)));
    }

    let layer = samples.layer(container);
    metrics.put(&FS_USAGE, &[&disk.device], Some(layer.usage.bytes));
    if let Some((bytes, _, inodes, inodes_free)) = disk.space {
        metrics.put(&FS_LIMIT, &[&disk.device], Some(bytes));
        metrics.put(&FS_INODES, &[&disk.device], Some(inodes));
        metrics.put(&FS_INODES_FREE, &[&disk.device], Some(inodes_free));
    }
    for io in &used.io {
        metrics.put_device(io, disk.name_of(io));
    }

    let members = container.cgroup().members().unwrap_or_default();
    metrics.put(&PROCESSES, &[], u64::try_from(members.len()).ok());
    metrics.put(&THREADS, &[], used.pids);
    metrics.put(&THREADS_MAX, &[], Some(used.pids_limit.unwrap_or(0)));
    if let Some((files, sockets)) = processes::open_files(Path::new("/proc"), &members) {
        metrics.put(&FILE_DESCRIPTORS, &[], Some(files));
        metrics.put(&SOCKETS, &[], Some(sockets));
    }
    let most = container.pid().and_then(processes::limit_of_open_files);
    metrics.put(&ULIMITS, &["max_open_files"], most);
    metrics.put(&START_TIME, &[], seconds(u64::try_from(started_at_unix_ns).ok()));
    metrics.put(&LAST_SEEN, &[], seconds(u64::try_from(unix_ns()).ok()));
    Some(metrics.done)
}

/// The samples of one object.
struct Metrics {
    labels: [String; LABELS.len()],
    done: Vec<v1::Metric>,
}

impl Metrics {
    fn new(labels: [&str; LABELS.len()]) -> Self {
        Self { labels: labels.map(str::to_owned), done: Vec::new() }
    }

    fn put(&mut self, kind: &Kind, more: &[&str], measured: Option<u64>) {
        let Some(measured) = measured else { return };
        self.done.push(v1::Metric {
            name: kind.name.to_owned(),
            // Measured now, and gone with its container: with its own time, Prometheus would go on
            // showing it for minutes.
            timestamp: 0,
            metric_type: if kind.counter { v1::MetricType::Counter } else { v1::MetricType::Gauge }.into(),
            label_values: self
                .labels
                .iter()
                .map(String::as_str)
                .chain(more.iter().copied())
                .map(str::to_owned)
                .collect(),
            value: value(Some(measured)),
        });
    }

    /// The usage of a cgroup, of a container or a pod.
    fn put_usage(&mut self, used: &Stats, unified: bool) {
        if let Some(cpu) = &used.cpu {
            self.put(&CPU_USAGE, &["total"], seconds(Some(cpu.usage_ns)));
            self.put(&CPU_USER, &[], seconds(cpu.user_ns));
            self.put(&CPU_SYSTEM, &[], seconds(cpu.system_ns));
            self.put_pressure(&CPU_WAITING, &CPU_STALLED, cpu.pressure.as_ref());
        }
        if let Some(memory) = &used.memory {
            self.put_memory(memory, unified);
        }
        self.put(&MEMORY_SWAP, &[], used.swap.as_ref().map(|swap| swap.usage_bytes));
        self.put_pressure(&IO_WAITING, &IO_STALLED, used.io_pressure.as_ref());
    }

    fn put_throttling(&mut self, cpu: &CpuStats) {
        self.put(&CPU_PERIODS, &[], cpu.periods);
        self.put(&CPU_THROTTLED_PERIODS, &[], cpu.throttled_periods);
        self.put(&CPU_THROTTLED, &[], seconds(cpu.throttled_ns));
    }

    fn put_memory(&mut self, memory: &MemoryStats, unified: bool) {
        self.put(&MEMORY_USAGE, &[], Some(memory.usage_bytes));
        self.put(&MEMORY_WORKING_SET, &[], Some(memory.working_set_bytes));
        self.put(&MEMORY_RSS, &[], memory.rss_bytes);
        self.put(&MEMORY_CACHE, &[], memory.cache_bytes);
        self.put(&MEMORY_MAPPED, &[], memory.mapped_file_bytes);
        self.put(&MEMORY_KERNEL, &[], memory.kernel_bytes);
        self.put(&MEMORY_MAX_USAGE, &[], memory.peak_bytes);
        self.put(&MEMORY_LIMIT_HITS, &[], memory.limit_hits);
        self.put(&OOM_EVENTS, &[], memory.oom_kills);
        // Faults are counted with sub-cgroups. On v2 there is no other count, and cAdvisor reports
        // the same number for both.
        let scopes: &[&str] = if unified { &["container", "hierarchy"] } else { &["hierarchy"] };
        for scope in scopes {
            self.put(&MEMORY_FAULTS, &["pgfault", scope], memory.page_faults);
            self.put(&MEMORY_FAULTS, &["pgmajfault", scope], memory.major_page_faults);
        }
        self.put_pressure(&MEMORY_WAITING, &MEMORY_STALLED, memory.pressure.as_ref());
    }

    fn put_pressure(&mut self, waiting: &Kind, stalled: &Kind, pressure: Option<&Pressure>) {
        self.put(waiting, &[], seconds(pressure.map(|pressure| pressure.some.total_ns)));
        self.put(stalled, &[], seconds(pressure.map(|pressure| pressure.full.total_ns)));
    }

    fn put_device(&mut self, io: &DeviceIo, name: &str) {
        self.put(&FS_READ_BYTES, &[name], Some(io.read_bytes));
        self.put(&FS_READS, &[name], Some(io.reads));
        self.put(&FS_WRITE_BYTES, &[name], Some(io.write_bytes));
        self.put(&FS_WRITES, &[name], Some(io.writes));
        let (major, minor) = (io.major.to_string(), io.minor.to_string());
        for (operation, bytes) in [("Read", io.read_bytes), ("Write", io.write_bytes)] {
            self.put(&BLKIO_USAGE, &[name, &major, &minor, operation], Some(bytes));
        }
    }
}

/// The swap limit: used plus available; 0 without a limit.
fn swap_limit(swap: &SwapStats) -> u64 {
    swap.available_bytes.map_or(0, |left| left.saturating_add(swap.usage_bytes))
}

fn seconds(ns: Option<u64>) -> Option<u64> {
    ns.map(|ns| ns / 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use super::*;

    #[test]
    fn kinds_have_names_of_their_own_and_labels_without_doubles() {
        let names: BTreeSet<&str> = KINDS.iter().map(|kind| kind.name).collect();
        assert_eq!(names.len(), KINDS.len());
        for described in descriptors() {
            assert!(!described.help.is_empty(), "{}", described.name);
            let keys: BTreeSet<&String> = described.label_keys.iter().collect();
            assert_eq!(keys.len(), described.label_keys.len(), "{}", described.name);
        }
    }

    #[test]
    fn the_page_for_people_has_every_kind_and_no_other() {
        let page = include_str!("../../../docs/monitoring.md");
        let rows = page.lines().filter(|line| line.starts_with("| `container_"));
        let mut told: Vec<String> = rows
            .map(|row| row.split('|').skip(1).take(3).map(str::trim).collect::<Vec<_>>().join(" "))
            .collect();
        let mut kinds: Vec<String> = KINDS
            .iter()
            .map(|kind| {
                let labels: Vec<String> = kind.labels.iter().map(|label| format!("`{label}`")).collect();
                let form = if kind.counter { "counter" } else { "gauge" };
                format!("`{}` {form} {}", kind.name, labels.join(", "))
            })
            .collect();
        told.sort();
        kinds.sort();
        assert_eq!(told, kinds);
    }

    #[test]
    fn every_value_has_as_many_labels_as_its_kind() {
        let pressure = Some(Pressure::default());
        let used = Stats {
            cpu: Some(CpuStats {
                usage_ns: 2_900_000_000,
                user_ns: Some(1),
                system_ns: Some(1),
                periods: Some(1),
                throttled_periods: Some(1),
                throttled_ns: Some(1),
                pressure,
            }),
            memory: Some(MemoryStats {
                page_faults: Some(1),
                major_page_faults: Some(1),
                pressure,
                ..MemoryStats::default()
            }),
            swap: Some(SwapStats::default()),
            io_pressure: pressure,
            ..Stats::default()
        };
        let mut metrics = Metrics::new(["/pod/a", "k8s_a", "image", "default", "web", "a"]);
        metrics.put_usage(&used, true);
        metrics.put_throttling(used.cpu.as_ref().unwrap());
        metrics.put_device(&DeviceIo { major: 8, ..DeviceIo::default() }, "/dev/sda");
        let keys: HashMap<String, usize> =
            descriptors().into_iter().map(|kind| (kind.name, kind.label_keys.len())).collect();
        let mut seen = HashSet::new();
        for metric in &metrics.done {
            assert_eq!(keys.get(&metric.name), Some(&metric.label_values.len()), "{}", metric.name);
            assert!(seen.insert((&metric.name, &metric.label_values)), "twice: {metric:?}");
        }
        let usage = metrics.done.iter().find(|metric| metric.name == CPU_USAGE.name).unwrap();
        assert_eq!(usage.value.unwrap().value, 2);
        assert_eq!(usage.label_values, ["/pod/a", "k8s_a", "image", "default", "web", "a", "total"]);
    }
}
