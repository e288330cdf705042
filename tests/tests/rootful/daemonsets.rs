//! Pods of DaemonSets of well-known projects: the requests that a kubelet makes for them are
//! accepted, and work.

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::pod::{Pod, idle, security, words};

fn host_pod(daemon: &Daemon, name: &str) -> Result<Pod> {
    let mut config = daemon.pod_config(name);
    let context = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    context.privileged = true;
    let namespaces = context.namespace_options.get_or_insert_default();
    namespaces.network = v1::NamespaceMode::Node.into();
    namespaces.pid = v1::NamespaceMode::Node.into();
    context.selinux_options = selinux("", "s0:c1,c2");
    // Kubernetes fills in the host's ports of a pod on the host's network.
    config.port_mappings =
        vec![v1::PortMapping { container_port: 9100, host_port: 9100, ..Default::default() }];
    daemon.pod_of(config)
}

fn mount(host_path: &str, container_path: &str, readonly: bool) -> v1::Mount {
    v1::Mount {
        host_path: host_path.to_owned(),
        container_path: container_path.to_owned(),
        readonly,
        selinux_relabel: true,
        ..Default::default()
    }
}

fn selinux(kind: &str, level: &str) -> Option<v1::SeLinuxOption> {
    Some(v1::SeLinuxOption { r#type: kind.to_owned(), level: level.to_owned(), ..Default::default() })
}

/// A container in such a pod, with the required namespaces.
fn container(name: &str, change: impl FnOnce(&mut v1::ContainerConfig)) -> v1::ContainerConfig {
    let mut config = idle(name);
    let namespaces = security(&mut config).namespace_options.get_or_insert_default();
    namespaces.network = v1::NamespaceMode::Node.into();
    namespaces.pid = v1::NamespaceMode::Node.into();
    change(&mut config);
    config
}

#[test]
fn what_daemonsets_ask_for_is_accepted_and_works() -> Result<()> {
    if std::fs::read_to_string("/proc/filesystems")?.contains("selinuxfs") {
        berth_tests::skip::skip("daemonsets::what_daemonsets_ask_for_is_accepted_and_works", "SELinux is on");
        return Ok(());
    }
    rootful(|daemon| {
        let pod = host_pod(daemon, "daemonset")?;
        let works = |config: v1::ContainerConfig, script: &str, expected: &str| -> Result<()> {
            let name = config.metadata.clone().unwrap_or_default().name;
            let container = pod.start(config).with_context(|| name.clone())?;
            let said = container.sh(script).with_context(|| name.clone())?;
            ensure!(said == expected, "{name}: {said}");
            Ok(())
        };
        // node-exporter: the host's trees, read-only, unprivileged.
        works(
            container("node-exporter", |config| {
                config.mounts = vec![
                    mount("/proc", "/host/proc", true),
                    mount("/sys", "/host/sys", true),
                    mount("/", "/host/root", true),
                ];
                let context = security(config);
                context.run_as_user = Some(v1::Int64Value { value: 65534 });
                context.run_as_group = Some(v1::Int64Value { value: 65534 });
                context.capabilities.get_or_insert_default().drop_capabilities = words(&["ALL"]);
                context.no_new_privs = true;
                context.readonly_rootfs = true;
                context.selinux_options = selinux("spc_t", "s0");
            }),
            "test -r /host/proc/1/stat && test -d /host/sys/class/net && test -d /host/root/etc && id -u",
            "65534\n",
        )?;
        // Cilium's agent: not privileged, with its own capabilities and an SELinux type.
        works(
            container("cilium-agent", |config| {
                config.mounts = vec![
                    mount("/lib/modules", "/lib/modules", true),
                    mount("/proc/sys", "/host/proc/sys", false),
                ];
                let context = security(config);
                context.selinux_options = selinux("spc_t", "s0");
                context.apparmor = Some(v1::SecurityProfile {
                    profile_type: v1::security_profile::ProfileType::Unconfined.into(),
                    ..Default::default()
                });
                let capabilities = context.capabilities.get_or_insert_default();
                capabilities.drop_capabilities = words(&["ALL"]);
                capabilities.add_capabilities =
                    words(&["NET_ADMIN", "NET_RAW", "SYS_ADMIN", "CHOWN", "KILL"]);
            }),
            "test -d /lib/modules && cat /host/proc/sys/kernel/ostype",
            "Linux\n",
        )?;
        // Rook's OSD and CSI drivers: privileged, on the host's devices.
        works(
            container("rook-osd", |config| {
                config.mounts = vec![
                    mount("/dev", "/dev", false),
                    mount("/sys", "/sys", false),
                    mount("/run", "/run/../run", false),
                ];
                config.devices = vec![v1::Device {
                    container_path: "/dev/null".to_owned(),
                    host_path: "/dev/null".to_owned(),
                    permissions: "rwm".to_owned(),
                }];
                let context = security(config);
                context.privileged = true;
                context.selinux_options = selinux("", "s0:c5,c9");
            }),
            "stat -c '%t %T' /dev/null; test -d /sys/block && test -c /dev/full && echo devices",
            "1 3\ndevices\n",
        )?;
        // A device plugin's pod, by the strings that older kubelets send for profiles.
        works(
            container("device-plugin", |config| {
                config.mounts = vec![mount("/dev/zero", "/dev/nvidia0", false)];
                config.devices = vec![v1::Device {
                    container_path: "/dev/nvidiactl".to_owned(),
                    host_path: "/dev/zero".to_owned(),
                    permissions: "mrw".to_owned(),
                }];
                let context = security(config);
                context.capabilities.get_or_insert_default().drop_capabilities = words(&["all"]);
                #[expect(deprecated, reason = "older kubelets send it")]
                {
                    context.apparmor_profile = "runtime/default".to_owned();
                    context.seccomp_profile_path = "runtime/default".to_owned();
                }
            }),
            "stat -c '%t %T' /dev/nvidiactl /dev/nvidia0",
            "1 5\n1 5\n",
        )?;
        Ok(())
    })
}

/// What the kernel says of a process: proc_pid_attr(5). Nothing without a security module.
fn label(pid: i32) -> Result<String> {
    Ok(std::fs::read_to_string(format!("/proc/{pid}/attr/current")).unwrap_or_default())
}

#[test]
fn without_selinux_its_options_change_nothing_and_no_label_is_reported() -> Result<()> {
    if std::fs::read_to_string("/proc/filesystems")?.contains("selinuxfs") {
        berth_tests::skip::skip("daemonsets::without_selinux", "SELinux is on");
        return Ok(());
    }
    rootful(|daemon| {
        let plain = daemon.pod("plain")?.idle("main")?;
        let mut config = daemon.pod_config("labelled");
        let context = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        context.selinux_options = selinux("spc_t", "s0:c101,c202");
        let pod = daemon.pod_of(config)?;
        let mut config = idle("main");
        security(&mut config).selinux_options = selinux("spc_t", "s0:c101,c202");
        let main = pod.start(config)?;

        assert_eq!(label(main.pid()?)?, label(plain.pid()?)?);
        let client = daemon.client();
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
        let of_pod = client.pod_sandbox_status(request)?;
        let request = v1::ContainerStatusRequest { container_id: main.id.clone(), verbose: true };
        let of_main = client.container_status(request)?;
        ensure!(!of_pod.info.is_empty() && !of_main.info.is_empty(), "the details are there");
        let request = v1::ContainerStatusRequest { container_id: plain.id.clone(), verbose: true };
        let of_plain = client.container_status(request)?;
        for text in [format!("{of_pod:?}"), format!("{of_main:?}"), format!("{of_plain:?}")] {
            for word in ["spc_t", "c101", "selinux", "mountLabel"] {
                ensure!(!text.to_lowercase().contains(&word.to_lowercase()), "{word} in {text}");
            }
        }
        Ok(())
    })
}
