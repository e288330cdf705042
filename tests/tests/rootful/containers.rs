//! Containers: what the program gets, and how it ends.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::cri::image_spec;
use berth_tests::daemon::rootful;
use berth_tests::forge::{Image, Layer};
use berth_tests::pod::{container, idle, security, shell, volume, words};
use serde_json::json;
use tonic::Code;

fn variable(key: &str, value: &[u8]) -> v1::KeyValue {
    v1::KeyValue { key: key.to_owned(), value: value.to_vec() }
}

#[test]
fn arguments_environment_and_directory_are_those_of_the_request() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let mut config = container("main", &["sh", "-c", "pwd; env; for a; do echo \"<$a>\"; done", "name"]);
        config.args = words(&["one two", "", "*", "ü", "-x"]);
        config.envs =
            vec![variable("GREETING", b"good morning"), variable("EMPTY", b""), variable("A", b"b=c")];
        config.working_dir = "/www".to_owned();
        let said = pod.run_container(config)?.stdout;
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.first(), Some(&"/www"));
        for expected in
            ["GREETING=good morning", "EMPTY=", "A=b=c", "PATH=/bin", "HOSTNAME=web", "HOME=/root"]
        {
            assert!(lines.contains(&expected), "{expected} in {said}");
        }
        assert!(said.ends_with("<one two>\n<>\n<*>\n<ü>\n<-x>\n"), "{said}");
        assert!(!said.contains("BERTH") && !said.contains("RUST"), "nothing of the daemon's: {said}");
        Ok(())
    })
}

#[test]
fn a_working_directory_that_is_missing_is_made_for_the_user() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("cwd")?;
        let given = daemon.directory("volume")?;
        std::os::unix::fs::symlink("/srv/absent", given.join("link"))?;
        for (directory, shown) in
            [("/new/er", "/new/er"), ("/volume/link/x", "/srv/absent/x"), ("/www/a", "/www/a")]
        {
            let made = pod.script("pwd; stat -c '%u %a' . ..; stat -c %u /volume /www", |config| {
                config.working_dir = directory.to_owned();
                config.mounts = vec![volume(&given, "/volume")];
                security(config).run_as_user = Some(v1::Int64Value { value: 33 });
            })?;
            let above = if directory == "/www/a" { "0 755" } else { "33 755" };
            assert_eq!(made, format!("{shown}\n33 755\n{above}\n0\n0\n"), "{directory}");
        }
        Ok(())
    })
}

#[test]
fn what_the_request_leaves_out_comes_from_the_image() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("image")?;
        Image::demo()?
            .with("Entrypoint", json!(["echo", "entry"]))
            .with("Cmd", json!(["of", "image"]))
            .with("WorkingDir", json!("/made/for/this"))
            .with("Env", json!(["PATH=/bin", "FROM=image", "BOTH=image"]))
            .write_layout(&directory, "localhost/entry:latest")?;
        daemon.client().import(&directory)?;
        let pod = daemon.pod("web")?;
        let run = |name: &str, command: &[&str], args: &[&str]| -> Result<String> {
            let mut config = container(name, command);
            config.args = words(args);
            config.image = Some(image_spec("localhost/entry"));
            config.envs = vec![variable("BOTH", b"request")];
            Ok(pod.run_container(config)?.stdout)
        };
        assert_eq!(run("both", &[], &[])?, "entry of image\n");
        assert_eq!(run("args", &[], &["args"])?, "entry args\n");
        assert_eq!(run("command", &["echo", "command"], &[])?, "command\n", "Cmd goes with Entrypoint");
        let seen = run("sh", &["sh", "-c", "pwd; echo $FROM $BOTH"], &[])?;
        assert_eq!(seen, "/made/for/this\nimage request\n");
        Ok(())
    })
}

#[test]
fn an_image_without_a_command_needs_one() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("image")?;
        Image::demo()?.with("Cmd", json!(null)).write_layout(&directory, "localhost/none:latest")?;
        daemon.client().import(&directory)?;
        let mut config = container("main", &[]);
        config.image = Some(image_spec("localhost/none"));
        let refused = daemon.pod("web")?.create(config).err().context("refused")?;
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("no command"), "{refused}");
        Ok(())
    })
}

#[test]
fn a_program_that_cannot_be_started_is_told_with_the_code_of_a_shell() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("image")?;
        let layer = Layer::of_files(&[("plain", b"not a program, and not executable")]);
        Image::demo()?.on_top(layer).write_layout(&directory, "localhost/plain:latest")?;
        daemon.client().import(&directory)?;
        let pod = daemon.pod("web")?;
        for (command, code) in
            [("no-such-program", 127), ("/no/such/program", 127), ("/plain", 126), ("/etc", 126)]
        {
            let name = format!("c{}", command.replace('/', "-"));
            let mut config = container(&name, &[command]);
            config.image = Some(image_spec("localhost/plain"));
            let main = pod.create(config)?;
            let refused = main.start().err().with_context(|| format!("{command} cannot be started"))?;
            assert!(refused.message().contains(command), "{command}: {refused}");
            let status = main.status()?;
            assert_eq!(status.state(), v1::ContainerState::ContainerExited, "{command}");
            assert_eq!(
                (status.exit_code, status.reason.as_str()),
                (code, "StartError"),
                "{command}: {status:?}"
            );
            assert!(status.message.contains(command), "{command}: {}", status.message);
            assert!(status.finished_at > 0 && status.started_at == 0, "{command}: {status:?}");
            main.remove()?;
        }
        Ok(())
    })
}

#[test]
fn statuses_follow_the_life_of_a_container() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.create(shell("main", "while [ ! -e /tmp/end ]; do sleep 0.1; done; exit 3"))?;
        let created = main.status()?;
        assert_eq!(created.state(), v1::ContainerState::ContainerCreated);
        assert!(created.created_at > 1_600_000_000_000_000_000);
        assert_eq!((created.started_at, created.finished_at, created.exit_code), (0, 0, 0));
        assert_eq!(created.reason, "");
        let image = daemon.client().image(berth_tests::daemon::IMAGE)?.context("the image")?;
        assert_eq!(created.image_id, image.id);
        assert_eq!(created.image.map(|image| image.image), Some(berth_tests::daemon::IMAGE.to_owned()));
        assert!(!created.image_ref.is_empty());
        assert_eq!(created.log_path, main.log_path.to_string_lossy());

        main.start()?;
        let running = main.status()?;
        assert_eq!(running.state(), v1::ContainerState::ContainerRunning);
        assert_eq!(running.created_at, created.created_at);
        assert!(running.started_at >= running.created_at && running.finished_at == 0, "{running:?}");
        let again = main.start().err().context("a second start is refused")?;
        assert_eq!(again.code(), Code::FailedPrecondition, "{again}");

        main.call_off("/tmp/end");
        let ended = main.ended()?.status;
        assert_eq!(ended.started_at, running.started_at);
        assert!(ended.finished_at >= ended.started_at, "{ended:?}");
        assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
        assert_eq!(pod.run_container(shell("good", "exit 0"))?.status.reason, "Completed");
        let killed = pod.run_container(shell("killed", "kill -9 $$"))?.status;
        // Process 1 of a namespace ignores signals from inside that it does not handle, even this
        // one.
        assert_eq!((killed.exit_code, killed.reason.as_str()), (0, "Completed"));
        Ok(())
    })
}

#[test]
fn a_container_that_is_killed_from_outside_has_the_code_of_its_signal() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        for (signal, number) in [(nix::sys::signal::SIGKILL, 9), (nix::sys::signal::SIGTERM, 15)] {
            let name = format!("killed-by-{number}");
            // Only in its own pid namespace is a program without a handler safe from signals.
            let main = pod.start(container(&name, &["sh", "-c", "trap - TERM; sleep 1000"]))?;
            let pid = main.pid()?;
            if number == 15 {
                // The kernel drops SIGTERM for a process 1 that does not handle it, from wherever
                // it comes.
                main.stop(0)?;
                assert_eq!(main.ended()?.status.exit_code, 137);
                continue;
            }
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)?;
            let status = main.ended()?.status;
            assert_eq!((status.exit_code, status.reason.as_str()), (128 + number, "Error"), "{status:?}");
        }
        Ok(())
    })
}

#[test]
fn volumes_are_writable_or_not_as_asked_down_to_what_is_mounted_in_them() -> Result<()> {
    rootful(|daemon| {
        let given = daemon.directory("volume")?;
        fs::write(given.join("file"), "from the host\n")?;
        let inner = daemon.directory("volume/inner")?;
        nix::mount::mount(Some("inner"), &inner, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)?;
        let pod = daemon.pod("web")?;
        let seen = pod.script(
            "cat /rw/file /ro/file\n\
             echo rw > /rw/made && echo inner > /rw/inner/made\n\
             for f in /ro/x /rro/x /rro/inner/x; do touch $f 2>/dev/null && echo wrote $f; done\n\
             touch /ro/inner/allowed && echo recursive is asked for apart",
            |config| {
                config.mounts = vec![
                    volume(&given, "/rw"),
                    v1::Mount { readonly: true, ..volume(&given, "/ro") },
                    v1::Mount { readonly: true, recursive_read_only: true, ..volume(&given, "/rro") },
                ];
            },
        );
        let made = fs::read_to_string(given.join("made"));
        let inner_made = fs::read_to_string(inner.join("made"));
        nix::mount::umount2(&inner, nix::mount::MntFlags::MNT_DETACH)?;
        assert_eq!(seen?, "from the host\nfrom the host\nrecursive is asked for apart\n");
        assert_eq!((made?.as_str(), inner_made?.as_str()), ("rw\n", "inner\n"));
        Ok(())
    })
}

#[test]
fn mounts_are_reported_and_a_file_of_the_kubelets_wins_over_ours() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("volume")?;
        for (name, content) in [("hosts", "1.2.3.4 kubelet\n"), ("termination-log", "")] {
            fs::write(directory.join(name), content)?;
            fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o666))?;
        }
        let mounts = vec![
            volume(&directory.join("hosts"), "/etc/hosts"),
            volume(&directory.join("termination-log"), "/dev/termination-log"),
        ];
        let mut config = shell("main", "cat /etc/hosts; echo because > /dev/termination-log; exit 2");
        config.mounts = mounts.clone();
        let ended = daemon.pod("web")?.run_container(config)?;
        assert_eq!(ended.stdout, "1.2.3.4 kubelet\n");
        assert_eq!(ended.status.mounts, mounts);
        assert_eq!(fs::read_to_string(directory.join("termination-log"))?, "because\n");
        Ok(())
    })
}

#[test]
fn a_terminal_is_one_when_asked_for() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let mut config =
            shell("tty", "tty; echo $TERM; echo to stderr >&2; test -t 0 -a -t 1 -a -t 2 && echo all");
        config.tty = true;
        let ended = pod.run_container(config)?;
        assert_eq!(ended.stderr, "", "a terminal has one stream");
        let lines: Vec<&str> = ended.stdout.lines().collect();
        ensure!(
            matches!(lines[..], [tty, "xterm", "to stderr", "all"] if tty.starts_with("/dev/")),
            "{:?}",
            ended.stdout
        );
        let plain = pod.script("test -t 1 && echo terminal; echo $TERM; readlink /proc/self/fd/0", |_| {})?;
        assert_eq!(plain, "\n/dev/null\n");
        Ok(())
    })
}

#[test]
fn standard_input_stays_open_when_asked_for() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let mut config = container("main", &["sh", "-c", "echo begin; cat; echo end"]);
        config.stdin = true;
        let main = pod.start(config)?;
        main.says("begin\n")?;
        main.sh("true")?;
        let status = main.status()?;
        assert_eq!(status.state(), v1::ContainerState::ContainerRunning, "{status:?}");
        main.stop(0)?;
        let ended = pod.run_container(container("other", &["sh", "-c", "echo begin; cat; echo end"]))?;
        assert_eq!(ended.stdout, "begin\nend\n");
        Ok(())
    })
}

#[test]
fn containers_do_not_see_each_others_files_and_processes() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let first = pod.idle("first")?;
        let second = pod.idle("second")?;
        first.sh("echo secret > /tmp/secret; echo changed > /etc/passwd")?;
        assert_eq!(second.sh("ls /tmp; grep -c root /etc/passwd")?, "1\n");
        assert_eq!(second.sh("ps -o args | grep -c '^[s]leep 1000$'")?, "1\n");
        Ok(())
    })
}

#[test]
fn a_container_is_made_again_under_the_next_attempt_while_the_first_is_kept() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let first = pod.create(idle("main"))?;
        let refused = pod.create(idle("main")).err().context("refused")?;
        assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
        let mut next = idle("main");
        next.metadata.get_or_insert_default().attempt = 1;
        let second = pod.start(next)?;
        assert_ne!(first.id, second.id);
        first.remove()?;
        first.remove()?;
        assert_eq!(second.status()?.state(), v1::ContainerState::ContainerRunning);
        second.remove()?;
        pod.create(idle("main"))?;
        Ok(())
    })
}

#[test]
fn a_read_only_root_is_one() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let given = daemon.directory("volume")?;
        let seen = pod.script(
            "for f in /x /etc/x /tmp/x; do touch $f 2>/dev/null && echo wrote $f; done\n\
             echo x 2>/dev/null > /etc/resolv.conf && echo wrote resolv.conf\n\
             touch /volume/x && touch /dev/shm/x && echo volumes are not meant",
            |config| {
                security(config).readonly_rootfs = true;
                config.mounts = vec![volume(&given, "/volume")];
            },
        )?;
        assert_eq!(seen, "volumes are not meant\n");
        Ok(())
    })
}
