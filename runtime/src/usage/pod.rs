//! What whole pods use.
//!
//! Processor time, memory and processes are those of the pod's cgroup, which the kubelet made:
//! whatever is in it counts, also what belongs to no container. A pod that named no cgroup of its
//! own shares one with others, and gets the sum of its containers instead. Network figures are
//! those of its namespace; on the host's network there are none, since those are the node's. A pod
//! that is not ready has its containers, with what they left on the disk, and nothing else.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use berth_cgroup::{CpuStats, Detail, MemoryStats, Stats, stats_of_parent};
use berth_model::id::SandboxId;
use berth_model::security::NamespaceMode;
use berth_model::state::SandboxState;

use super::traffic::{self, Traffic};
use super::{ContainerUsage, Sample, Samples};
use crate::clock::unix_ns;
use crate::container::Container;
use crate::node::Node;
use crate::sandbox::Sandbox;

/// A pod with what was looked up for all pods at once.
pub(crate) struct Counted {
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) containers: Vec<Arc<Container>>,
    /// Nothing on the host's network, and for a pod that is not ready.
    pub(crate) traffic: Option<Traffic>,
}

/// What a pod uses.
pub(crate) struct PodUsage {
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) containers: Vec<ContainerUsage>,
    /// When it was looked at, in nanoseconds since the epoch.
    pub(crate) at_unix_ns: i64,
    /// Of the pod as a whole; nothing when it is not ready.
    pub(crate) sample: Option<Sample>,
    /// Nothing on the host's network, and when it is not ready.
    pub(crate) traffic: Option<Traffic>,
}

impl Counted {
    pub(crate) fn is_ready(&self) -> bool {
        self.sandbox.state() == SandboxState::Ready
    }
}

/// Looks up the containers and the traffic of these pods. Blocking.
pub(crate) fn count(node: &Node, sandboxes: Vec<Arc<Sandbox>>) -> Vec<Counted> {
    let mut containers: HashMap<SandboxId, Vec<Arc<Container>>> = HashMap::new();
    for container in node.registry.containers() {
        containers.entry(container.sandbox_id().clone()).or_default().push(container);
    }
    let own_network = |sandbox: &Sandbox| {
        sandbox.config().namespaces.network != NamespaceMode::Node && sandbox.state() == SandboxState::Ready
    };
    let (with, without): (Vec<_>, Vec<_>) = sandboxes.into_iter().partition(|sandbox| own_network(sandbox));
    let files: Vec<PathBuf> = with.iter().map(|sandbox| sandbox.files().namespace("net")).collect();
    let traffic = traffic::of_namespaces(&files);
    let with = with.into_iter().zip(traffic);
    let mut pods: Vec<Counted> = with
        .chain(without.into_iter().map(|sandbox| (sandbox, None)))
        .map(|(sandbox, traffic)| {
            let containers = containers.remove(sandbox.id()).unwrap_or_default();
            Counted { sandbox, containers, traffic }
        })
        .collect();
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.sandbox.created_at_unix_ns()));
    for pod in &mut pods {
        pod.containers.sort_by_key(|container| std::cmp::Reverse(container.record().created_at_unix_ns));
    }
    pods
}

/// Whether the pod has named no cgroup of its own.
pub(crate) fn shares_cgroup(sandbox: &Sandbox) -> bool {
    let parent = sandbox.cgroup_parent();
    parent.is_ours() || parent.path().is_empty()
}

/// What the pod as a whole uses: its cgroup's figures, or, if it shares that with other pods, the
/// sum of these of its containers.
pub(crate) fn usage_of_pod(
    node: &Node,
    sandbox: &Sandbox,
    detail: Detail,
    of_containers: impl Iterator<Item = Stats>,
) -> Option<Stats> {
    let parent = sandbox.cgroup_parent();
    if !shares_cgroup(sandbox) {
        return stats_of_parent(&node.cgroups.hierarchy, parent, detail).ok().flatten();
    }
    let own_process = sandbox.pid().and_then(|_| {
        let cgroup = node.cgroups.open(parent, sandbox.id().as_str()).ok()?;
        cgroup.stats(detail).ok().flatten()
    });
    of_containers.chain(own_process).reduce(sum)
}

impl Samples {
    /// What these pods use. Blocking.
    pub(crate) fn pods(&self, node: &Node, sandboxes: Vec<Arc<Sandbox>>) -> Vec<PodUsage> {
        count(node, sandboxes).into_iter().map(|pod| self.pod(node, pod)).collect()
    }

    fn pod(&self, node: &Node, pod: Counted) -> PodUsage {
        // A container that vanishes or cannot be read does not spoil the pod.
        let containers: Vec<ContainerUsage> =
            pod.containers.iter().filter_map(|container| self.container(container).ok()).collect();
        let at_unix_ns = unix_ns();
        let is_ready = pod.is_ready();
        let stats = is_ready.then(|| {
            let samples = containers.iter().filter_map(|container| container.sample.as_ref());
            let samples = samples.map(|sample| sample.stats.clone());
            usage_of_pod(node, &pod.sandbox, Detail::Essential, samples)
        });
        let sample = stats.flatten().map(|stats| self.sample(pod.sandbox.id().as_str(), at_unix_ns, stats));
        let traffic = pod.traffic.filter(|_| is_ready);
        PodUsage { sandbox: pod.sandbox, containers, at_unix_ns, sample, traffic }
    }
}

/// Two parts of a pod together. What one of them does not have counts as nothing there; pressure
/// cannot be added up and is left out, and so is what only makes sense for one cgroup (limits and
/// how often they were hit).
fn sum(left: Stats, right: Stats) -> Stats {
    fn both<T>(left: Option<T>, right: Option<T>, add: impl FnOnce(T, T) -> T) -> Option<T> {
        match (left, right) {
            (Some(left), Some(right)) => Some(add(left, right)),
            (left, right) => left.or(right),
        }
    }
    fn plus(left: Option<u64>, right: Option<u64>) -> Option<u64> {
        both(left, right, u64::saturating_add)
    }
    Stats {
        cpu: both(left.cpu, right.cpu, |left, right| CpuStats {
            usage_ns: left.usage_ns.saturating_add(right.usage_ns),
            user_ns: plus(left.user_ns, right.user_ns),
            system_ns: plus(left.system_ns, right.system_ns),
            ..CpuStats::default()
        }),
        memory: both(left.memory, right.memory, |left, right| MemoryStats {
            usage_bytes: left.usage_bytes.saturating_add(right.usage_bytes),
            working_set_bytes: left.working_set_bytes.saturating_add(right.working_set_bytes),
            rss_bytes: plus(left.rss_bytes, right.rss_bytes),
            cache_bytes: plus(left.cache_bytes, right.cache_bytes),
            mapped_file_bytes: plus(left.mapped_file_bytes, right.mapped_file_bytes),
            page_faults: plus(left.page_faults, right.page_faults),
            major_page_faults: plus(left.major_page_faults, right.major_page_faults),
            ..MemoryStats::default()
        }),
        pids: plus(left.pids, right.pids),
        ..Stats::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_pod_add_up_and_what_only_one_has_counts() {
        let one = |usage_ns, rss_bytes, pids| Stats {
            cpu: Some(CpuStats { usage_ns, ..CpuStats::default() }),
            memory: Some(MemoryStats {
                usage_bytes: 10,
                working_set_bytes: 5,
                rss_bytes,
                ..MemoryStats::default()
            }),
            pids,
            ..Stats::default()
        };
        for (left, right, expected) in [
            (one(1, Some(2), Some(3)), one(10, Some(20), Some(30)), (11, Some(22), Some(33))),
            (one(1, None, None), one(10, Some(20), None), (11, Some(20), None)),
            (one(u64::MAX, Some(1), Some(1)), one(1, None, Some(1)), (u64::MAX, Some(1), Some(2))),
        ] {
            let sum = sum(left, right);
            let memory = sum.memory.clone().unwrap_or_default();
            assert_eq!((sum.cpu.unwrap_or_default().usage_ns, memory.rss_bytes, sum.pids), expected);
            assert_eq!((memory.usage_bytes, memory.working_set_bytes), (20, 10));
        }
        assert_eq!(sum(Stats::default(), one(1, None, None)), one(1, None, None));
    }
}
