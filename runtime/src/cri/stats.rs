//! Numbers of cgroups and writable layers as CRI messages.

use super::layer_size::LayerSizes;
use crate::container::Container;
use crate::node::{Node, unix_ns};
use berth_cgroup::{CpuStats, Detail, MemoryStats, Stats};
use berth_cri::v1;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Processor time at one moment, and the rate that it gave with the sample before.
#[derive(Debug, Clone, Copy)]
struct CpuSample {
    at_unix_ns: i64,
    usage_ns: u64,
    nanocores: Option<u64>,
}

/// What has to be remembered between two calls.
#[derive(Debug, Default)]
pub(super) struct Samples {
    layers: LayerSizes,
    cpu: Mutex<HashMap<String, CpuSample>>,
}

impl Samples {
    /// The numbers of one container. Blocking.
    pub(super) fn container(
        &self,
        node: &Node,
        container: &Arc<Container>,
    ) -> Result<v1::ContainerStats, berth_cgroup::Error> {
        Ok(self.sample(node, container)?.0)
    }

    /// The same with the sample of its cgroup; a container that has ended has none. Blocking.
    pub(super) fn sample(
        &self,
        node: &Node,
        container: &Arc<Container>,
    ) -> Result<(v1::ContainerStats, Option<Stats>), berth_cgroup::Error> {
        let now = unix_ns();
        let stats = match container.pid() {
            Some(_) => container.cgroup().stats(Detail::Essential)?,
            None => None,
        };
        let config = container.config();
        let id = container.id().as_str();
        let mut message = v1::ContainerStats {
            attributes: Some(v1::ContainerAttributes {
                id: id.to_owned(),
                metadata: Some(super::convert::container_metadata(&config.metadata)),
                labels: config.labels.clone(),
                annotations: config.annotations.clone(),
            }),
            writable_layer: Some(self.layer(node, container)),
            ..v1::ContainerStats::default()
        };
        if let Some(stats) = &stats {
            message.cpu = stats.cpu.as_ref().map(|used| self.cpu(id, now, used));
            message.memory = stats.memory.as_ref().map(|used| memory(now, used));
            message.swap = stats.swap.as_ref().map(|swap| v1::SwapUsage {
                timestamp: now,
                swap_usage_bytes: value(Some(swap.usage_bytes)),
                swap_available_bytes: value(swap.available_bytes),
            });
            message.io = stats.io_pressure.as_ref().map(|pressure| io(now, pressure));
        }
        Ok((message, stats))
    }

    /// Processor time of the container or pod `id`, with the rate since it was last asked for.
    pub(super) fn cpu(&self, id: &str, now: i64, cpu: &CpuStats) -> v1::CpuUsage {
        v1::CpuUsage {
            timestamp: now,
            usage_core_nano_seconds: value(Some(cpu.usage_ns)),
            usage_nano_cores: value(self.rate(id, now, cpu.usage_ns)),
            psi: cpu.pressure.as_ref().map(psi),
        }
    }

    /// Nanocores between this sample and the last; two samples closer than a tenth of a second give the rate of before.
    fn rate(&self, id: &str, now: i64, usage_ns: u64) -> Option<u64> {
        let mut samples = self.cpu.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(last) = samples.get(id).copied() else {
            samples.insert(id.to_owned(), CpuSample { at_unix_ns: now, usage_ns, nanocores: None });
            return None;
        };
        let elapsed = u64::try_from(now.saturating_sub(last.at_unix_ns)).unwrap_or(0);
        if elapsed < 100_000_000 {
            return last.nanocores;
        }
        let used = u128::from(usage_ns.saturating_sub(last.usage_ns));
        let nanocores = u64::try_from(used * 1_000_000_000 / u128::from(elapsed)).ok();
        samples.insert(id.to_owned(), CpuSample { at_unix_ns: now, usage_ns, nanocores });
        nanocores
    }

    /// The size of its writable layer, counted of late.
    pub(super) fn layer(&self, node: &Node, container: &Container) -> v1::FilesystemUsage {
        let size = self.layers.of(container.id().as_str(), &container.files().upper(), unix_ns);
        v1::FilesystemUsage {
            timestamp: size.at_unix_ns,
            fs_id: Some(v1::FilesystemIdentifier { mountpoint: node.layout.root().display().to_string() }),
            used_bytes: value(Some(size.usage.bytes)),
            inodes_used: value(Some(size.usage.inodes)),
        }
    }

    /// Forgets what is known of a container or pod that is gone.
    pub(super) fn forget(&self, id: &str) {
        self.layers.forget(id);
        self.cpu.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

/// Memory in use.
pub(super) fn memory(now: i64, memory: &MemoryStats) -> v1::MemoryUsage {
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
pub(super) fn io(now: i64, pressure: &berth_cgroup::Pressure) -> v1::IoUsage {
    v1::IoUsage { timestamp: now, psi: Some(psi(pressure)) }
}

/// A number as CRI has it, which tells nothing from zero.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_from_two_samples() {
        let samples = Samples::default();
        assert_eq!(samples.rate("a", 1_000_000_000, 5_000_000), None);
        assert_eq!(samples.rate("a", 1_050_000_000, 6_000_000), None, "too close");
        assert_eq!(samples.rate("a", 2_000_000_000, 505_000_000), Some(500_000_000));
        assert_eq!(samples.rate("a", 2_000_000_001, 600_000_000), Some(500_000_000), "the rate of before");
        assert_eq!(samples.rate("a", 3_000_000_000, 0), Some(0), "a counter that went back");
    }
}
