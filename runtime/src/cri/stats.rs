//! Calls for the usage of containers and pods, and their messages: `ContainerStats` and
//! `PodSandboxStats`.

use berth_cgroup::MemoryStats;
use berth_cri::v1;
use berth_network::interfaces::InterfaceCounters;

use super::convert::{ContainerFilter, SandboxFilter};
use super::error::CallError;
use super::pages::{Items, PAGE, pages};
use super::runtime_service::RuntimeService;
use super::sandbox::view;
use crate::node::Node;
use crate::usage::pod::PodUsage;
use crate::usage::{ContainerUsage, LayerSize, Sample, Samples, Traffic};

impl RuntimeService {
    pub(super) async fn container_stats(
        &self,
        request: v1::ContainerStatsRequest,
    ) -> Result<v1::ContainerStatsResponse, CallError> {
        let container = self.container(&request.container_id)?;
        let usage = self.blocking(move |_, samples| samples.container(&container)).await??;
        Ok(v1::ContainerStatsResponse { stats: Some(message(&self.node, &usage)) })
    }

    pub(super) async fn list_container_stats(
        &self,
        request: v1::ListContainerStatsRequest,
    ) -> Result<v1::ListContainerStatsResponse, CallError> {
        Ok(v1::ListContainerStatsResponse { stats: self.stats_of_containers(request.filter).await? })
    }

    pub(super) async fn stream_container_stats(
        &self,
        request: v1::StreamContainerStatsRequest,
    ) -> Result<Items<v1::StreamContainerStatsResponse>, CallError> {
        let stats = self.stats_of_containers(request.filter).await?;
        pages(PAGE, &stats, |container_stats| v1::StreamContainerStatsResponse { container_stats })
    }

    pub(super) async fn pod_sandbox_stats(
        &self,
        request: v1::PodSandboxStatsRequest,
    ) -> Result<v1::PodSandboxStatsResponse, CallError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        let usage = self.blocking(move |node, samples| samples.pods(node, vec![sandbox])).await?;
        Ok(v1::PodSandboxStatsResponse { stats: usage.first().map(|usage| pod_message(&self.node, usage)) })
    }

    pub(super) async fn list_pod_sandbox_stats(
        &self,
        request: v1::ListPodSandboxStatsRequest,
    ) -> Result<v1::ListPodSandboxStatsResponse, CallError> {
        Ok(v1::ListPodSandboxStatsResponse { stats: self.stats_of_pods(request.filter).await? })
    }

    pub(super) async fn stream_pod_sandbox_stats(
        &self,
        request: v1::StreamPodSandboxStatsRequest,
    ) -> Result<Items<v1::StreamPodSandboxStatsResponse>, CallError> {
        let stats = self.stats_of_pods(request.filter).await?;
        pages(PAGE, &stats, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats })
    }

    async fn stats_of_containers(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>, CallError> {
        let containers = self.containers(&ContainerFilter::of_stats(filter));
        let look = move |node: &Node, samples: &Samples| {
            // One that has vanished or cannot be read is left out.
            let usages = containers.iter().filter_map(|container| samples.container(container).ok());
            usages.map(|usage| message(node, &usage)).collect()
        };
        self.blocking(look).await
    }

    async fn stats_of_pods(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>, CallError> {
        let filter = SandboxFilter::of_stats(filter);
        let mut sandboxes = self.node.registry.sandboxes();
        sandboxes.retain(|sandbox| filter.matches(&view(&sandbox.snapshot())));
        let look = move |node: &Node, samples: &Samples| {
            samples.pods(node, sandboxes).iter().map(|usage| pod_message(node, usage)).collect()
        };
        self.blocking(look).await
    }
}

/// The numbers of one container.
fn message(node: &Node, usage: &ContainerUsage) -> v1::ContainerStats {
    let config = usage.container.config();
    let mut message = v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: usage.container.id().to_string(),
            metadata: Some(super::convert::container_metadata(&config.metadata)),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        writable_layer: Some(layer(node, &usage.layer)),
        ..v1::ContainerStats::default()
    };
    if let Some(sample) = &usage.sample {
        message.cpu = cpu(sample);
        message.memory = sample.stats.memory.as_ref().map(|used| memory(sample.at_unix_ns, used));
        message.swap = sample.stats.swap.as_ref().map(|swap| v1::SwapUsage {
            timestamp: sample.at_unix_ns,
            swap_usage_bytes: value(Some(swap.usage_bytes)),
            swap_available_bytes: value(swap.available_bytes),
        });
        message.io = io(sample);
    }
    message
}

/// The numbers of one pod.
fn pod_message(node: &Node, usage: &PodUsage) -> v1::PodSandboxStats {
    let mut linux = v1::LinuxPodSandboxStats {
        containers: usage.containers.iter().map(|usage| message(node, usage)).collect(),
        network: usage.traffic.as_ref().map(|traffic| network(usage.at_unix_ns, traffic)),
        ..v1::LinuxPodSandboxStats::default()
    };
    if let Some(sample) = &usage.sample {
        linux.cpu = cpu(sample);
        linux.memory = sample.stats.memory.as_ref().map(|used| memory(sample.at_unix_ns, used));
        linux.io = io(sample);
        linux.process = sample.stats.pids.map(|count| v1::ProcessUsage {
            timestamp: sample.at_unix_ns,
            process_count: value(Some(count)),
        });
    }
    let config = usage.sandbox.config();
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: usage.sandbox.id().to_string(),
            metadata: Some(super::convert::sandbox_metadata(&config.metadata)),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        linux: Some(linux),
        ..v1::PodSandboxStats::default()
    }
}

fn cpu(sample: &Sample) -> Option<v1::CpuUsage> {
    sample.stats.cpu.as_ref().map(|cpu| v1::CpuUsage {
        timestamp: sample.at_unix_ns,
        usage_core_nano_seconds: value(Some(cpu.usage_ns)),
        usage_nano_cores: value(sample.nanocores),
        psi: cpu.pressure.as_ref().map(psi),
    })
}

fn layer(node: &Node, size: &LayerSize) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: size.at_unix_ns,
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: node.layout.root().display().to_string() }),
        used_bytes: value(Some(size.usage.bytes)),
        inodes_used: value(Some(size.usage.inodes)),
    }
}

fn network(now: i64, traffic: &Traffic) -> v1::NetworkUsage {
    let usage = |interface: &InterfaceCounters| v1::NetworkInterfaceUsage {
        name: interface.name.clone(),
        rx_bytes: value(Some(interface.rx_bytes)),
        rx_errors: value(Some(interface.rx_errors)),
        tx_bytes: value(Some(interface.tx_bytes)),
        tx_errors: value(Some(interface.tx_errors)),
    };
    v1::NetworkUsage {
        timestamp: now,
        default_interface: Some(usage(&traffic.main)),
        interfaces: traffic.others.iter().map(usage).collect(),
    }
}

/// Memory in use.
fn memory(now: i64, memory: &MemoryStats) -> v1::MemoryUsage {
    v1::MemoryUsage {
        timestamp: now,
        working_set_bytes: value(Some(memory.working_set_bytes)),
        available_bytes: value(Some(memory.available_bytes.unwrap_or(0))),
        usage_bytes: value(Some(memory.usage_bytes)),
        rss_bytes: value(memory.rss_bytes),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: memory.pressure.as_ref().map(psi),
    }
}

/// Time lost waiting for disks.
fn io(sample: &Sample) -> Option<v1::IoUsage> {
    let pressure = sample.stats.io_pressure.as_ref()?;
    Some(v1::IoUsage { timestamp: sample.at_unix_ns, psi: Some(psi(pressure)) })
}

/// A number as a CRI message, which distinguishes absent from zero.
pub(super) fn value(number: Option<u64>) -> Option<v1::UInt64Value> {
    number.map(|value| v1::UInt64Value { value })
}

fn psi(pressure: &berth_cgroup::Pressure) -> v1::PsiStats {
    let line = |line: &berth_cgroup::PressureLine| v1::PsiData {
        total: line.total_ns,
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
    };
    v1::PsiStats { full: Some(line(&pressure.full)), some: Some(line(&pressure.some)) }
}
