//! A container that keeps the directories of its own cgroup locked: whoever looks for a file in one
//! that the kernel has not in memory, or removes it, waits and cannot be killed. That is neither
//! the daemon nor the shim's loop.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use berth_cri::v1;
use berth_tests::census::{children, status_field};
use berth_tests::cgroup::Driver;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::held::{Call, GETDENTS64, GIVEN_UP, OPEN, held_children, waits_in};
use berth_tests::pod::{Container, Pod, container, security, sharing, sharing_pod, volume};
use berth_tests::skip::skip;
use tonic::Code;

use super::held_paths::serves;

/// Lists each directory of its cgroup, by a child for each, into a page that is to be served by who
/// does not: by mmap(2), userfaultfd(2), ioctl_userfaultfd(2) and getdents64(2). The directory is
/// locked until the page is there or the child is killed. With an argument it has each child wait
/// for a directory to be unlocked, to create something, which it may not: then nobody else gets the
/// lock.
const HOLD: &str = "
my $top = '/sys/fs/cgroup';
my @directories = -e \"$top/cgroup.controllers\" ? ($top) : grep { -d $_ && ! -l $_ } glob \"$top/*\";
for my $directory (@directories) {
    next if fork;
    if (@ARGV) { syscall(2, \"$directory/new\", 0101, 0600); exit; }
    my $page = syscall(9, 0, 4096, 3, 0x22, -1, 0);
    my $faults = syscall(323, 0);
    my $version = pack('QQQ', 0xaa, 0, 0);
    syscall(16, $faults, 0xc018aa3f, $version) == 0 or die \"userfaultfd: $!\";
    my $range = pack('QQQQ', $page, 4096, 1, 0);
    syscall(16, $faults, 0xc020aa00, $range) == 0 or die \"userfaultfd: $!\";
    syscall(217, syscall(2, $directory, 0200000), $page, 4096);
    exit;
}
sleep 100000;
";

/// Moves to a cgroup below its own and enables controllers there, as systemd does in a pod, so that
/// programs of exec have to find the way. Holds its own, has another wait to create something in
/// there, and has the kernel forget the names of cgroups: by memory.reclaim.
const MANAGE: &str = "
sub put { open my $file, '>', $_[0] or die \"$_[0]: $!\"; print $file $_[1]; close $file or die \"$_[0]: $!\"; }
sub is_in { open my $file, '<', \"/proc/$_[0]/syscall\" or return 0; return <$file> =~ /^$_[1] /; }
sub until_in { until (is_in(@_)) { select undef, undef, undef, 0.01; } }
open my $list, '<', '/proc/self/cgroup';
my ($path) = map { /^0::(.*)/ } <$list>;
my $own = \"/sys/fs/cgroup$path\";
mkdir \"$own/below\" or die \"mkdir: $!\";
put(\"$own/below/cgroup.procs\", $$);
open my $controllers, '<', \"$own/cgroup.controllers\";
put(\"$own/cgroup.subtree_control\", \"+$_\") for split ' ', <$controllers>;
open my $reclaim, '>', \"$own/memory.reclaim\" or die \"memory.reclaim: $!\";
my $holder = fork;
if (!$holder) {
    my $page = syscall(9, 0, 4096, 3, 0x22, -1, 0);
    my $faults = syscall(323, 0);
    my $version = pack('QQQ', 0xaa, 0, 0);
    syscall(16, $faults, 0xc018aa3f, $version) == 0 or die \"userfaultfd: $!\";
    my $range = pack('QQQQ', $page, 4096, 1, 0);
    syscall(16, $faults, 0xc020aa00, $range) == 0 or die \"userfaultfd: $!\";
    syscall(217, syscall(2, $own, 0200000), $page, 4096);
    exit;
}
until_in($holder, 217);
my $waiting = fork;
if (!$waiting) { syscall(2, \"$own/new\", 0101, 0600); exit; }
until_in($waiting, 2);
syswrite $reclaim, '1G' for 1 .. 20;
$| = 1;
print \"held\\n\";
sleep 100000;
";

/// A container that keeps its cgroup locked.
struct Holder {
    pod: Pod,
    main: Container,
    children: Vec<i32>,
    waiting: Call<()>,
}

/// Whether a process is in this system call: proc_pid_syscall(5).
fn is_in(pid: i32, call: &str) -> bool {
    let inside = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    inside.split(' ').next() == Some(call)
}

/// A container that runs this in the node's Perl. `None` where that cannot be.
fn perl(script: &str) -> Result<Option<v1::ContainerConfig>> {
    if !Path::new("/usr/bin/perl").exists() || !Path::new("/proc/sys/vm/unprivileged_userfaultfd").exists() {
        skip("held_cgroups", "no userfaultfd or no /usr/bin/perl here");
        return Ok(None);
    }
    let mut config = container("holder", &["/usr/bin/perl", "-e", script]);
    let library = Path::new("/lib").canonicalize()?;
    let loader = Path::new("/lib64").canonicalize()?;
    for (from, to) in [(Path::new("/usr"), "/usr"), (&library, "/lib"), (&loader, "/lib64")] {
        config.mounts.push(v1::Mount { readonly: true, ..volume(from, to) });
    }
    Ok(Some(config))
}

impl Holder {
    /// `None` where that cannot be.
    fn start(
        daemon: &Daemon,
        pod: Pod,
        change: fn(v1::ContainerConfig) -> v1::ContainerConfig,
    ) -> Result<Option<Self>> {
        let Some(config) = perl(HOLD)? else { return Ok(None) };
        let mut config = change(config);
        // Who has a filesystem of its own mounted needs neither.
        let context = security(&mut config);
        context.capabilities.get_or_insert_default().add_capabilities.push("SYS_PTRACE".to_owned());
        context.seccomp = Some(v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::Unconfined.into(),
            ..Default::default()
        });
        let main = pod.start(config)?;
        let pid = main.pid()?;
        let held = within(SOON, "it holds its cgroup", || {
            let children = children(pid)?;
            let all = !children.is_empty() && children.iter().all(|child| is_in(*child, GETDENTS64));
            Ok(all.then_some(children))
        })?;
        let (client, id) = (daemon.client(), main.id.clone());
        let waiting = Call::begin(move || {
            let cmd = ["/usr/bin/perl", "-e", HOLD, "wait"].map(str::to_owned).to_vec();
            client.exec_sync(v1::ExecSyncRequest { container_id: id, cmd, timeout: 0 }).map(drop)
        });
        let shim = main.shim_pid()?;
        within(SOON, "others wait for it", || {
            let waiting = children(shim)?.into_iter().flat_map(|exec| children(exec).unwrap_or_default());
            Ok((waiting.filter(|pid| waits_in(*pid, OPEN)).count() >= held.len()).then_some(()))
        })?;
        Ok(Some(Self { pod, main, children: held, waiting }))
    }

    fn holds(&self) -> bool {
        self.children.iter().all(|child| is_in(*child, GETDENTS64))
    }
}

/// That none of its processes is there any more, and none of its cgroups either.
fn is_gone(daemon: &Daemon, holder: Holder) -> Result<()> {
    let Holder { main, children, waiting, .. } = holder;
    // It ended with the container.
    let _ = waiting.answer()?;
    for child in children {
        ensure!(status_field(child, "State").is_none_or(|state| state.starts_with('Z')), "{child} is there");
    }
    within(SOON, "its cgroup is gone", || Ok(daemon.cgroup().below(&main.id).is_empty().then_some(())))
}

fn stats(daemon: &Daemon, id: &str) -> Call<v1::ContainerStatsResponse> {
    let (client, container_id) = (daemon.client(), id.to_owned());
    Call::begin(move || client.container_stats(v1::ContainerStatsRequest { container_id }))
}

#[test]
fn a_cgroup_that_its_container_holds_keeps_no_daemon_and_no_shim_waiting() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("other")?;
        let other = pod.idle("other")?;
        let Some(holder) = Holder::start(daemon, daemon.pod("hostile")?, |config| config)? else {
            return Ok(());
        };

        let asked = stats(daemon, &holder.main.id);
        within(SOON, "a child of the daemon waits", || Ok((held_children(daemon)? > 0).then_some(())))?;
        serves(daemon, "meanwhile", &other)?;
        let refused = asked.refused()?;
        ensure!(refused.message().contains("did not answer within"), "{refused:?}");
        // It is known now. The others have their numbers.
        let refused = stats(daemon, &holder.main.id).refused()?;
        ensure!(refused.message().contains("has not answered for"), "{refused:?}");
        let client = daemon.client();
        let all = Call::begin(move || client.list_container_stats(v1::ListContainerStatsRequest::default()));
        let all = all.answer()??.stats;
        let attributes = all.iter().filter_map(|stats| stats.attributes.as_ref());
        ensure!(attributes.map(|of| &of.id).any(|id| *id == other.id), "{all:?}");
        let update = v1::UpdateContainerResourcesRequest {
            container_id: holder.main.id.clone(),
            linux: Some(v1::LinuxContainerResources { cpu_shares: 512, ..Default::default() }),
            ..Default::default()
        };
        let client = daemon.client();
        Call::begin(move || client.update_container_resources(update)).refused()?;

        // The shim looks for the session of a command that takes too long.
        let (client, container_id) = (daemon.client(), holder.main.id.clone());
        let late = Call::begin(move || {
            let cmd = ["sh", "-c", "sleep 1000 & wait"].map(str::to_owned).to_vec();
            client.exec_sync(v1::ExecSyncRequest { container_id, cmd, timeout: 1 })
        });
        assert_eq!(late.refused()?.code(), Code::DeadlineExceeded);
        ensure!(holder.main.sh("echo alive")? == "alive\n");

        daemon.crash()?;
        ensure!(holder.holds(), "all the time");
        serves(daemon, "of-the-next", &other)?;
        stats(daemon, &holder.main.id).refused()?;
        daemon.stop()?;
        daemon.start_again()?;
        ensure!(holder.holds(), "all the time");
        serves(daemon, "of-the-third", &other)?;

        let (client, id) = (daemon.client(), holder.main.id.clone());
        let begin = Instant::now();
        Call::begin(move || client.stop(&id, 0)).answer()??;
        ensure!(begin.elapsed() < patience(GIVEN_UP), "{:?}", begin.elapsed());
        assert_eq!(holder.main.status()?.state(), v1::ContainerState::ContainerExited);
        holder.pod.remove()?;
        is_gone(daemon, holder)
    })
}

#[test]
fn processes_that_hold_their_cgroup_end_with_their_container_in_a_shared_pid_namespace() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("other")?;
        let other = pod.idle("other")?;
        let hostile = daemon.pod_of(sharing_pod(daemon.pod_config("hostile")))?;
        let Some(holder) = Holder::start(daemon, hostile, sharing)? else { return Ok(()) };

        // They do not end with the first process, and the lists of who is there are in what they
        // hold.
        let (client, id) = (daemon.client(), holder.main.id.clone());
        let begin = Instant::now();
        let stop = Call::begin(move || client.stop(&id, 0));
        serves(daemon, "meanwhile", &other)?;
        stop.answer()??;
        ensure!(begin.elapsed() < patience(GIVEN_UP), "{:?}", begin.elapsed());
        assert_eq!(holder.main.status()?.state(), v1::ContainerState::ContainerExited);
        holder.pod.remove()?;
        is_gone(daemon, holder)
    })
}

#[test]
fn a_container_that_holds_its_cgroup_keeps_only_the_program_waiting_that_enters_below() -> Result<()> {
    rootful(|daemon| {
        if !daemon.cgroup().is_unified() {
            skip("held_cgroups", "cgroup v1 allows processes in every cgroup");
            return Ok(());
        }
        if daemon.cgroup().driver() == Driver::Systemd {
            skip("held_cgroups", "systemd itself would wait for the directories of its scopes");
            return Ok(());
        }
        let Some(mut config) = perl(MANAGE)? else { return Ok(()) };
        let mut of_pod = daemon.pod_config("manages");
        of_pod.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let pod = daemon.pod_of(of_pod)?;
        security(&mut config).privileged = true;
        let main = pod.start(config)?;
        main.says("held")?;
        let shim = main.shim_pid()?;
        let (client, container_id) = (daemon.client(), main.id.clone());
        let enters = Call::begin(move || {
            let cmd = ["/usr/bin/perl", "-e", "1"].map(str::to_owned).to_vec();
            client.exec_sync(v1::ExecSyncRequest { container_id, cmd, timeout: 0 })
        });
        let waits = |pid: i32| status_field(pid, "State").is_some_and(|state| state.starts_with('D'));
        within(SOON, "the program waits on its way in", || {
            let waiting = children(shim)?.into_iter().filter(|pid| *pid != main.pid().unwrap_or(0));
            Ok(waiting.into_iter().any(waits).then_some(()))
        })?;
        ensure!(!waits(shim), "the shim waits");
        let (client, id) = (daemon.client(), main.id.clone());
        Call::begin(move || client.stop(&id, 0)).answer()??;
        assert_eq!(main.status()?.state(), v1::ContainerState::ContainerExited);
        let _ = enters.answer()?;
        pod.remove()?;
        within(SOON, "its cgroup is gone", || Ok(daemon.cgroup().below(&main.id).is_empty().then_some(())))
    })
}
