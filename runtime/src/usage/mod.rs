//! What containers and pods use, gathered from cgroups, namespaces, layers and procfs, as plain
//! data.
//!
//! - `pod`: whole pods, with their containers and the traffic of their network;
//! - `layer_size`: writable layers;
//! - `traffic`: network namespaces;
//! - `disk`: the filesystem that writable layers are on, and the names of block devices;
//! - `processes`: what the processes of a container hold.

pub(crate) mod disk;
mod layer_size;
pub(crate) mod pod;
pub(crate) mod processes;
mod traffic;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use berth_cgroup::{Detail, Stats};

use crate::clock::unix_ns;
use crate::container::Container;
use crate::lock;
use layer_size::LayerSizes;

pub(crate) use layer_size::LayerSize;
pub(crate) use traffic::Traffic;

/// What the cgroup of a container or pod says at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) at_unix_ns: i64,
    pub(crate) stats: Stats,
    /// Processor time per second since the sample before, in billionths of a processor; nothing for
    /// the first.
    pub(crate) nanocores: Option<u64>,
}

/// What a container uses.
#[derive(Debug, Clone)]
pub(crate) struct ContainerUsage {
    pub(crate) container: Arc<Container>,
    /// Nothing for one that has ended.
    pub(crate) sample: Option<Sample>,
    pub(crate) layer: LayerSize,
}

/// Processor time at one moment, and the rate that it gave with the sample before.
#[derive(Debug, Clone, Copy)]
struct CpuSample {
    at_unix_ns: i64,
    usage_ns: u64,
    nanocores: Option<u64>,
}

/// What has to be remembered between two looks.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    layers: LayerSizes,
    cpu: Mutex<HashMap<String, CpuSample>>,
}

impl Samples {
    /// What one container uses. Blocking.
    pub(crate) fn container(
        &self,
        container: &Arc<Container>,
    ) -> Result<ContainerUsage, berth_cgroup::Error> {
        let now = unix_ns();
        let stats = match container.pid() {
            Some(_) => container.cgroup().stats(Detail::Essential)?,
            None => None,
        };
        Ok(ContainerUsage {
            container: container.clone(),
            sample: stats.map(|stats| self.sample(container.id().as_str(), now, stats)),
            layer: self.layer(container),
        })
    }

    /// The numbers of the container or pod `id`, with the rate since it was last asked for.
    fn sample(&self, id: &str, at_unix_ns: i64, stats: Stats) -> Sample {
        let nanocores = stats.cpu.as_ref().and_then(|cpu| self.rate(id, at_unix_ns, cpu.usage_ns));
        Sample { at_unix_ns, stats, nanocores }
    }

    /// Nanocores between this sample and the last; two samples closer than a tenth of a second give
    /// the rate of before.
    fn rate(&self, id: &str, now: i64, usage_ns: u64) -> Option<u64> {
        let mut samples = lock(&self.cpu);
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
    pub(crate) fn layer(&self, container: &Container) -> LayerSize {
        self.layers.of(container.id().as_str(), &container.files().upper(), unix_ns)
    }

    /// Forgets what is known of a container or pod that is gone.
    pub(crate) fn forget(&self, id: &str) {
        self.layers.forget(id);
        lock(&self.cpu).remove(id);
    }
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
