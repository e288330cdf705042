//! `berth stats`: resource usage of containers, pod networks and Berth itself, at one
//! moment.

use std::collections::HashMap;
use std::time::Duration;

use berth_api::v1::{UsageRequest, UsageResponse};
use berth_cri::v1::{
    ContainerStats, CpuUsage, ListContainerStatsRequest, ListPodSandboxStatsRequest, NetworkInterfaceUsage,
    UInt64Value,
};
use tonic::Code;

use crate::args::StatsArgs;
use crate::daemon::{CallError, Daemon, ask};
use crate::error::Error;
use crate::names::{Inventory, NameError, Target, pod_name, short_id};
use crate::output;
use crate::quantity::bytes_text;
use crate::table::Table;

/// Time between two samples of CPU time, when the daemon has no rate yet.
const SAMPLE: Duration = Duration::from_millis(500);

/// Prints measurements of containers, of the pods' network below, and Berth's own memory.
///
/// # Errors
/// When a call to the daemon fails, or a name is unknown.
pub(crate) async fn stats(daemon: &Daemon, args: &StatsArgs) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let wanted = wanted_ids(&inventory, &args.names)?;
    let before = measure(daemon).await?;
    let after = if before.iter().all(|stats| stats.cpu.as_ref().is_none_or(has_rate)) {
        before.clone()
    } else {
        tokio::time::sleep(SAMPLE).await;
        measure(daemon).await?
    };
    let usage = own_usage(daemon).await?;
    let before: HashMap<_, _> = before.iter().map(|stats| (id(stats), stats)).collect();
    let shims: HashMap<_, _> = usage
        .iter()
        .flat_map(|usage| &usage.containers)
        .filter_map(|container| Some((container.container_id.as_str(), container.shim.as_ref()?.pss_bytes)))
        .collect();
    let mut table = Table::new(["CONTAINER", "POD", "CPU", "MEMORY", "FREE", "SHIM"]);
    let shown = after
        .iter()
        .filter(|stats| wanted.as_ref().is_none_or(|ids| ids.iter().any(|wanted| wanted == id(stats))));
    for stats in shown {
        let earlier = before.get(id(stats)).and_then(|earlier| earlier.cpu.as_ref());
        let label = inventory.containers.iter().find(|container| container.id == id(stats));
        let memory = stats.memory.as_ref();
        // Without a limit there is no "available", and the CRI reports 0.
        let free = memory.and_then(|memory| memory.available_bytes).filter(|free| free.value > 0);
        table.row([
            short_id(id(stats)).to_owned(),
            label.map(|container| inventory.label(container)).unwrap_or_default(),
            stats.cpu.as_ref().and_then(|cpu| rate_text(cpu, earlier)).unwrap_or_default(),
            memory
                .and_then(|memory| memory.working_set_bytes)
                .map(|set| bytes_text(set.value))
                .unwrap_or_default(),
            free.map(|free| bytes_text(free.value)).unwrap_or_default(),
            shims.get(id(stats)).map(|bytes| bytes_text(*bytes)).unwrap_or_default(),
        ]);
    }
    output::text(&table.render())?;
    let networks = networks(daemon).await?;
    let mut table = Table::new(["POD", "INTERFACE", "RECEIVED", "SENT"]);
    for (pod, interface) in &networks {
        let containers = || inventory.containers_of(pod).map(|container| &container.id);
        let is_wanted = wanted.as_ref().is_none_or(|ids| containers().any(|id| ids.contains(id)));
        if let Some(pod) = inventory.pod(pod).filter(|_| is_wanted) {
            let text =
                |bytes: Option<UInt64Value>| bytes.map(|bytes| bytes_text(bytes.value)).unwrap_or_default();
            let (received, sent) = (text(interface.rx_bytes), text(interface.tx_bytes));
            table.row([pod_name(pod).to_owned(), interface.name.clone(), received, sent]);
        }
    }
    if !networks.is_empty() {
        output::line("")?;
        output::text(&table.render())?;
    }
    if let Some(usage) = usage {
        output::line(own_memory_text(&usage))?;
    }
    Ok(())
}

/// The containers that were named, those of pods that were named; `None` for all.
fn wanted_ids(inventory: &Inventory, names: &[String]) -> Result<Option<Vec<String>>, NameError> {
    if names.is_empty() {
        return Ok(None);
    }
    let mut ids = Vec::new();
    for name in names {
        match inventory.target(name)? {
            Target::Container(container) => ids.push(container.id.clone()),
            Target::Pod(pod) => {
                ids.extend(inventory.containers_of(&pod.id).map(|container| container.id.clone()))
            }
        }
    }
    Ok(Some(ids))
}

/// Measures the running containers, in the order of their ids.
async fn measure(daemon: &Daemon) -> Result<Vec<ContainerStats>, CallError> {
    let request = ListContainerStatsRequest::default();
    let mut stats =
        ask("get the statistics of containers", daemon.runtime.clone().list_container_stats(request))
            .await?
            .stats;
    stats.retain(|stats| stats.cpu.is_some() || stats.memory.is_some());
    stats.sort_by(|one, other| id(one).cmp(id(other)));
    Ok(stats)
}

/// The interfaces of the pods with their own network, each with its pod's id; none if the daemon
/// cannot tell.
async fn networks(daemon: &Daemon) -> Result<Vec<(String, NetworkInterfaceUsage)>, CallError> {
    let request = ListPodSandboxStatsRequest::default();
    let pods = match ask("get the statistics of pods", daemon.runtime.clone().list_pod_sandbox_stats(request))
        .await
    {
        Ok(answer) => answer.stats,
        Err(error) if error.refusal.code == Code::Unimplemented => Vec::new(),
        Err(error) => return Err(error),
    };
    let mut networks = Vec::new();
    for pod in pods {
        let (Some(attributes), Some(network)) = (pod.attributes, pod.linux.and_then(|linux| linux.network))
        else {
            continue;
        };
        for interface in network.default_interface.into_iter().chain(network.interfaces) {
            networks.push((attributes.id.clone(), interface));
        }
    }
    Ok(networks)
}

/// Berth's own memory, if the daemon can tell.
async fn own_usage(daemon: &Daemon) -> Result<Option<UsageResponse>, CallError> {
    match ask("get the memory use of the daemon", daemon.own.clone().usage(UsageRequest {})).await {
        Ok(usage) => Ok(Some(usage)),
        Err(error) if error.refusal.code == Code::Unimplemented => Ok(None),
        Err(error) => Err(error),
    }
}

fn id(stats: &ContainerStats) -> &str {
    stats.attributes.as_ref().map_or("", |attributes| &attributes.id)
}

fn has_rate(cpu: &CpuUsage) -> bool {
    cpu.usage_nano_cores.is_some()
}

/// CPUs in use, such as `0.25`: the daemon's own rate, else the difference of two samples.
fn rate_text(cpu: &CpuUsage, earlier: Option<&CpuUsage>) -> Option<String> {
    #[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
    if let Some(rate) = cpu.usage_nano_cores {
        return Some(format!("{:.2}", rate.value as f64 / 1e9));
    }
    let earlier = earlier?;
    let nanoseconds = cpu.timestamp.checked_sub(earlier.timestamp).filter(|elapsed| *elapsed > 0)?;
    // A container is never restarted under the same id; a smaller count is a wrong count.
    let used = cpu.usage_core_nano_seconds?.value.checked_sub(earlier.usage_core_nano_seconds?.value)?;
    #[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
    Some(format!("{:.2}", used as f64 / nanoseconds as f64))
}

fn own_memory_text(usage: &UsageResponse) -> String {
    let daemon = usage.daemon.as_ref().map_or(0, |memory| memory.pss_bytes);
    let shims = usage.containers.iter().filter_map(|container| container.shim.as_ref());
    let inits = usage.sandboxes.iter().filter_map(|sandbox| sandbox.init.as_ref());
    let processes: Vec<_> = shims.chain(inits).map(|memory| memory.pss_bytes).collect();
    let all = processes.iter().fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
    let (daemon, count) = (bytes_text(daemon), processes.len());
    match all.checked_div(u64::try_from(count).unwrap_or(u64::MAX)) {
        None => format!("Berth itself (PSS): daemon {daemon}, no shims"),
        Some(each) => {
            format!(
                "Berth itself (PSS): daemon {daemon}, {count} shims {} ({} each)",
                bytes_text(all),
                bytes_text(each)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use berth_api::v1::{ContainerUsage, ProcessMemory};
    use berth_cri::v1::UInt64Value;

    use super::*;

    fn sample(timestamp: i64, used: u64) -> CpuUsage {
        let usage_core_nano_seconds = Some(UInt64Value { value: used });
        CpuUsage { timestamp, usage_core_nano_seconds, ..CpuUsage::default() }
    }

    #[test]
    fn a_rate_is_the_daemons_or_that_of_two_samples() {
        let own = CpuUsage { usage_nano_cores: Some(UInt64Value { value: 250_000_000 }), ..sample(1, 1) };
        assert_eq!(rate_text(&own, None).as_deref(), Some("0.25"));
        assert_eq!(rate_text(&sample(2_000, 1_500), Some(&sample(1_000, 0))).as_deref(), Some("1.50"));
    }

    #[test]
    fn samples_that_tell_nothing_give_no_rate() {
        for (later, earlier) in [
            (sample(2, 1), None),
            (sample(2, 1), Some(sample(2, 1))),
            (sample(1, 1), Some(sample(2, 0))),
            (sample(2, 1), Some(sample(1, 2))),
            (sample(2, 1), Some(CpuUsage::default())),
            (sample(i64::MAX, 1), Some(sample(i64::MIN, 0))),
        ] {
            assert_eq!(rate_text(&later, earlier.as_ref()), None, "{later:?} {earlier:?}");
        }
    }

    #[test]
    fn own_memory_is_summed_over_the_shims() {
        let memory = |pss_bytes| Some(ProcessMemory { pid: 1, pss_bytes, rss_bytes: 0 });
        let container = |pss_bytes| ContainerUsage { shim: memory(pss_bytes), ..ContainerUsage::default() };
        let mut usage = UsageResponse { daemon: memory(10 << 20), ..UsageResponse::default() };
        assert_eq!(own_memory_text(&usage), "Berth itself (PSS): daemon 10.0 MiB, no shims");
        usage.containers = vec![container(200 << 10), container(400 << 10), ContainerUsage::default()];
        assert_eq!(
            own_memory_text(&usage),
            "Berth itself (PSS): daemon 10.0 MiB, 2 shims 600 KiB (300 KiB each)"
        );
    }
}
