//! Ports of the node that lead to pods on the built-in bridge.

use anyhow::{Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::pod::{Pod, shell};

fn asks_for(daemon: &Daemon, name: &str, host_port: i32) -> Result<Pod> {
    let mut config = daemon.pod_config(name);
    config.port_mappings = vec![v1::PortMapping { container_port: 80, host_port, ..Default::default() }];
    daemon.pod_of(config)
}

fn server(pod: &Pod, says: &str) -> Result<()> {
    pod.start(shell("server", &format!("while :; do echo {says} | nc -l -p 80; done")))?;
    Ok(())
}

/// What answers on a port of the node.
fn ask(daemon: &Daemon, port: i32) -> String {
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port} && cat <&3");
    daemon.host().run("timeout", &["5", "bash", "-c", &script]).unwrap_or_default().trim().to_owned()
}

fn answers(daemon: &Daemon, port: i32, expected: &str) -> Result<()> {
    within(SOON, "the host port answers", || Ok((ask(daemon, port) == expected).then_some(())))
}

#[test]
fn a_host_port_is_its_pods_until_that_stops_whatever_happens_to_the_daemon_and_the_firewall() -> Result<()> {
    rootful(|daemon| {
        let first = asks_for(daemon, "first", 8080)?;
        server(&first, "one")?;
        answers(daemon, 8080, "one")?;
        let refused = asks_for(daemon, "second", 8080).map(drop).unwrap_err().to_string();
        ensure!(refused.contains("host port 8080/TCP is in use by sandbox"), "{refused}");
        ensure!(refused.contains(&first.id), "{refused}");

        daemon.kill()?;
        daemon.start_again()?;
        answers(daemon, 8080, "one")?;
        asks_for(daemon, "second", 8080).map(drop).unwrap_err();
        daemon.host().run("nft", &["flush", "ruleset"])?;
        answers(daemon, 8080, "one")?;

        // A pod that has been stopped keeps its record, and no port.
        first.stop()?;
        let second = asks_for(daemon, "second", 8080)?;
        server(&second, "two")?;
        answers(daemon, 8080, "two")?;
        daemon.kill()?;
        daemon.start_again()?;
        answers(daemon, 8080, "two")?;
        first.remove()?;
        answers(daemon, 8080, "two")?;
        second.remove()?;
        let rules = daemon.host().run("nft", &["list", "ruleset"])?;
        ensure!(!rules.contains("elements"), "{rules}");
        Ok(())
    })
}
