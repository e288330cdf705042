//! The networks that a cluster gives to a node's pods (`UpdateRuntimeConfig`), on the built-in
//! bridge.

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, Setup, rootful, rootful_with};
use tonic::{Code, Status};

fn give(daemon: &Daemon, pod_cidr: &str) -> Result<(), Status> {
    let network_config = Some(v1::NetworkConfig { pod_cidr: pod_cidr.to_owned() });
    let runtime_config = Some(v1::RuntimeConfig { network_config });
    daemon.client().update_runtime_config(v1::UpdateRuntimeConfigRequest { runtime_config }).map(drop)
}

/// The addresses of a new pod.
fn addresses(daemon: &Daemon, name: &str) -> Result<Vec<String>> {
    let network = daemon.pod(name)?.status()?.network.unwrap_or_default();
    let more = network.additional_ips.into_iter().map(|found| found.ip);
    Ok(std::iter::once(network.ip).chain(more).collect())
}

/// Whether a pod, which listens nowhere, answers the node.
fn reach(daemon: &Daemon, address: &str) -> Result<()> {
    let script = format!("(exec 3<>/dev/tcp/{address}/1) 2>&1 | grep -q 'Connection refused'");
    daemon.host().run("timeout", &["10", "bash", "-c", &script]).map(drop)
}

#[test]
fn new_pods_are_on_the_nodes_pod_cidr_also_after_a_restart_and_old_ones_go_on() -> Result<()> {
    rootful(|daemon| {
        let old = daemon.pod("old")?;
        let before = old.ip()?;
        ensure!(before.starts_with("10.88."), "{before}");
        give(daemon, "10.244.7.0/24")?;
        ensure!(addresses(daemon, "first")? == ["10.244.7.2"]);
        // The kubelet does not repeat it for a daemon that starts anew.
        daemon.kill()?;
        daemon.start_again()?;
        ensure!(addresses(daemon, "second")? == ["10.244.7.3"]);
        reach(daemon, &before)?;

        give(daemon, "10.244.9.0/24,fd00:10:244:9::/64")?;
        ensure!(addresses(daemon, "third")? == ["10.244.9.2", "fd00:10:244:9::2"]);
        reach(daemon, "10.244.7.2")?;
        let shown = daemon.berth()?.arg("info").output()?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        ensure!(shown.contains("10.244.9.0/24"), "{shown}");
        Ok(())
    })
}

#[test]
fn pods_of_a_cluster_wait_for_the_pod_cidr_where_that_is_configured() -> Result<()> {
    let setup = Setup { network: "ipv4 = \"pod-cidr\"\n", ..Setup::default() };
    rootful_with(setup, |daemon| {
        let state = || -> Result<v1::RuntimeCondition> {
            let status = daemon.client().status(v1::StatusRequest::default())?.status.unwrap_or_default();
            let network = |found: &v1::RuntimeCondition| found.r#type == "NetworkReady";
            status.conditions.into_iter().find(network).context("NetworkReady")
        };
        let waits = state()?;
        ensure!(!waits.status && waits.reason == "NetworkPluginNotReady", "{waits:?}");
        ensure!(waits.message.contains("has not named the node's pod CIDR yet"), "{waits:?}");
        let refused = daemon.pod("early").map(drop).unwrap_err().to_string();
        ensure!(refused.contains("has not named the node's pod CIDR yet"), "{refused}");
        ensure!(!daemon.host().run("ip", &["link"])?.contains("bt"), "there is a bridge");
        give(daemon, "10.244.7.0/24")?;
        ensure!(state()?.status);
        ensure!(addresses(daemon, "pod")? == ["10.244.7.2"]);
        daemon.crash()?;
        ensure!(state()?.status);
        Ok(())
    })
}

#[test]
fn what_is_no_pod_cidr_is_refused_and_changes_nothing() -> Result<()> {
    rootful(|daemon| {
        for (pod_cidr, complaint) in [
            ("10.244.7.0", "pod_cidr \"10.244.7.0\" is not a list of networks"),
            ("10.244.7.1/24", "has bits set after a prefix"),
            ("10.244.7.0/24,10.244.8.0/24", "has two networks of one family"),
            ("10.244.7.0/31", "the built-in bridge cannot have the pod CIDR 10.244.7.0/31: subnet"),
            ("fd00:10:244:9::/64", "the built-in bridge has no network without IPv4"),
        ] {
            let refused = give(daemon, pod_cidr).unwrap_err();
            ensure!(refused.code() == Code::InvalidArgument, "{pod_cidr}: {refused:?}");
            ensure!(refused.message().contains(complaint), "{pod_cidr}: {refused:?}");
        }
        give(daemon, "")?;
        ensure!(addresses(daemon, "pod")?[0].starts_with("10.88."));
        Ok(())
    })
}

#[test]
fn a_configured_network_is_not_changed_by_the_cluster() -> Result<()> {
    let setup = Setup { network: "ipv4 = \"10.77.0.0/24\"\n", ..Setup::default() };
    rootful_with(setup, |daemon| {
        give(daemon, "10.244.7.0/24,fd00:10:244:7::/64")?;
        ensure!(addresses(daemon, "pod")? == ["10.77.0.2", "fd00:10:244:7::2"]);
        Ok(())
    })
}
