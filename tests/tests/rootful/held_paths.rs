//! Directories of the host whose locks a container holds: whoever makes something in one, or looks
//! for a name that is not in memory, waits in the kernel and cannot be killed. That is never the
//! daemon.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

use anyhow::{Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::forge::{Image, Layer};
use berth_tests::fuse::Hanging;
use berth_tests::held::{
    Call, GIVEN_UP, Holder, MKDIR, OPEN, Queued, held_children, reading_children, waits_in,
};
use berth_tests::pod::{Container, Pod, idle, volume};
use berth_tests::skip::skip;
use tonic::Code;

/// Creates a container of the pod `id` with a mount of `source`.
fn create(daemon: &Daemon, pod: &Pod, name: &str, source: &Path) -> Call<v1::CreateContainerResponse> {
    let mut config = idle(name);
    config.mounts = vec![volume(source, "/volume")];
    let request = v1::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(config),
        sandbox_config: Some(pod.config.clone()),
    };
    let client = daemon.client();
    Call::begin(move || client.create_container(request))
}

/// That the daemon makes pods, and does what it should for those that are there.
pub(super) fn serves(daemon: &Daemon, name: &str, other: &Container) -> Result<()> {
    let begin = Instant::now();
    let pod = daemon.pod(name)?;
    ensure!(pod.idle("main")?.sh("echo alive")? == "alive\n");
    ensure!(other.sh("echo alive")? == "alive\n");
    pod.remove()?;
    ensure!(begin.elapsed() < patience(GIVEN_UP), "{:?}", begin.elapsed());
    Ok(())
}

#[test]
fn a_directory_that_a_container_holds_keeps_no_other_pod_and_no_daemon_waiting() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("other")?;
        let other = pod.idle("other")?;
        let held = daemon.directory("held")?;
        let Some(holder) = Holder::start(daemon, daemon.pod_config("hostile"), &held)? else { return Ok(()) };

        let missing = held.join("missing");
        let first = create(daemon, &pod, "first", &missing);
        within(SOON, "a child of the daemon waits", || Ok((held_children(daemon)? > 0).then_some(())))?;
        serves(daemon, "meanwhile", &other)?;
        let begin = first.begin;
        let refused = first.refused()?;
        ensure!(begin.elapsed() < patience(GIVEN_UP), "{:?}", begin.elapsed());
        assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused:?}");
        for words in [&missing.to_string_lossy(), "did not answer within", "keeps", &held.to_string_lossy()] {
            ensure!(refused.message().contains(words), "{refused:?}");
        }
        // It is known now, and the next one does not wait.
        let refused = create(daemon, &pod, "first", &missing.join("below")).refused()?;
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        ensure!(refused.message().contains("has not answered for"), "{refused:?}");
        // What is in it already can be used.
        create(daemon, &pod, "second", &held).answer()??;
        serves(daemon, "afterwards", &other)?;

        let under_way = create(daemon, &pod, "third", &held.join("third"));
        within(SOON, "another child waits", || Ok((held_children(daemon)? > 1).then_some(())))?;
        daemon.crash()?;
        under_way.refused()?;
        ensure!(holder.holds(), "all the time");
        serves(daemon, "of-the-next", &other)?;

        let under_way = create(daemon, &pod, "fourth", &held.join("fourth"));
        within(SOON, "a child of the next one waits", || Ok((held_children(daemon)? > 0).then_some(())))?;
        daemon.stop()?;
        under_way.refused()?;
        daemon.start_again()?;
        ensure!(holder.holds(), "all the time");
        serves(daemon, "of-the-third", &other)?;

        holder.remove()?;
        within(SOON, "the directory is free", || Ok(create(daemon, &pod, "first", &missing).answer()?.ok()))?;
        ensure!(missing.is_dir());
        Ok(())
    })
}

#[test]
fn a_log_directory_that_a_container_holds_keeps_no_other_pod_and_no_daemon_waiting() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("other")?;
        let other = pod.idle("other")?;
        let config = daemon.pod_config("hostile");
        let held = Path::new(&config.log_directory).to_owned();
        std::fs::create_dir_all(&held)?;
        let Some(holder) = Holder::start(daemon, config.clone(), &held)? else { return Ok(()) };

        // The log directory of another pod is below it.
        let mut below = daemon.pod_config("below");
        below.log_directory = held.join("below").to_string_lossy().into_owned();
        let (client, request) = (
            daemon.client(),
            v1::RunPodSandboxRequest { config: Some(below), runtime_handler: String::new() },
        );
        let run = Call::begin(move || client.run_pod_sandbox(request));
        within(SOON, "a child of the daemon waits", || Ok((held_children(daemon)? > 0).then_some(())))?;
        serves(daemon, "meanwhile", &other)?;
        let refused = run.refused()?;
        assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused:?}");
        ensure!(refused.message().contains("below did not answer within"), "{refused:?}");

        // The log of another container is in it.
        let client = daemon.client();
        let mut container = idle("logs");
        container.log_path = "logs.log".to_owned();
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: holder.pod.id.clone(),
            config: Some(container),
            sandbox_config: Some(config),
        };
        let before = held_children(daemon)?;
        let under_way = Call::begin(move || client.create_container(request));
        within(SOON, "its writer waits", || Ok((held_children(daemon)? > before).then_some(())))?;
        serves(daemon, "beside-a-shim", &other)?;
        daemon.crash()?;
        under_way.refused()?;
        ensure!(holder.holds(), "all the time");
        serves(daemon, "of-the-next", &other)?;
        holder.remove()
    })
}

/// Has locked what a daemon locks, listens where a daemon listens, and waits for a held directory:
/// by open(2) and flock(2), and by mkdir(2), or by open(2) with `O_CREAT`.
const WAIT: &str = "
use Socket;
my ($path, $call, $socket, @locks) = @ARGV;
for my $lock (@locks) { syscall(73, syscall(2, $lock, 0), 6) == 0 or die $lock; }
if ($socket) {
    unlink $socket;
    socket(LISTENER, AF_UNIX, SOCK_STREAM, 0) and bind(LISTENER, pack_sockaddr_un($socket)) or die $!;
    listen(LISTENER, 8) or die $!;
}
$call == 2 ? syscall(2, $path, 0101, 0600) : syscall(83, $path, 0700);
";

/// A process in the place of a daemon, which waits in `call` for something to be made in `held`.
fn wait_in_place_of_a_daemon(call: &str, held: &Path, socket: &str, locks: &[PathBuf]) -> Result<Child> {
    let path = held.join(format!("by-{call}"));
    let mut command = Command::new("/usr/bin/perl");
    let child = command.args(["-e", WAIT]).arg(path).args([call, socket]).args(locks).spawn()?;
    let pid = i32::try_from(child.id())?;
    within(SOON, "it waits", || Ok(waits_in(pid, call).then_some(())))?;
    Ok(child)
}

#[test]
fn a_daemon_that_was_killed_and_cannot_end_gives_way_once_it_can_change_nothing() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("other")?;
        let other = pod.idle("other")?;
        let held = daemon.directory("held")?;
        let Some(holder) = Holder::start(daemon, daemon.pod_config("hostile"), &held)? else { return Ok(()) };
        daemon.stop()?;

        let socket = daemon.socket().to_string_lossy().into_owned();
        let root = daemon.root();
        let locks = [root.join("berthd.lock"), root.join("lock"), daemon.state()];
        let mut first = wait_in_place_of_a_daemon(MKDIR, &held, &socket, &locks)?;
        let refused = daemon.fail_to_start()?;
        let words = format!("another berthd uses {}: process {};", daemon.root().display(), first.id());
        ensure!(refused.contains(&words), "{refused}");
        first.kill()?;
        daemon.start_again()?;
        serves(daemon, "of-the-next", &other)?;
        // And so does the next one, for it cannot end still.
        daemon.crash()?;
        serves(daemon, "of-the-third", &other)?;
        ensure!(daemon.log()?.contains("took over from a daemon that was killed"));
        ensure!(first.try_wait()?.is_none(), "it has not ended");
        daemon.stop()?;

        let mut second = wait_in_place_of_a_daemon(OPEN, &held, "", &[daemon.root().join("containers")])?;
        second.kill()?;
        let refused = daemon.fail_to_start()?;
        let words = format!("process {}, which was killed but waits", second.id());
        ensure!(refused.contains(&words) && refused.contains("may still write"), "{refused}");

        let hostile = holder.let_go();
        for mut ended in [first, second] {
            within(SOON, "it ends", || Ok(ended.try_wait()?))?;
        }
        daemon.start_again()?;
        serves(daemon, "of-the-last", &other)?;
        hostile.remove()?;
        Ok(())
    })
}

#[test]
fn an_import_from_a_directory_that_a_container_holds_keeps_no_daemon_waiting() -> Result<()> {
    rootful(|daemon| {
        let other = daemon.pod("other")?.idle("other")?;
        let held = daemon.directory("held")?;
        let Some(holder) = Holder::start(daemon, daemon.pod_config("hostile"), &held)? else { return Ok(()) };
        let queued = Queued::start(&held)?;
        let (client, archive) = (daemon.client(), held.join("archive.tar"));
        let path = archive.clone();
        let import = Call::begin(move || client.import(&path));
        within(SOON, "a child of the daemon waits", || Ok((held_children(daemon)? > 0).then_some(())))?;
        serves(daemon, "meanwhile", &other)?;
        let refused = import.refused()?;
        assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused:?}");
        ensure!(refused.message().contains(&*archive.to_string_lossy()), "{refused:?}");
        daemon.stop()?;
        daemon.start_again()?;
        ensure!(holder.holds(), "all the time");
        drop(queued);
        holder.remove()
    })
}

#[test]
fn an_import_of_a_file_that_answers_no_read_keeps_no_daemon_waiting() -> Result<()> {
    rootful(|daemon| {
        let other = daemon.pod("other")?.idle("other")?;
        let archive = daemon.directory("archives")?.join("archive.tar");
        std::fs::write(&archive, "")?;
        let layout = daemon.directory("layout")?;
        let layer = Layer::of_files(&[("file", b"content")]);
        let blob = layout.join("blobs/sha256").join(layer.digest.trim_start_matches("sha256:"));
        Image::demo()?.on_top(layer).write_layout(&layout, "localhost/hanging:1")?;
        let (Some(_archive), Some(_layer)) =
            (Hanging::mount_on_file_to_read(&archive)?, Hanging::mount_on_file_to_read(&blob)?)
        else {
            skip("held", "no FUSE here");
            return Ok(());
        };
        let begin = || {
            [&archive, &layout].map(|path| {
                let (client, path) = (daemon.client(), path.clone());
                Call::begin(move || client.import(&path))
            })
        };
        let both_wait = || Ok((reading_children(daemon)? == 2).then_some(()));

        // More of them than a daemon can leave its directories to.
        for name in ["first", "second", "third", "fourth"] {
            let under_way = begin();
            within(SOON, "a child of the daemon waits for each", both_wait)?;
            serves(daemon, name, &other)?;
            daemon.crash()?;
            for import in under_way {
                import.refused()?;
            }
        }
        ensure!(!daemon.log()?.contains("took over"), "each daemon has ended");

        let [archived, laid_out] = begin();
        for (import, path) in [(archived, &archive), (laid_out, &blob)] {
            let refused = import.refused()?;
            assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused:?}");
            for words in [&*path.to_string_lossy(), "did not answer within"] {
                ensure!(refused.message().contains(words), "{refused:?}");
            }
        }
        // That is known now.
        for path in [&archive, &layout] {
            let refused = daemon.client().import(path).unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        }
        serves(daemon, "afterwards", &other)?;
        daemon.stop()?;
        daemon.start_again()?;
        serves(daemon, "of-the-last", &other)
    })
}
