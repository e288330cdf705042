//! Cgroups that cannot be changed or removed as they should: what is reported, and what happens to
//! them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_tests::cgroup::{Cgroup, Driver};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::fuse::{Hanging, with_unkillable};
use berth_tests::pod::{Container, idle, limit, security, sharing, sharing_pod, volume};
use berth_tests::skip::skip;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

const MIB: i64 = 1 << 20;

/// A file that cannot be written, and reads as the kernel's content.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn make(path: &Path) -> Result<Self> {
        let same: Option<&str> = None;
        mount(Some(path), path, same, MsFlags::MS_BIND, same).context("mounting a file on itself")?;
        let made = Self(path.to_owned());
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(same, path, same, flags, same).context("making it read-only")?;
        Ok(made)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// An empty directory, removed even after a failure.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn change(
    daemon: &Daemon,
    main: &Container,
    linux: v1::LinuxContainerResources,
) -> Result<(), tonic::Status> {
    let request = v1::UpdateContainerResourcesRequest {
        container_id: main.id.clone(),
        linux: Some(linux),
        ..Default::default()
    };
    daemon.client().update_container_resources(request).map(|_| ())
}

fn reported(main: &Container) -> Result<v1::LinuxContainerResources> {
    main.status()?.resources.and_then(|resources| resources.linux).context("limits")
}

#[test]
fn limits_that_are_half_changed_are_reported_as_the_kernel_has_them() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("limits")?;
        let mut config = idle("main");
        let first = v1::LinuxContainerResources {
            cpu_shares: 512,
            cpu_quota: 20_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 * MIB,
            ..Default::default()
        };
        limit(&mut config, first);
        let main = pod.start(config)?;
        let cgroup = daemon.cgroup();
        let file = |controller: &str, file: &str| -> Result<PathBuf> {
            let directories = cgroup.below(&main.id);
            let root = cgroup.directory(controller)?;
            let directory = directories.iter().find(|found| found.starts_with(&root)).context("a cgroup")?;
            Ok(directory.join(file))
        };
        let unified = cgroup.is_unified();
        let shares = file("cpu", if unified { "cpu.weight" } else { "cpu.shares" })?;
        // Written after the shares, and not read before.
        let behind = file("memory", if unified { "memory.swap.max" } else { "memory.limit_in_bytes" })?;
        let Some(hanging) = Hanging::mount_on_file(&behind)? else {
            skip("cgroups::limits_that_are_half_changed", "no FUSE here");
            return Ok(());
        };
        let before = fs::read_to_string(&shares)?;
        let next = v1::LinuxContainerResources {
            cpu_shares: 2048,
            cpu_quota: 40_000,
            memory_limit_in_bytes: 128 * MIB,
            ..Default::default()
        };
        let refused = std::thread::scope(|scope| {
            let changing = scope.spawn(|| change(daemon, &main, next.clone()));
            within(SOON, "the shares are written", || {
                Ok((fs::read_to_string(&shares)? != before).then_some(()))
            })?;
            // The next limit blocks. From now on the shares cannot be rolled back.
            let read_only = ReadOnly::make(&shares)?;
            drop(hanging);
            let refused = changing.join().map_err(|_| anyhow!("the thread panicked"))?;
            drop(read_only);
            refused.err().context("the second limit was refused")
        })?;
        ensure!(refused.message().contains("partly changed"), "{refused}");
        let look = || -> Result<()> {
            let now = reported(&main)?;
            assert_eq!((now.cpu_shares, now.cpu_quota), (2048, 20_000));
            assert_eq!(now.memory_limit_in_bytes, 64 * MIB);
            assert_eq!(cgroup.memory_limit_bytes(&main.id)?, 64 << 20);
            Ok(())
        };
        look()?;
        daemon.crash()?;
        look()?;
        change(daemon, &main, next)?;
        assert_eq!(reported(&main)?.memory_limit_in_bytes, 128 * MIB);
        Ok(())
    })
}

#[test]
fn cgroups_of_what_nobody_knows_any_more_go_below_the_cgroups_of_pods_too() -> Result<()> {
    rootful(|daemon| {
        let name = format!("berth-test-orphans{}", std::process::id());
        let parent = Cgroup::create_by(Driver::of_the_environment()?, &name)?;
        let mut config = sharing_pod(daemon.pod_config("lost"));
        config.linux.get_or_insert_default().cgroup_parent = parent.path();
        let pod = daemon.pod_of(config.clone())?;
        let main = pod.start(sharing(idle("main")))?;
        config.metadata.get_or_insert_default().name = "stays".to_owned();
        let stays = daemon.pod_of(config)?;
        let shim = main.shim_pid()?;
        daemon.kill()?;
        kill(Pid::from_raw(shim), Signal::SIGKILL)?;
        for (kind, id) in [("sandboxes", &pod.id), ("containers", &main.id)] {
            fs::remove_dir_all(daemon.root().join(kind).join(id)).context("removing a record")?;
            fs::remove_file(daemon.state().join(kind).join(id).join("record")).context("and its copy")?;
        }
        // Another program's, with a name like ours.
        let strangers = parent.directory("memory")?.join("5".repeat(64));
        fs::create_dir(&strangers)?;
        ensure!(!parent.below(&pod.id).is_empty() && !parent.below(&main.id).is_empty(), "they were there");
        daemon.start_again()?;
        within(SOON, "the cgroups are gone", || {
            Ok((parent.below(&pod.id).is_empty() && parent.below(&main.id).is_empty()).then_some(()))
        })?;
        ensure!(strangers.is_dir(), "a stranger's cgroup was removed");
        ensure!(!parent.below(&stays.id).is_empty(), "the cgroup of a pod was removed");
        let known = daemon.client().pod_sandbox_status(v1::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        });
        assert_eq!(known.err().map(|status| status.code()), Some(Code::NotFound));
        stays.remove()?;
        fs::remove_dir(strangers)?;
        Ok(())
    })
}

/// critest and users of crictl name one that nothing has created, as the other runtimes allow.
#[test]
fn a_cgroup_parent_that_does_not_exist_is_created() -> Result<()> {
    rootful(|daemon| {
        let name = format!("berth-test-missing{}", std::process::id());
        let parent = Cgroup::create_by(Driver::of_the_environment()?, &name)?;
        parent.remove();
        let mut config = sharing_pod(daemon.pod_config("missing"));
        config.linux.get_or_insert_default().cgroup_parent = parent.path();
        let pod = daemon.pod_of(config)?;
        let mut main = sharing(idle("main"));
        limit(
            &mut main,
            v1::LinuxContainerResources { memory_limit_in_bytes: 64 * MIB, ..Default::default() },
        );
        let main = pod.start(main)?;
        assert_eq!(parent.memory_limit_bytes(&main.id)?, 64 << 20);
        pod.remove()?;
        ensure!(parent.below(&main.id).is_empty(), "the container's cgroup is left");
        Ok(())
    })
}

#[test]
fn a_process_that_cannot_be_ended_loses_the_network_of_its_pod() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("hanging")?;
        let Some(hanging) = Hanging::mount(&directory)? else {
            skip("cgroups::a_process_that_cannot_be_ended", "no FUSE here");
            return Ok(());
        };
        // Its end would wait for that of all others in a pid namespace of its own.
        let host_pids = v1::NamespaceOption { pid: v1::NamespaceMode::Node.into(), ..Default::default() };
        let mut config = daemon.pod_config("web");
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().namespace_options = Some(host_pids.clone());
        let pod = daemon.pod_of(config)?;
        let mut config = idle("main");
        security(&mut config).namespace_options = Some(host_pids);
        config.mounts = vec![volume(&directory, "/volume")];
        let main = pod.start(config)?;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| main.exec(&["cat", "/volume/name"]));
            let hangs = within(SOON, "a process waits and cannot be killed", || {
                let processes = daemon.cgroup().read("memory", &main.id, "cgroup.procs")?;
                Ok(processes.lines().map(str::to_owned).find(|pid| {
                    fs::read_to_string(format!("/proc/{pid}/status"))
                        .is_ok_and(|status| status.lines().any(|line| line.starts_with("State:\tD")))
                }))
            })?;
            let interfaces = || -> Result<String> {
                let net = format!("--net=/proc/{hangs}/ns/net");
                let found = Command::new("nsenter").args([&net, "cat", "/proc/self/net/dev"]).output()?;
                ensure!(found.status.success(), "{found:?}");
                Ok(String::from_utf8(found.stdout)?)
            };
            ensure!(interfaces()?.contains("eth0"), "it has the pod's network");
            let stopped = pod.stop();
            let lost = within(SOON, "the process has no interface any more", || {
                Ok((!interfaces()?.contains("eth0")).then_some(()))
            });
            drop(hanging);
            let _ = waiting.join();
            stopped?;
            lost?;
            within(SOON, "the cgroup is removed", || {
                Ok(daemon.cgroup().below(&main.id).is_empty().then_some(()))
            })
        })
    })
}

#[test]
fn what_a_container_makes_in_its_cgroup_is_not_taken_for_a_container() -> Result<()> {
    rootful(|daemon| {
        let name = format!("berth-test-forged{}", std::process::id());
        let parent = Cgroup::create_by(Driver::of_the_environment()?, &name)?;
        let mut config = daemon.pod_config("lost");
        config.linux.get_or_insert_default().cgroup_parent = parent.path();
        let lost = daemon.pod_of(config.clone())?;
        config.metadata.get_or_insert_default().name = "stays".to_owned();
        let main = daemon.pod_of(config)?.idle("main")?;
        // A container that may mount cgroups, and has root's privileges, could do this.
        let memory = parent.directory("memory")?;
        let own = parent.below(&main.id).into_iter().find(|found| found.starts_with(&memory));
        let forged = own.context("the container's cgroup")?.join("6".repeat(64));
        fs::create_dir(&forged)?;
        let _forged = Made(forged.clone());
        let mark = |path: &Path| -> Result<bool> {
            let mut setfattr = Command::new("setfattr");
            setfattr.args(["--name", "trusted.berth.root", "--value"]).arg(daemon.root()).arg(path);
            match setfattr.status() {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
                other => Ok(other?.success()),
            }
        };
        if !mark(&forged)? {
            skip("cgroups::what_a_container_makes_in_its_cgroup", "no setfattr here");
            return Ok(());
        }
        daemon.kill()?;
        fs::remove_dir_all(daemon.root().join("sandboxes").join(&lost.id)).context("removing a record")?;
        let state = daemon.state().join("sandboxes").join(&lost.id);
        fs::remove_file(state.join("record")).context("and its copy")?;
        daemon.start_again()?;
        // What belongs to no record has been removed, cgroups first.
        within(SOON, "what is left of the lost pod is gone", || Ok((!state.exists()).then_some(())))?;
        ensure!(parent.below(&lost.id).is_empty(), "the cgroup of the lost pod is there");
        ensure!(forged.is_dir(), "a cgroup that a container had made was removed");
        fs::remove_dir(&forged)?;
        main.status().map_err(Into::into).map(|_| ())
    })
}

#[test]
fn the_cgroup_of_a_container_that_has_ended_goes_with_its_last_process_however_late_that_ends() -> Result<()>
{
    rootful(|daemon| {
        with_unkillable(daemon, "cgroups::the_cgroup_of_a_container_that_has_ended", |main, hanging| {
            kill(Pid::from_raw(main.pid()?), Signal::SIGTERM)?;
            main.ended()?;
            within(2 * SOON, "the daemon has given up waiting for it", || {
                Ok(daemon
                    .log()?
                    .contains("cannot remove the cgroup of a container; trying again")
                    .then_some(()))
            })?;
            drop(hanging);
            within(SOON, "the cgroup is removed, though the container is not", || {
                Ok(daemon.cgroup().below(&main.id).is_empty().then_some(()))
            })?;
            main.status().map_err(Into::into).map(|_| ())
        })
    })
}
