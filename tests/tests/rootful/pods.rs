//! Sandboxes: what a pod has when it is ready, and what it leaves when it is gone.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::pod::{container, idle, security, shell, words};
use tonic::Code;

/// The security context of a request for a pod.
fn context(config: &mut v1::PodSandboxConfig) -> &mut v1::LinuxSandboxSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

#[test]
fn a_pod_is_ready_and_has_an_address_when_the_call_returns() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let status = pod.status()?;
        assert_eq!(status.state(), v1::PodSandboxState::SandboxReady);
        assert_eq!(status.metadata, pod.config.metadata);
        assert!(status.created_at > 1_600_000_000_000_000_000, "nanoseconds: {}", status.created_at);
        let network = status.network.context("the network")?;
        let primary: std::net::Ipv4Addr = network.ip.parse().context("the first address is IPv4")?;
        for ip in &network.additional_ips {
            ip.ip.parse::<std::net::Ipv6Addr>().context("the others are IPv6")?;
        }
        let addresses = pod.script("ip addr show eth0", |_| {})?;
        assert!(addresses.contains(&format!("inet {primary}/")), "{addresses}");
        Ok(())
    })
}

#[test]
fn an_interface_goes_with_its_pod_and_before_its_address_also_where_its_namespace_does_not() -> Result<()> {
    rootful(|daemon| {
        let gone = |namespace: &fs::File| {
            within(SOON, "the pod's interface is gone", || {
                let pair = daemon.host().run("ip", &["-o", "link", "show", "type", "veth"])?;
                Ok(pair.trim().is_empty().then_some(()))
            })?;
            namespace.metadata().map(drop).context("the namespace was held until then")
        };
        for is_killed in [false, true] {
            let pod = daemon.pod("web")?;
            let main = pod.idle("main")?;
            let address = pod.ip()?;
            // As a socket does that a container has passed to one of another pod.
            let namespace = fs::File::open(format!("/proc/{}/ns/net", main.pid()?))?;
            pod.stop()?;
            if is_killed {
                daemon.kill()?;
                daemon.start_again()?;
            }
            let other = daemon.pod("other")?;
            ensure!(other.ip()? != address, "the address is assigned while the namespace has it");
            other.remove()?;
            gone(&namespace)?;
            pod.remove()?;
        }
        Ok(())
    })
}

#[test]
fn annotations_limit_a_pods_traffic() -> Result<()> {
    rootful(|daemon| {
        let limited = |ingress: &str| {
            let mut config = daemon.pod_config("limited");
            config.annotations.insert("kubernetes.io/ingress-bandwidth".to_owned(), ingress.to_owned());
            config.annotations.insert("kubernetes.io/egress-bandwidth".to_owned(), "10M".to_owned());
            daemon.pod_of(config)
        };
        let refused = limited("10 M").map(drop).unwrap_err().to_string();
        ensure!(refused.contains("is not a quantity from 1k to 1P, in bits per second"), "{refused}");
        let pod = limited("20M")?;
        let main = pod.idle("main")?;
        let node = daemon.host().run("tc", &["qdisc", "show"])?;
        ensure!(node.contains("tbf") && node.contains("rate 20Mbit"), "{node}");
        let inside = ["-t", &main.pid()?.to_string(), "-n", "tc", "qdisc", "show", "dev", "eth0"];
        let inside = Command::new("nsenter").args(inside).output()?;
        let inside = String::from_utf8(inside.stdout)?;
        ensure!(inside.contains("tbf") && inside.contains("rate 10Mbit"), "{inside}");
        Ok(())
    })
}

#[test]
fn two_containers_of_a_pod_talk_over_localhost() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        pod.start(container("server", &["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"]))?;
        let page = pod.script(FETCH, |config| {
            config.envs = vec![variable("URL", "http://127.0.0.1:8080/")];
        })?;
        assert_eq!(page, fs::read_to_string(DEMO_PAGE)?);
        Ok(())
    })
}

#[test]
fn pods_reach_each_other_by_address_and_the_node_reaches_them() -> Result<()> {
    rootful(|daemon| {
        let (server, client) = (daemon.pod("server")?, daemon.pod("client")?);
        server.start(container("server", &["httpd", "-f", "-p", "8080", "-h", "/www"]))?;
        let address = format!("{}:8080", server.ip()?);
        let page = client.script(FETCH, |config| {
            config.envs = vec![variable("URL", &format!("http://{address}/"))];
        })?;
        let expected = fs::read_to_string(DEMO_PAGE)?;
        assert_eq!(page, expected);
        let answer = daemon.host().inside(|| {
            let mut stream = TcpStream::connect(&address).context("connecting from the node")?;
            stream.set_read_timeout(Some(patience(SOON)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })?;
        assert!(answer.ends_with(&expected), "{answer}");
        Ok(())
    })
}

#[test]
fn a_pod_on_the_hosts_network_has_its_links_its_name_and_no_address_of_its_own() -> Result<()> {
    rootful(|daemon| {
        // A pod with its own network, so that the host has a bridge to see.
        daemon.pod("other")?;
        let mut config = daemon.pod_config("host");
        let mut namespaces = berth_tests::daemon::own_namespaces();
        namespaces.network = v1::NamespaceMode::Node.into();
        context(&mut config).namespace_options = Some(namespaces.clone());
        config.hostname = String::new();
        let pod = daemon.pod_of(config)?;
        let status = pod.status()?;
        assert_eq!(status.network.unwrap_or_default().ip, "");
        let echoed =
            status.linux.and_then(|linux| linux.namespaces).and_then(|namespaces| namespaces.options);
        assert_eq!(echoed, Some(namespaces.clone()));
        let seen = pod.script("hostname; ip -o link", |config| {
            security(config).namespace_options = Some(namespaces.clone());
        })?;
        let (name, links) = seen.split_once('\n').unwrap_or_default();
        assert_eq!(name, fs::read_to_string("/proc/sys/kernel/hostname")?.trim_end());
        let here = daemon.host().run("ip", &["-o", "link"])?;
        assert_eq!(links.lines().count(), here.lines().count(), "{links}\n{here}");
        assert!(links.contains(": bt"), "{links}");
        Ok(())
    })
}

#[test]
fn hostname_hosts_and_resolv_conf_are_as_asked() -> Result<()> {
    rootful(|daemon| {
        let mut config = daemon.pod_config("web");
        config.hostname = "some-name".to_owned();
        config.dns_config = Some(v1::DnsConfig {
            servers: words(&["10.10.10.10", "10.10.10.11"]),
            searches: words(&["a.example", "example"]),
            options: words(&["ndots:5", "edns0"]),
        });
        let pod = daemon.pod_of(config)?;
        let seen = pod.script("hostname; cat /etc/hostname; echo $HOSTNAME; cat /etc/resolv.conf", |_| {})?;
        assert_eq!(
            seen,
            "some-name\nsome-name\nsome-name\nsearch a.example example\nnameserver 10.10.10.10\n\
             nameserver 10.10.10.11\noptions ndots:5 edns0\n"
        );
        let hosts = pod.script("cat /etc/hosts", |_| {})?;
        assert!(hosts.contains("127.0.0.1\tlocalhost\n"), "{hosts}");
        assert!(hosts.contains(&format!("{}\tsome-name\n", pod.ip()?)), "{hosts}");
        Ok(())
    })
}

#[test]
fn resolv_conf_is_the_hosts_when_nothing_is_asked_and_empty_when_nothing_is_wanted() -> Result<()> {
    rootful(|daemon| {
        let hosts_own = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let unasked = daemon.pod("unasked")?;
        assert_eq!(unasked.script("cat /etc/resolv.conf", |_| {})?, hosts_own);
        let mut config = daemon.pod_config("empty");
        config.dns_config = Some(v1::DnsConfig::default());
        let empty = daemon.pod_of(config)?;
        assert_eq!(empty.script("cat /etc/resolv.conf", |_| {})?, "");
        Ok(())
    })
}

#[test]
fn shared_memory_is_the_pods_and_has_64_mib() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        assert_eq!(pod.script("echo hello > /dev/shm/note; stat -c %a /dev/shm", |_| {})?, "1777\n");
        let seen = pod.script("cat /dev/shm/note; df -k /dev/shm | tail -n 1", |_| {})?;
        let (note, size) = seen.split_once('\n').unwrap_or_default();
        assert_eq!(note, "hello");
        assert_eq!(size.split_whitespace().nth(1), Some("65536"), "{size}");
        let other = daemon.pod("other")?;
        assert_eq!(other.script("ls /dev/shm", |_| {})?, "");
        Ok(())
    })
}

#[test]
fn sysctls_are_set_in_the_pod_and_nowhere_else() -> Result<()> {
    rootful(|daemon| {
        let mut config = daemon.pod_config("web");
        let sysctls = &mut config.linux.get_or_insert_default().sysctls;
        sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "77".to_owned());
        sysctls.insert("kernel.shm_rmid_forced".to_owned(), "1".to_owned());
        let pod = daemon.pod_of(config)?;
        let read = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced";
        assert_eq!(pod.script(read, |_| {})?, "77\n1\n");
        assert_eq!(daemon.pod("other")?.script(read, |_| {})?, "1024\n0\n");
        Ok(())
    })
}

#[test]
fn containers_that_share_a_pid_namespace_see_each_other_and_orphans_are_reaped() -> Result<()> {
    rootful(|daemon| {
        let mut config = daemon.pod_config("web");
        context(&mut config).namespace_options = Some(v1::NamespaceOption::default());
        let pod = daemon.pod_of(config)?;
        let shared = |mut config: v1::ContainerConfig| {
            security(&mut config).namespace_options = Some(v1::NamespaceOption::default());
            config
        };
        // The inner shell ends at once and leaves its child to process 1, which is not in this
        // container.
        let script = "sh -c 'sleep 0.2 &'; exec sleep 1000";
        let first = pod.start(shared(shell("first", script)))?;
        let second = pod.start(shared(idle("second")))?;
        let seen = second.sh("ps -o pid,args")?;
        assert!(seen.contains("sleep 1000"), "the other container's: {seen}");
        assert!(!seen.contains(" 1 sleep") && !seen.contains(" 1 sh"), "process 1 is the pod's: {seen}");
        within(SOON, "the orphan is gone, not dead and waiting", || {
            let states = second.sh("cat /proc/[0-9]*/stat 2>/dev/null | cut -d' ' -f2,3")?;
            Ok((!states.contains("(sleep) Z") && states.matches("(sleep) S").count() <= 2).then_some(()))
        })?;
        first.stop(0)?;
        assert!(second.sh("echo alive")? == "alive\n", "one container's end is not the other's");
        Ok(())
    })
}

#[test]
fn a_pod_with_the_metadata_of_another_is_refused_until_that_is_removed() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let again = || berth_tests::pod::Pod::run(daemon.client(), daemon.pod_config("web"));
        let refused = again().err().context("refused")?;
        assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
        assert!(refused.message().contains("web"), "{refused}");
        pod.stop()?;
        assert!(again().is_err(), "stopped is not removed");
        let mut next = daemon.pod_config("web");
        next.metadata.get_or_insert_default().attempt = 1;
        daemon.pod_of(next)?;
        pod.remove()?;
        again()?;
        Ok(())
    })
}

#[test]
fn a_pod_is_what_it_was_after_a_restart_of_the_daemon() -> Result<()> {
    rootful(|daemon| {
        let mut config = daemon.pod_config("web");
        config.labels = [("io.kubernetes.pod.name", "web"), ("empty", "")].map(owned).into();
        config.annotations =
            [("a.example/long", "x".repeat(1000).as_str()), ("text", "tab\tand ü")].map(owned).into();
        let pod = daemon.pod_of(config)?;
        let mut request = container("main", &["sleep", "1000"]);
        request.labels = [("io.kubernetes.container.name", "main")].map(owned).into();
        request.annotations = [("io.kubernetes.container.restartCount", "7")].map(owned).into();
        let main = pod.start(request)?;
        let (before, container_before) = (pod.status()?, main.status()?);
        assert_eq!(before.labels, pod.config.labels);
        assert_eq!(before.annotations, pod.config.annotations);
        daemon.stop()?;
        daemon.start_again()?;
        assert_eq!(pod.status()?, before);
        assert_eq!(main.status()?, container_before);
        daemon.crash()?;
        assert_eq!(pod.status()?, before);
        assert_eq!(main.status()?, container_before);
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn a_stopped_pod_runs_nothing_and_keeps_its_containers_until_it_is_removed() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        let pid = main.pid()?;
        pod.stop()?;
        pod.stop()?;
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "the process is gone");
        assert_eq!(pod.status()?.state(), v1::PodSandboxState::SandboxNotready);
        let status = main.status()?;
        assert_eq!((status.state(), status.exit_code), (v1::ContainerState::ContainerExited, 137));
        let refused = pod.create(idle("late")).err().context("refused")?;
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        pod.remove()?;
        pod.remove()?;
        assert_eq!(main.status().err().map(|status| status.code()), Some(Code::NotFound));
        assert_eq!(pod.status().err().map(|status| status.code()), Some(Code::NotFound));
        assert!(main.log_path.exists(), "logs are the kubelet's");
        Ok(())
    })
}

#[test]
fn pods_can_be_made_and_removed_side_by_side() -> Result<()> {
    rootful(|daemon| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|number| {
                    scope.spawn(move || -> Result<String> {
                        let pod = daemon.pod(&format!("pod-{number}"))?;
                        assert_eq!(pod.script("hostname", |_| {})?, format!("pod-{number}\n"));
                        let ip = pod.ip()?;
                        pod.remove()?;
                        Ok(ip)
                    })
                })
                .collect();
            for thread in threads {
                let ip = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
                ensure!(!ip.is_empty());
            }
            Ok(())
        })
    })
}

#[test]
fn a_client_that_gives_up_does_not_leave_half_a_pod() -> Result<()> {
    rootful(|daemon| {
        // A kubelet gives up a call by resetting it; so does a client that ends.
        let config = daemon.pod_config("web");
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let client = daemon.client();
        let answer = client.run_pod_sandbox_or_give_up(request, Duration::from_millis(2))?;
        within(SOON, "the pod is whole or not there, and its name usable again", || {
            if let Some(one) = client.sandboxes(v1::PodSandboxFilter::default())?.first() {
                ensure!(one.state() == v1::PodSandboxState::SandboxReady, "{one:?}");
                client.remove_sandbox(&one.id)?;
            }
            daemon.pod("web").map(Some)
        })
        .with_context(|| format!("the answer was {answer:?}"))?;
        Ok(())
    })
}

/// The page of the demo image.
const DEMO_PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/images/demo/www/index.html");

/// Fetches `$URL` as soon as it is served.
const FETCH: &str =
    "i=0; until wget -q -O - $URL; do i=$((i + 1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done";

fn variable(key: &str, value: &str) -> v1::KeyValue {
    v1::KeyValue { key: key.to_owned(), value: value.as_bytes().to_vec() }
}

fn owned((key, value): (&str, &str)) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

#[test]
fn a_container_in_the_hosts_pid_namespace_sees_the_host_and_so_do_its_commands() -> Result<()> {
    rootful(|daemon| {
        let hosts = v1::NamespaceOption { pid: v1::NamespaceMode::Node.into(), ..Default::default() };
        let mut config = daemon.pod_config("host-pid");
        context(&mut config).namespace_options = Some(hosts.clone());
        let pod = daemon.pod_of(config)?;
        let mut config = idle("main");
        security(&mut config).namespace_options = Some(hosts);
        let main = pod.start(config)?;
        let (pid, own) = (main.pid()?, std::process::id());
        assert_eq!(main.sh(&format!("[ -e /proc/{pid} ] && [ -e /proc/{own} ] && echo both"))?, "both\n");
        main.stop(5)?;
        assert_eq!(main.status()?.exit_code, 0);
        Ok(())
    })
}
