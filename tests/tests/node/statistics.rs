//! The kubelet's reports on the use of resources: for autoscalers, for `kubectl top`, and for
//! dashboards.

use anyhow::{Context as _, Result, ensure};
use berth_tests::node::{Node, soon};
use serde_json::Value;

use crate::harness::tests;

tests![
    the_summary_has_every_pod,
    resource_metrics_have_every_container,
    cadvisor_metrics_have_every_container
];

/// Pods that run as long as the node does, each with the names of its containers.
const PODS: [(&str, &[&str]); 4] = [
    ("busy", &["main"]),
    ("guaranteed", &["main"]),
    ("burstable", &["limited", "unlimited"]),
    ("users", &["of-the-pod", "of-its-own"]),
];

/// CPU, memory, network and file systems of each pod and container. Each pod has received some
/// bytes: its kernel discovers its neighbours, and probes request from `probes`.
fn the_summary_has_every_pod(node: &Node<'_>) -> Result<()> {
    for (name, containers) in PODS {
        node.ready_pod(name)?;
        // The kubelet samples again every ten seconds.
        soon("the summary is complete", || {
            let summary: Value =
                serde_json::from_str(&node.kubelet.get("/stats/summary")?).context("reading the summary")?;
            let pods = summary.pointer("/pods").and_then(Value::as_array).context("no pods")?;
            let full_name = node.kubelet.pod(name)?.name;
            let pod = pods.iter().find(|pod| pod.pointer("/podRef/name") == Some(&Value::from(&*full_name)));
            let pod = pod.with_context(|| format!("no pod {name}"))?;
            for field in
                ["/cpu/usageCoreNanoSeconds", "/memory/workingSetBytes", "/ephemeral-storage/usedBytes"]
            {
                positive(pod, field)?;
            }
            for container in containers {
                let all = pod.pointer("/containers").and_then(Value::as_array).context("no containers")?;
                let one = all.iter().find(|one| one.pointer("/name") == Some(&Value::from(*container)));
                let one = one.with_context(|| format!("no container {container}"))?;
                for field in ["/cpu/usageCoreNanoSeconds", "/memory/workingSetBytes", "/rootfs/capacityBytes"]
                {
                    positive(one, field)?;
                }
                one.pointer("/logs/usedBytes").context("no size of the logs")?;
            }
            Ok(Some(()))
        })
        .with_context(|| format!("the pod {name}"))?;
    }
    Ok(())
}

/// `/metrics/resource`, on which `kubectl top` and the horizontal autoscaler depend.
fn resource_metrics_have_every_container(node: &Node<'_>) -> Result<()> {
    for (name, containers) in PODS {
        let pod = node.ready_pod(name)?.name;
        for container in containers {
            for metric in ["container_cpu_usage_seconds_total", "container_memory_working_set_bytes"] {
                soon(&format!("{metric} of {container} of {pod}"), || {
                    let metrics = node.kubelet.get("/metrics/resource")?;
                    let labels =
                        format!("{metric}{{container=\"{container}\",namespace=\"default\",pod=\"{pod}\"}} ");
                    Ok(metrics.contains(&labels).then_some(()))
                })?;
            }
        }
    }
    Ok(())
}

/// `/metrics/cadvisor`, which Prometheus reads, with the names that common queries use.
fn cadvisor_metrics_have_every_container(node: &Node<'_>) -> Result<()> {
    for (name, containers) in PODS {
        let pod = node.ready_pod(name)?.name;
        for container in containers {
            let labels = [
                format!("container=\"{container}\""),
                format!("pod=\"{pod}\""),
                "namespace=\"default\"".into(),
            ];
            soon(&format!("{container} of {pod} in /metrics/cadvisor"), || {
                let metrics = node.kubelet.get("/metrics/cadvisor")?;
                let found = metrics.lines().any(|line| {
                    line.starts_with("container_memory_working_set_bytes{")
                        && labels.iter().all(|label| line.contains(label))
                });
                Ok(found.then_some(()))
            })?;
        }
    }
    Ok(())
}

fn positive(value: &Value, field: &str) -> Result<()> {
    let number = value.pointer(field).and_then(Value::as_u64).with_context(|| format!("no {field}"))?;
    ensure!(number > 0, "{field} is 0");
    Ok(())
}
