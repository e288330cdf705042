//! The files that the containers of a pod share and can write: `/etc/hosts`, `/etc/hostname`,
//! `/etc/resolv.conf`, `/dev/shm`. What they write is bounded, is not trusted by anything outside
//! the pod, and takes nothing from other pods.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests::census::mounts_below;
use berth_tests::daemon::{Daemon, own_namespaces, rootful};
use berth_tests::forge::sha256;
use berth_tests::pod::{Pod, idle};
use serde_json::Value;

/// The size of a pod's tmpfs, in KiB.
const TMPFS_KIB: u64 = 65_536;

const FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

#[test]
fn what_a_container_writes_into_its_hostname_is_not_what_its_siblings_are_called() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("named")?;
        let first = pod.idle("first")?;
        // Reading a file of this size whole would take the daemon seconds and its memory.
        first.sh("truncate -s 60M /etc/hostname && printf 'evil\\nname\\n' | dd of=/etc/hostname conv=notrunc 2>&1")?;
        let second = pod.idle("second")?;
        assert_eq!(second.sh("echo $HOSTNAME; hostname")?, "named\nnamed\n");
        daemon.crash()?;
        let third = pod.idle("third")?;
        assert_eq!(third.sh("echo $HOSTNAME; hostname")?, "named\nnamed\n");
        Ok(())
    })
}

#[test]
fn a_container_that_fills_its_files_takes_no_room_from_other_pods() -> Result<()> {
    rootful(|daemon| {
        let state = daemon.state();
        let device = |path: &Path| fs::metadata(path).map(|found| found.dev());
        let mut host_ipc = daemon.pod_config("host-ipc");
        let options = berth_cri::v1::NamespaceOption {
            ipc: berth_cri::v1::NamespaceMode::Node.into(),
            ..own_namespaces()
        };
        host_ipc.linux.get_or_insert_default().security_context.get_or_insert_default().namespace_options =
            Some(options);
        for config in [daemon.pod_config("own-ipc"), host_ipc] {
            let pod = daemon.pod_of(config)?;
            let mut config = idle("main");
            berth_tests::pod::security(&mut config).namespace_options =
                pod.config.linux.clone().and_then(|linux| linux.security_context?.namespace_options);
            let main = pod.start(config)?;
            for name in FILES {
                let file = PathBuf::from(format!("/proc/{}/root/etc/{name}", main.pid()?));
                ensure!(device(&file)? != device(&state)?, "/etc/{name} lies in the runtime state");
                let wrote = main.exec(&["dd", "if=/dev/zero", &format!("of=/etc/{name}"), "bs=1M"])?;
                ensure!(wrote.code != 0 && wrote.stderr.contains("No space left"), "{wrote:?}");
                let kib = fs::metadata(&file)?.blocks() / 2;
                ensure!(kib <= TMPFS_KIB, "{kib} KiB were written to /etc/{name}");
                main.sh(&format!("echo small > /etc/{name}"))?;
            }
            ensure!(daemon.pod(&format!("after-{}", pod.config.hostname))?.idle("main").is_ok());
            pod.remove()?;
        }
        let mounts = mounts_below(&state.join("sandboxes"));
        let tmpfs = mounts.iter().filter(|mount| mount.ends_with("shm")).count();
        assert_eq!(tmpfs, 2, "one mount for each pod that is there: {mounts:?}");
        Ok(())
    })
}

/// resolvconf, VPN clients and the like write these files, and the pod's other containers see it.
#[test]
fn the_files_can_be_written_and_are_those_of_all_containers_of_the_pod() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("shared")?;
        let (first, second) = (pod.idle("first")?, pod.idle("second")?);
        for name in FILES {
            first.sh(&format!("echo 'of the first' >> /etc/{name}"))?;
            ensure!(second.sh(&format!("cat /etc/{name}"))?.ends_with("of the first\n"), "{name}");
            assert_eq!(second.sh(&format!("stat -c %a /etc/{name}"))?, "644\n");
        }
        first.sh("echo hello > /dev/shm/greeting")?;
        assert_eq!(
            second.sh("cat /dev/shm/greeting; stat -c %a /dev/shm; ls /dev/shm")?,
            "hello\n1777\ngreeting\n"
        );
        let mut config = idle("reader");
        berth_tests::pod::security(&mut config).readonly_rootfs = true;
        let reader = pod.start(config)?;
        for name in FILES {
            let wrote = reader.exec(&["sh", "-c", &format!("echo x > /etc/{name}")])?;
            ensure!(wrote.code != 0, "/etc/{name} can be written in a read-only root");
        }
        Ok(())
    })
}

/// The record of a pod with other fields: see the format in `berth_model::record`.
fn rewrite_record(
    daemon: &Daemon,
    pod: &Pod,
    change: impl FnOnce(&mut serde_json::Map<String, Value>),
) -> Result<()> {
    let path = daemon.root().join("sandboxes").join(&pod.id).join("record");
    let bytes = fs::read(&path)?;
    let end = bytes.iter().position(|byte| *byte == b'\n').context("a record has a first line")?;
    let Value::Object(mut fields) = serde_json::from_slice(&bytes[end + 1..])? else {
        bail!("a record is an object")
    };
    change(&mut fields);
    let body = serde_json::to_vec(&fields)?;
    let mut record = format!("berth-record 1 {}\n", sha256(&body).trim_start_matches("sha256:")).into_bytes();
    record.extend(body);
    fs::write(path, record).context("writing the record")
}

/// As an earlier version left it: the tmpfs is `/dev/shm`, and the files lie beside it.
#[test]
fn a_pod_of_an_earlier_version_goes_on_and_takes_new_containers() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("earlier")?;
        daemon.stop()?;
        let state = daemon.state().join("sandboxes").join(&pod.id);
        let tmpfs = state.join("shm");
        for name in FILES {
            fs::copy(tmpfs.join("etc").join(name), state.join(name))?;
        }
        fs::remove_dir_all(tmpfs.join("etc"))?;
        fs::remove_dir(tmpfs.join("shm"))?;
        fs::set_permissions(&tmpfs, fs::Permissions::from_mode(0o1777))?;
        rewrite_record(daemon, &pod, |fields| {
            ensure_removed(fields, "hostname");
            ensure_removed(fields, "shared_in_tmpfs");
        })?;
        daemon.start_again()?;
        let main = pod.idle("main")?;
        assert_eq!(
            main.sh("echo $HOSTNAME; cat /etc/hostname; touch /dev/shm/x; ls /dev/shm")?,
            "earlier\nearlier\nx\n"
        );
        ensure!(main.sh("cat /etc/hosts")?.contains("earlier"), "the pod is in its own hosts file");
        pod.stop()?;
        pod.remove()?;
        ensure!(!state.exists(), "nothing is left of it");
        Ok(())
    })
}

fn ensure_removed(fields: &mut serde_json::Map<String, Value>, name: &str) {
    assert!(fields.remove(name).is_some(), "the record has no {name}");
}
