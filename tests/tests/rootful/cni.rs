//! Pods on the CNI network that the node has configured: CNI's reference plugins, and plugins of
//! ours that misbehave.

use std::fs;

use anyhow::{Result, ensure};
use berth_cri::v1;
use berth_tests::census::pod_addresses;
use berth_tests::cni::{BRIDGE, ONLY_CNI};
use berth_tests::daemon::{Daemon, SOON, rootful, rootful_with};
use berth_tests::deadline::within;
use berth_tests::pod::shell;
use serde_json::json;

fn condition(daemon: &Daemon) -> Result<v1::RuntimeCondition> {
    let status = daemon.client().status(v1::StatusRequest::default())?.status.unwrap_or_default();
    let network = status.conditions.into_iter().find(|condition| condition.r#type == "NetworkReady");
    Ok(network.unwrap_or_default())
}

fn is_ready(daemon: &Daemon, ready: bool) -> Result<v1::RuntimeCondition> {
    within(SOON, "the condition of the network", || {
        let condition = condition(daemon)?;
        Ok((condition.status == ready).then_some(condition))
    })
}

fn nothing_is_left(daemon: &Daemon) -> Result<()> {
    let (addresses, attachments) = (daemon.cni_addresses_in_use(), daemon.cni_attachments()?);
    ensure!(addresses.is_empty() && attachments.is_empty(), "{addresses:?}, {attachments:?}");
    let links = daemon.host().run("ip", &["-o", "link", "show", "type", "veth"])?;
    ensure!(links.is_empty(), "{links}");
    let pinned = fs::read_dir(daemon.state().join("netns")).map_or(0, Iterator::count);
    ensure!(pinned == 0, "{pinned} namespaces are left");
    Ok(())
}

#[test]
fn pods_reach_each_other_and_leave_nothing() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        daemon.install_cni_plugins()?;
        daemon.configure_cni("10-pods.conflist", BRIDGE)?;
        is_ready(daemon, true)?;
        let (a, b) = (daemon.pod("a")?, daemon.pod("b")?);
        let status = a.status()?.network.unwrap_or_default();
        ensure!(status.ip.starts_with("10.99.0."), "{status:?}");
        let [second] = status.additional_ips.as_slice() else { panic!("{status:?}") };
        ensure!(second.ip.starts_with("fd99::"), "{status:?}");
        let server = b.start(shell("server", "echo hello | nc -l -p 80; sleep 1000"))?;
        let client = a.idle("client")?;
        let script = format!("until nc {} 80 </dev/null | grep hello; do sleep 0.1; done", b.ip()?);
        ensure!(client.sh(&script)?.contains("hello"));
        // Loopback is the daemon's to bring up, with CNI as well.
        client.sh("ip addr show lo | grep 127.0.0.1 && ping -c 1 127.0.0.1")?;
        drop(server);
        let pinned = daemon.state().join("netns").join(format!("berth-{}", a.id));
        ensure!(pinned.exists(), "{} is not there", pinned.display());
        let attachment = daemon
            .cni_attachments()?
            .into_iter()
            .find(|attachment| attachment["containerId"] == json!(a.id))
            .unwrap_or_default();
        assert_eq!(attachment["kind"], "cniCacheV1");
        assert_eq!(attachment["netns"], json!(pinned));
        ensure!(attachment["cniArgs"].to_string().contains(r#"["K8S_POD_NAME","a"]"#), "{attachment}");

        // No bridge of ours on a node with CNI.
        let links = daemon.host().run("ip", &["-o", "link"])?;
        ensure!(!links.contains(": bt"), "{links}");

        // Another daemon gives back what this one attached, with the configuration gone.
        daemon.kill()?;
        fs::remove_dir_all(daemon.cni().join("net.d"))?;
        daemon.start_again()?;
        a.stop()?;
        a.remove()?;
        b.remove()?;
        nothing_is_left(daemon)
    })
}

#[test]
fn a_node_without_configuration_waits_and_takes_it_when_it_comes() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        daemon.install_cni_plugins()?;
        let condition = is_ready(daemon, false)?;
        assert_eq!(condition.reason, "NetworkPluginNotReady");
        ensure!(condition.message.contains("there is no CNI configuration in "), "{}", condition.message);
        let refused = daemon.pod("early").unwrap_err().to_string();
        ensure!(refused.contains("there is no CNI configuration in "), "{refused}");
        // Pods on the node's network do not wait: the network's own are among them.
        let mut config = daemon.pod_config("agent");
        config.linux.get_or_insert_default().security_context.get_or_insert_default().namespace_options =
            Some(v1::NamespaceOption { network: v1::NamespaceMode::Node.into(), ..Default::default() });
        daemon.pod_of(config)?;

        daemon.configure_cni("10-pods.conflist", BRIDGE)?;
        is_ready(daemon, true)?;
        let pod = daemon.pod("pod")?;
        // One that is torn leaves the last good one in use, and the directory may come back.
        daemon.configure_cni("10-pods.conflist", "{")?;
        daemon.pod("torn")?;
        ensure!(daemon.log()?.contains("the last good configuration stays in use"));
        fs::remove_dir_all(daemon.cni().join("net.d"))?;
        is_ready(daemon, false)?;
        ensure!(daemon.pod("late").is_err());
        daemon.configure_cni("20-pods.conflist", BRIDGE)?;
        is_ready(daemon, true)?;
        daemon.pod("back")?;
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn a_single_machine_has_the_bridge_until_cni_is_configured() -> Result<()> {
    rootful(|daemon| {
        daemon.install_cni_plugins()?;
        let before = daemon.pod("before")?;
        ensure!(before.ip()?.starts_with("10.88."), "{}", before.ip()?);
        daemon.configure_cni("10-pods.conflist", BRIDGE)?;
        let after = daemon.pod("after")?;
        ensure!(after.ip()?.starts_with("10.99."), "{}", after.ip()?);
        daemon.kill()?;
        daemon.start_again()?;
        // Each is given back to the network that it has.
        before.remove()?;
        after.remove()?;
        nothing_is_left(daemon)?;
        within(SOON, "the addresses of the bridge are free", || {
            Ok((pod_addresses(daemon)? == 0).then_some(()))
        })
    })
}

#[test]
fn the_name_servers_of_the_network_are_for_pods_that_ask_for_none() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        let script = r#"#!/bin/sh
[ "$CNI_COMMAND" != ADD ] ||
    echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.99.0.7/24"}], "dns": {
        "nameservers": ["192.0.2.53", "192.0.2.54\\noptions debug"], "domain": "net.example", "options": ["ndots:2"]}}'
"#;
        daemon.install_cni_script("odd", script)?;
        daemon.configure_cni("10-odd.conf", r#"{"cniVersion": "1.0.0", "name": "odd", "type": "odd"}"#)?;
        let resolver = |name: &str, dns: Option<v1::DnsConfig>| {
            let pod = daemon.pod_of(v1::PodSandboxConfig { dns_config: dns, ..daemon.pod_config(name) })?;
            let text = pod.script("cat /etc/resolv.conf", |_| {})?;
            pod.remove()?;
            anyhow::Ok(text)
        };
        let own = resolver("none", None)?;
        ensure!(own.trim() == "search net.example\nnameserver 192.0.2.53\noptions ndots:2", "{own}");
        let dns = v1::DnsConfig { servers: vec!["10.96.0.10".to_owned()], ..v1::DnsConfig::default() };
        let asked = resolver("some", Some(dns))?;
        ensure!(asked.trim() == "nameserver 10.96.0.10", "{asked}");
        Ok(())
    })
}

#[test]
fn host_ports_are_portmaps() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        daemon.install_cni_plugins()?;
        daemon.configure_cni("10-pods.conflist", BRIDGE)?;
        let mut config = daemon.pod_config("web");
        config.port_mappings =
            vec![v1::PortMapping { container_port: 80, host_port: 8080, ..Default::default() }];
        let pod = daemon.pod_of(config)?;
        pod.start(shell("server", "while :; do echo hello | nc -l -p 80; done"))?;
        let gateway = "10.99.0.1";
        within(SOON, "the host port answers", || {
            let script = format!("exec 3<>/dev/tcp/{gateway}/8080 && cat <&3");
            let answer = daemon.host().run("timeout", &["5", "bash", "-c", &script]).unwrap_or_default();
            Ok(answer.contains("hello").then_some(()))
        })?;
        pod.remove()?;
        let rules = daemon.host().run("nft", &["list", "ruleset"])?;
        ensure!(!rules.contains("8080"), "{rules}");
        nothing_is_left(daemon)
    })
}

#[test]
fn a_plugin_does_not_outlive_the_daemon_that_asked_for_it() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        let trace = daemon.cni().join("trace");
        let script = format!(
            "#!/bin/sh\necho $CNI_COMMAND $$ >> {trace}\n[ $CNI_COMMAND != ADD ] || {{ trap '' TERM; sleep 1000 & wait; }}\n",
            trace = trace.display()
        );
        daemon.install_cni_script("odd", &script)?;
        daemon.configure_cni("10-odd.conf", r#"{"cniVersion": "1.0.0", "name": "odd", "type": "odd"}"#)?;
        is_ready(daemon, true)?;
        std::thread::scope(|scope| {
            let attaching = scope.spawn(|| daemon.pod("hangs").map(drop));
            let plugin = within(SOON, "the plugin hangs", || {
                let calls = fs::read_to_string(&trace).unwrap_or_default();
                Ok(calls.lines().find_map(|line| line.strip_prefix("ADD ")).map(str::to_owned))
            })?;
            daemon.kill()?;
            ensure!(attaching.join().is_ok_and(|attached| attached.is_err()), "no pod came of it");
            within(SOON, "the plugin is gone", || {
                Ok((!std::path::Path::new("/proc").join(&plugin).exists()).then_some(()))
            })
        })?;
        // What it may have allocated is given back.
        daemon.start_again()?;
        within(SOON, "it is deleted", || {
            Ok(fs::read_to_string(&trace)?.lines().any(|line| line.starts_with("DEL ")).then_some(()))
        })?;
        nothing_is_left(daemon)
    })
}

#[test]
fn a_plugin_that_fails_or_hangs_costs_other_pods_nothing() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        let trace = daemon.cni().join("trace");
        let script = format!(
            r#"#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID" >> {trace}
case $CNI_COMMAND,$CNI_ARGS in
ADD,*K8S_POD_NAME=fails*) echo '{{"code": 11, "msg": "no addresses left"}}'; exit 1 ;;
ADD,*K8S_POD_NAME=hangs*) trap '' TERM; sleep 1000 & wait ;;
ADD,*) echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "10.99.0.7/24"}}]}}' ;;
esac
"#,
            trace = trace.display()
        );
        daemon.install_cni_script("odd", &script)?;
        daemon.configure_cni("10-odd.conf", r#"{"cniVersion": "1.0.0", "name": "odd", "type": "odd"}"#)?;
        is_ready(daemon, true)?;
        let refused = daemon.pod("fails").unwrap_err().to_string();
        ensure!(
            refused.contains("CNI plugin odd of network odd failed on ADD: code 11: no addresses left"),
            "{refused}"
        );
        let calls = fs::read_to_string(&trace)?;
        let last = calls.lines().last().unwrap_or_default();
        ensure!(last.starts_with("DEL "), "a failed ADD is not followed by DEL: {calls}");

        std::thread::scope(|scope| {
            let hanging = scope.spawn(|| daemon.pod("hangs").map(drop));
            within(SOON, "the plugin hangs", || {
                let calls = fs::read_to_string(&trace)?;
                Ok((calls.lines().filter(|line| line.starts_with("ADD")).count() > 1).then_some(()))
            })?;
            // Meanwhile.
            let other = daemon.pod("other")?;
            assert_eq!(other.ip()?, "10.99.0.7");
            condition(daemon)?;
            other.remove()?;
            let refused = match hanging.join() {
                Ok(Err(error)) => error.to_string(),
                other => panic!("{other:?}"),
            };
            ensure!(refused.contains("it did not finish within 60 s and was killed"), "{refused}");
            Ok(())
        })?;
        assert_eq!(daemon.cni_attachments()?, Vec::<serde_json::Value>::new());
        Ok(())
    })
}

#[test]
fn what_a_pod_that_could_not_be_made_has_is_given_back_when_that_can_be() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        let (broken, trace) = (daemon.cni().join("broken"), daemon.cni().join("trace"));
        let script = format!(
            r#"#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{{"code": 11, "msg": "no"}}'; exit 1 ;;
DEL) [ ! -e {broken} ] || exit 1; echo deleted >> {trace} ;;
esac
"#,
            broken = broken.display(),
            trace = trace.display()
        );
        daemon.install_cni_script("odd", &script)?;
        daemon.configure_cni("10-odd.conf", r#"{"cniVersion": "1.0.0", "name": "odd", "type": "odd"}"#)?;
        is_ready(daemon, true)?;
        fs::write(&broken, "")?;
        daemon.pod("fails").unwrap_err();
        ensure!(daemon.log()?.contains("cannot clean up after a sandbox"), "the undo did not fail");
        let sandboxes = daemon.root().join("sandboxes");
        ensure!(fs::read_dir(&sandboxes)?.next().is_some(), "it is forgotten");
        fs::remove_file(&broken)?;
        within(SOON, "what is left is given back", || {
            Ok((trace.exists() && fs::read_dir(&sandboxes)?.next().is_none()).then_some(()))
        })
    })
}

#[test]
fn what_is_left_of_pods_that_are_gone_is_given_back() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        daemon.install_cni_plugins()?;
        daemon.configure_cni("10-pods.conflist", BRIDGE)?;
        let pod = daemon.pod("lost")?;
        // Another runtime's: it is not ours to delete.
        let results = daemon.cni().join("cache/results");
        let others = r#"{"kind":"cniCacheV1","containerId":"anothers","config":"e30=","ifName":"eth0",
            "networkName":"pods","netns":"/run/netns/anothers","result":{"cniVersion":"1.1.0"}}"#;
        fs::write(results.join("pods-anothers-eth0"), others)?;
        // Nor do odd files of others keep ours.
        std::os::unix::fs::symlink("pods-loop-eth0", results.join("pods-loop-eth0"))?;
        // One whose entry is lost is deleted with the configuration of now.
        let torn = daemon.pod("torn")?;
        let address = torn.ip()?;
        fs::write(results.join(format!("pods-{}-eth0", torn.id)), "{")?;
        torn.stop()?;
        torn.remove()?;
        ensure!(!daemon.cni_addresses_in_use().contains(&address), "its address is leaked");
        daemon.kill()?;
        fs::remove_dir_all(daemon.root().join("sandboxes").join(&pod.id))?;
        fs::remove_file(daemon.state().join("sandboxes").join(&pod.id).join("record"))?;
        daemon.start_again()?;
        within(SOON, "the attachment is given back", || {
            Ok((daemon.cni_attachments()?.len() == 1).then_some(()))
        })?;
        within(SOON, "the addresses are free", || {
            Ok(daemon.cni_addresses_in_use().is_empty().then_some(()))
        })?;
        for others in ["pods-anothers-eth0", "pods-loop-eth0"] {
            fs::remove_file(results.join(others))?;
        }
        within(SOON, "nothing is left", || Ok(nothing_is_left(daemon).is_ok().then_some(())))
    })
}
