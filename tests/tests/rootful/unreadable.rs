//! Records that cannot be read, are damaged, lost or of a newer version, and a daemon without
//! descriptors: nothing that runs is ended, and everything has an owner that can be listed, stopped
//! and removed.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::census::Census;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::pod::{Container, Pod, idle, limit};
use tonic::Code;

/// The records of a pod and of a container, each with its copy.
fn records(daemon: &Daemon, pod: &Pod, container: &Container) -> [(PathBuf, PathBuf); 2] {
    [("sandboxes", &pod.id), ("containers", &container.id)].map(|(kind, id)| {
        (daemon.root().join(kind).join(id).join("record"), daemon.state().join(kind).join(id).join("record"))
    })
}

/// The pod and its container are unchanged.
fn are_as_before(pod: &Pod, container: &Container, pid: i32) -> Result<()> {
    assert_eq!(pod.status()?.state(), v1::PodSandboxState::SandboxReady);
    assert_eq!(container.status()?.state(), v1::ContainerState::ContainerRunning);
    assert_eq!(container.pid()?, pid);
    assert_eq!(container.sh("echo alive")?, "alive\n");
    Ok(())
}

#[test]
fn records_that_cannot_be_read_end_nothing_and_are_left_alone() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        let pid = main.pid()?;
        for (record, _) in records(daemon, &pod, &main) {
            // Neither absent nor damaged: reading it fails with an error that says nothing about
            // its content.
            let aside = record.with_extension("aside");
            daemon.kill()?;
            fs::rename(&record, &aside)?;
            fs::create_dir(&record)?;
            daemon.start_again()?;
            are_as_before(&pod, &main, pid).with_context(|| record.display().to_string())?;
            ensure!(record.is_dir(), "it was not touched");
            daemon.kill()?;
            fs::remove_dir(&record)?;
            fs::rename(&aside, &record)?;
            daemon.start_again()?;
            are_as_before(&pod, &main, pid)?;
        }
        ensure!(daemon.root().join("quarantine").read_dir()?.next().is_none(), "nothing was set aside");
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn a_record_that_cannot_be_read_and_has_no_copy_is_kept_and_read_when_it_can_be() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let (running, over) = (pod.idle("running")?, pod.idle("over")?);
        over.stop(0)?;
        let pid = running.pid()?;
        let unread = |container: &Container| -> Result<(PathBuf, PathBuf)> {
            let [_, (record, copy)] = records(daemon, &pod, container);
            fs::remove_file(copy)?;
            let aside = record.with_extension("aside");
            fs::rename(&record, &aside)?;
            fs::create_dir(&record)?;
            Ok((record, aside))
        };
        daemon.kill()?;
        let unread = [unread(&running)?, unread(&over)?];
        daemon.start_again()?;
        are_as_before(&pod, &running, pid)?;
        assert_eq!(over.status().err().context("nobody knows what it was")?.code(), Code::NotFound);
        for (record, aside) in unread {
            fs::remove_dir(&record)?;
            fs::rename(aside, record)?;
        }
        within(SOON, "it is found by the same daemon", || {
            Ok((over.status()?.state() == v1::ContainerState::ContainerExited).then_some(()))
        })?;
        daemon.crash()?;
        are_as_before(&pod, &running, pid)?;
        assert_eq!(running.status()?.metadata.unwrap_or_default().name, "running");
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn damaged_and_lost_records_of_what_runs_come_back_from_their_copies() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        let pid = main.pid()?;
        type Damage = fn(&Path) -> Result<()>;
        let damages: [(&str, Damage); 4] = [
            ("torn", |record| Ok(fs::write(record, "torn")?)),
            ("a flipped bit", |record| {
                let mut bytes = fs::read(record)?;
                *bytes.last_mut().context("bytes")? ^= 1;
                Ok(fs::write(record, bytes)?)
            }),
            ("gone", |record| Ok(fs::remove_file(record)?)),
            ("empty", |record| Ok(fs::write(record, "")?)),
        ];
        for (how, damage) in damages {
            for (record, copy) in records(daemon, &pod, &main) {
                let before = fs::read(&record)?;
                daemon.kill()?;
                damage(&record)?;
                daemon.start_again()?;
                are_as_before(&pod, &main, pid).with_context(|| format!("{how}: {}", record.display()))?;
                assert_eq!(fs::read(&record)?, before, "{how}: it was written again");
                // And the other way round.
                daemon.kill()?;
                damage(&copy)?;
                daemon.start_again()?;
                are_as_before(&pod, &main, pid)?;
                assert_eq!(fs::read(&copy)?, before, "{how}: the copy was written again");
            }
        }
        ensure!(daemon.root().join("quarantine").read_dir()?.next().is_some(), "a person can look at them");
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn a_pod_and_a_container_whose_records_are_lost_with_their_copies_have_owners_that_can_be_removed()
-> Result<()> {
    rootful(|daemon| {
        daemon.pod("first")?.remove()?;
        let census = Census::take(daemon)?.without_the_daemon();
        for share_pid in [false, true] {
            let config = daemon.pod_config("web");
            let pod = if share_pid {
                daemon.pod_of(berth_tests::pod::sharing_pod(config))?
            } else {
                daemon.pod_of(config)?
            };
            let labelled = |name: &str| {
                let mut config = idle(name);
                if share_pid {
                    config = berth_tests::pod::sharing(config);
                }
                for (label, value) in [("name", "web"), ("namespace", "default"), ("uid", "uid-of-web")] {
                    config.labels.insert(format!("io.kubernetes.pod.{label}"), value.to_owned());
                }
                config
            };
            let (main, other) = (pod.start(labelled("main"))?, pod.start(labelled("other"))?);
            let pid = main.pid()?;
            daemon.kill()?;
            let [(pods_record, pods_copy), (record, copy)] = records(daemon, &pod, &main);
            fs::remove_dir_all(pods_record.parent().context("a directory")?)?;
            fs::remove_file(pods_copy)?;
            fs::write(&record, "torn")?;
            fs::remove_file(copy)?;
            daemon.start_again()?;
            let listed = daemon.client().sandboxes(v1::PodSandboxFilter::default())?;
            let [sandbox] = listed.as_slice() else { anyhow::bail!("{listed:?}") };
            let metadata = sandbox.metadata.clone().unwrap_or_default();
            assert_eq!(sandbox.id, pod.id);
            assert_eq!((metadata.name.as_str(), metadata.uid.as_str()), ("web", "uid-of-web"));
            assert_eq!(sandbox.state(), v1::PodSandboxState::SandboxNotready);
            for (container, name) in [(&main, "main"), (&other, "other")] {
                let status = container.status()?;
                assert_eq!(status.state(), v1::ContainerState::ContainerRunning, "{status:?}");
                assert_eq!(status.metadata.unwrap_or_default().name, name);
                assert_eq!(container.sh("echo alive")?, "alive\n");
            }
            assert_eq!(main.pid()?, pid);
            daemon.crash()?;
            assert_eq!(main.sh("echo alive")?, "alive\n");
            main.stop(5)?;
            assert_eq!(main.status()?.exit_code, 0);
            main.remove()?;
            pod.stop()?;
            assert_eq!(other.status()?.state(), v1::ContainerState::ContainerExited);
            pod.remove()?;
            for entry in daemon.root().join("quarantine").read_dir()? {
                fs::remove_file(entry?.path())?;
            }
            census.stays(daemon)?;
        }
        Ok(())
    })
}

#[test]
fn damaged_records_of_what_does_not_run_are_set_aside() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let (over, good) = (pod.idle("over")?, pod.idle("good")?);
        over.stop(0)?;
        daemon.kill()?;
        let [_, (record, copy)] = records(daemon, &pod, &over);
        fs::write(record, "torn")?;
        fs::remove_file(copy)?;
        daemon.start_again()?;
        assert_eq!(over.status().err().context("nobody knows it any more")?.code(), Code::NotFound);
        assert_eq!(good.sh("echo alive")?, "alive\n");
        ensure!(daemon.root().join("quarantine").join(&over.id).join("upper").exists(), "with its files");
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn a_record_of_a_newer_version_is_served_and_never_written() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        let pid = main.pid()?;
        daemon.kill()?;
        let mut newer = Vec::new();
        for (record, copy) in records(daemon, &pod, &main) {
            let bytes = fs::read(&record)?;
            let changed = String::from_utf8(bytes.clone())?.replacen("berth-record 1 ", "berth-record 2 ", 1);
            ensure!(changed.as_bytes() != bytes);
            for path in [&record, &copy] {
                fs::write(path, &changed)?;
            }
            newer.push((record, bytes, changed));
        }
        daemon.start_again()?;
        are_as_before(&pod, &main, pid)?;
        let refused = daemon.client().update_container_resources(v1::UpdateContainerResourcesRequest {
            container_id: main.id.clone(),
            linux: Some(v1::LinuxContainerResources { cpu_shares: 512, ..Default::default() }),
            ..Default::default()
        });
        let refused = refused.err().context("it would have to be written")?;
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        for (record, _, changed) in &newer {
            assert_eq!(fs::read(record)?, changed.as_bytes());
        }
        // The newer version again, as far as this build can stand in for it.
        daemon.kill()?;
        for (record, bytes, _) in &newer {
            fs::write(record, bytes)?;
        }
        daemon.start_again()?;
        are_as_before(&pod, &main, pid)?;
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn few_descriptors_at_the_start_end_nothing() -> Result<()> {
    const CONTAINERS: usize = 48;
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let containers: Vec<Container> =
            (0..CONTAINERS).map(|number| Ok(pod.idle(&format!("c{number}"))?)).collect::<Result<_>>()?;
        let pids = containers.iter().map(Container::pid).collect::<Result<Vec<_>>>()?;
        let all_run = || -> Result<()> {
            let listed = daemon.client().containers(v1::ContainerFilter::default())?;
            let running = listed.iter().filter(|one| one.state() == v1::ContainerState::ContainerRunning);
            assert_eq!((running.count(), listed.len()), (CONTAINERS, CONTAINERS));
            Ok(())
        };
        // Not enough for all, and cannot be raised.
        daemon.kill()?;
        daemon.start_under(&["prlimit", "--nofile=64:64"])?;
        all_run()?;
        let clients = (0..4).map(|_| UnixStream::connect(daemon.socket())).collect::<Result<Vec<_>, _>>()?;
        all_run()?;
        drop(clients);
        let [last, others @ ..] = containers.as_slice() else { anyhow::bail!("containers") };
        last.stop(0)?;
        assert_eq!(last.status()?.state(), v1::ContainerState::ContainerExited);
        last.remove()?;
        // A low soft limit is raised.
        daemon.kill()?;
        daemon.start_under(&["prlimit", "--nofile=64:4096"])?;
        let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid()?))?;
        let files = limits.lines().find(|line| line.starts_with("Max open files")).context("a limit")?;
        assert_eq!(files.split_whitespace().nth(3), Some("4096"), "{files}");
        for (container, pid) in others.iter().zip(&pids[1..]) {
            assert_eq!(container.pid()?, *pid);
            assert_eq!(container.sh("echo alive")?, "alive\n");
        }
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn lost_address_records_do_not_keep_the_daemon_from_starting_and_no_address_is_given_twice() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        let ip = pod.ip()?;
        let bridges: Vec<PathBuf> = daemon
            .root()
            .join("network")
            .read_dir()?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        let [directory] = bridges.as_slice() else { anyhow::bail!("{bridges:?}") };
        for emptied in [true, false] {
            daemon.kill()?;
            for entry in directory.read_dir()? {
                let path = entry?.path();
                if emptied { fs::write(path, "")? } else { fs::remove_file(path)? }
            }
            daemon.start_again()?;
            assert_eq!(main.sh("echo alive")?, "alive\n");
            assert_eq!(pod.ip()?, ip);
            assert_eq!(fs::read_to_string(directory.join(&ip))?, pod.id);
        }
        let other = daemon.pod("other")?;
        ensure!(other.ip()? != ip);
        other.remove()?;
        pod.remove()?;
        within(SOON, "all addresses are given back", || {
            Ok(directory.read_dir()?.next().is_none().then_some(()))
        })
    })
}

#[test]
fn limits_that_cannot_be_recorded_are_not_put_in_force() -> Result<()> {
    let setup = berth_tests::daemon::Setup {
        disk_bytes: Some(64 << 20),
        configuration: "[image]\nmin_free_bytes = 0\nmin_free_percent = 0\n",
        ..Default::default()
    };
    berth_tests::daemon::rootful_with(setup, |daemon| {
        let pod = daemon.pod("web")?;
        let mut config = idle("main");
        limit(
            &mut config,
            v1::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() },
        );
        let main = pod.start(config)?;
        let told = || -> Result<i64> {
            let resources = main.status()?.resources.unwrap_or_default().linux.unwrap_or_default();
            Ok(resources.memory_limit_in_bytes)
        };
        let update = || {
            daemon.client().update_container_resources(v1::UpdateContainerResourcesRequest {
                container_id: main.id.clone(),
                linux: Some(v1::LinuxContainerResources {
                    memory_limit_in_bytes: 128 << 20,
                    ..Default::default()
                }),
                ..Default::default()
            })
        };
        let filler = daemon.root().join("filler");
        let filling = fs::File::create(&filler).and_then(|mut file| {
            let block = vec![0; 1 << 12];
            loop {
                std::io::Write::write_all(&mut file, &block)?;
            }
        });
        let full: std::io::Result<()> = filling;
        ensure!(full.is_err());
        ensure!(update().is_err(), "there is no room for the record");
        assert_eq!((told()?, daemon.cgroup().memory_limit_bytes(&main.id)?), (64 << 20, 64 << 20));
        fs::remove_file(&filler)?;
        update()?;
        assert_eq!((told()?, daemon.cgroup().memory_limit_bytes(&main.id)?), (128 << 20, 128 << 20));
        daemon.crash()?;
        assert_eq!(told()?, 128 << 20);
        pod.remove()?;
        Ok(())
    })
}
