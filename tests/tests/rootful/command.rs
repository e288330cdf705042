//! The `berth` command, end to end.

use std::process::{Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use berth_tests::daemon::{Daemon, IMAGE, SOON, Setup, programs, rootful};
use berth_tests::deadline::within;
use berth_tests::forge::{Image, Layer};
use berth_tests::registry::Registry;

fn run(daemon: &Daemon, arguments: &[&str]) -> Result<Output> {
    daemon.berth()?.args(arguments).output().context("running berth")
}

/// What it prints, when it ends with success.
fn says(daemon: &Daemon, arguments: &[&str]) -> Result<String> {
    let output = run(daemon, arguments)?;
    ensure!(output.status.success(), "berth {arguments:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn run_passes_on_streams_and_exit_code_and_removes_the_pod() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        let script = "echo out; echo err >&2; hostname; exit 7";
        let output = run(daemon, &["run", "--name", "job", "--log-dir", &logs, IMAGE, "sh", "-c", script])?;
        assert_eq!(output.status.code(), Some(7), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "out\njob\n");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "err\n");
        assert_eq!(says(daemon, &["ps", "--all", "--quiet"])?, "");
        assert_eq!(says(daemon, &["pods", "--quiet"])?, "");
        for (program, code) in [("no-such-program", 127), ("/etc/passwd", 126)] {
            let output = run(daemon, &["run", "--log-dir", &logs, IMAGE, program])?;
            assert_eq!(output.status.code(), Some(code), "{output:?}");
            assert!(String::from_utf8_lossy(&output.stderr).contains(program), "{output:?}");
        }
        assert_eq!(says(daemon, &["pods", "--quiet"])?, "");
        Ok(())
    })
}

#[test]
fn a_detached_pod_is_listed_read_entered_stopped_and_removed() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        let script =
            "trap 'echo bye; exit 0' TERM; i=0; while true; do i=$((i + 1)); echo line $i; sleep 0.05; done";
        let id = says(
            daemon,
            &["run", "--detach", "--name", "web", "--log-dir", &logs, "-e", "A=b", IMAGE, "sh", "-c", script],
        )?;
        assert!(says(daemon, &["ps", "--quiet"])?.contains(id.trim_end()));
        assert!(says(daemon, &["ps"])?.contains("web"));
        assert_eq!(says(daemon, &["exec", "web", "sh", "-c", "echo $A; hostname"])?, "b\nweb\n");
        assert_eq!(run(daemon, &["exec", "web", "sh", "-c", "exit 9"])?.status.code(), Some(9));
        let stats = says(daemon, &["stats"])?;
        assert!(stats.contains("web") && stats.contains("RECEIVED") && stats.contains("eth0"), "{stats}");
        assert!(says(daemon, &["inspect", id.trim_end()])?.contains(id.trim_end()));
        within(SOON, "there are lines", || {
            Ok(says(daemon, &["logs", "web"])?.contains("line 5\n").then_some(()))
        })?;
        assert_eq!(says(daemon, &["logs", "--tail", "1", "web"])?.lines().count(), 1);
        let following = daemon
            .berth()?
            .args(["logs", "--follow", "web"])
            .stdout(Stdio::piped())
            .spawn()
            .context("following")?;
        assert!(!run(daemon, &["rm", "web"])?.status.success(), "it runs");
        says(daemon, &["stop", "web"])?;
        let followed = String::from_utf8(following.wait_with_output()?.stdout)?;
        assert!(followed.starts_with("line 1\nline 2\n") && followed.ends_with("bye\n"), "{followed}");
        says(daemon, &["rm", "web"])?;
        assert_eq!(says(daemon, &["pods", "--quiet"])?, "");
        Ok(())
    })
}

#[test]
fn logs_rotate_with_nobody_watching_and_are_followed_all_the_same() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?;
        let directory = logs.to_string_lossy().into_owned();
        let script = "i=0; while [ ! -e /tmp/end ]; do i=$((i + 1)); echo line $i; [ $((i % 50)) -gt 0 ] || sleep 0.05; done";
        let options = ["run", "-d", "--name", "web", "--log-size", "8Ki", "--log-dir", &directory];
        says(daemon, &[&options[..], &[IMAGE, "sh", "-c", script]].concat())?;
        let following = daemon
            .berth()?
            .args(["logs", "-f", "web"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let reading = std::thread::spawn(move || following.wait_with_output());
        let pod = within(SOON, "there is a log directory", || {
            Ok(std::fs::read_dir(&logs)?.next().transpose()?.map(|entry| entry.path()))
        })?;
        within(SOON, "the log was rotated twice", || Ok(pod.join("main.log.2").exists().then_some(())))?;
        says(daemon, &["exec", "web", "touch", "/tmp/end"])?;
        let followed = reading.join().expect("the reader does not panic")?;
        let followed = String::from_utf8(followed.stdout)?;
        let lines = followed.lines().count();
        let expected: String = (1..=lines).map(|number| format!("line {number}\n")).collect();
        assert!(lines > 500 && followed == expected, "{lines} lines");
        says(daemon, &["rm", "web"])?;
        assert_eq!(std::fs::read_dir(&logs)?.count(), 0);
        Ok(())
    })
}

#[test]
fn force_removes_what_is_in_use_and_only_what_is_named_for_certain() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        let id =
            says(daemon, &["run", "--detach", "--name", "web", "--log-dir", &logs, IMAGE, "sleep", "1000"])?;
        let refused = |arguments: &[&str], words: &str| -> Result<()> {
            let output = run(daemon, arguments)?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(!output.status.success() && said.contains(words), "{arguments:?}: {output:?}");
            Ok(())
        };
        refused(&["rmi", IMAGE], "web/main")?;
        says(daemon, &["rmi", "--force", IMAGE])?;
        refused(&["rmi", "--force", IMAGE], IMAGE)?;
        // The container does not notice.
        assert_eq!(says(daemon, &["exec", "web", "hostname"])?, "web\n");
        // A figure or a letter could be anything's.
        refused(&["rm", "-f", &id[..1]], &id[..1])?;
        assert!(!says(daemon, &["ps", "--quiet"])?.is_empty());
        says(daemon, &["rm", "-f", "web"])?;
        assert_eq!(says(daemon, &["ps", "--all", "--quiet"])?, "");
        assert_eq!(says(daemon, &["pods", "--quiet"])?, "");
        assert_eq!(std::fs::read_dir(&logs)?.count(), 0);
        refused(&["rm", "-f", "web"], "web")
    })
}

#[test]
fn images_are_imported_listed_pulled_and_removed() -> Result<()> {
    rootful(|daemon| {
        let archive = programs()?.join("images/demo.tar").to_string_lossy().into_owned();
        says(daemon, &["rmi", IMAGE])?;
        assert!(!says(daemon, &["images"])?.contains("berth/demo"));
        assert!(says(daemon, &["import", &archive])?.contains("berth/demo"));
        says(daemon, &["import", "--upload", "--name", "localhost/uploaded:v1", &archive])?;
        let listed = says(daemon, &["images"])?;
        assert!(listed.contains("berth/demo") && listed.contains("uploaded"), "{listed}");
        let registry = Registry::start(daemon, 5000)?;
        let sealed = Image::demo()?.on_top(Layer::of_files(&[("note", b"x")])).seal();
        let reference = registry.push("demo", "v1", &sealed)?;
        let pulled = run(daemon, &["pull", &reference])?;
        assert!(pulled.status.success(), "{pulled:?}");
        assert!(String::from_utf8_lossy(&pulled.stdout).contains(&sealed.id), "{pulled:?}");
        assert!(!pulled.stderr.is_empty(), "it tells what it does");
        assert_eq!(says(daemon, &["pull", "--quiet", &reference])?.trim_end(), sealed.id);
        let absent = run(daemon, &["pull", &format!("{}/no/such", registry.address)])?;
        assert!(!absent.status.success());
        assert!(String::from_utf8_lossy(&absent.stderr).contains("no/such"), "{absent:?}");
        Ok(())
    })
}

#[test]
fn a_daemon_that_is_not_there_is_told() -> Result<()> {
    rootful(|daemon| {
        daemon.stop()?;
        let output = run(daemon, &["ps"])?;
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("berth.sock"), "{said}");
        daemon.start_again()?;
        assert!(says(daemon, &["version"])?.contains("berth"));
        says(daemon, &["info"])?;
        Ok(())
    })
}

#[test]
fn the_doctor_names_a_firewall_that_stops_what_pods_send() -> Result<()> {
    rootful(|daemon| {
        let nft = |line: &str| daemon.host().run("nft", &line.split(' ').collect::<Vec<_>>()).map(drop);
        let told = || -> Result<bool> {
            let report = String::from_utf8(run(daemon, &["doctor"])?.stdout)?;
            Ok(report.contains("table ip filter drops forwarded packets and does not name"))
        };
        ensure!(!told()?);
        nft("add table ip filter")?;
        nft("add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }")?;
        nft("add rule ip filter FORWARD iifname docker0 accept")?;
        ensure!(told()?);
        let info = String::from_utf8(run(daemon, &["info"])?.stdout)?;
        let bridge = info.split_whitespace().find(|word| word.starts_with("bt")).context("no bridge")?;
        nft(&format!("add rule ip filter FORWARD iifname {bridge} accept"))?;
        ensure!(!told()?);
        Ok(())
    })
}

#[test]
fn the_doctor_and_the_daemons_log_name_what_is_wrong_and_say_what_to_do() -> Result<()> {
    rootful(|daemon| {
        // The rest of the report is about the machine that the tests run on, which is what it is.
        let healthy = String::from_utf8(run(daemon, &["doctor"])?.stdout)?;
        let disk = format!("ok      disk        {} has ", daemon.root().display());
        assert!(healthy.contains(&disk), "{healthy}");
        assert!(healthy.contains("ok      berthd      answers on "), "{healthy}");
        assert!(healthy.contains("ok      driver      "), "{healthy}");

        let configuration = "[image]\nmin_free_bytes = 9000000000000000000\n";
        let full = Daemon::start(Setup { configuration, ..Setup::default() })?;
        let output = run(&full, &["doctor"])?;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let report = String::from_utf8(output.stdout)?;
        let trouble =
            report.lines().find(|line| line.starts_with("BROKEN  disk ")).context(report.clone())?;
        assert!(trouble.contains("lower image.min_free_bytes"), "{trouble}");
        let log = full.log()?;
        assert!(
            log.lines().any(|line| line.contains("ERROR") && line.contains("lower image.min_free_bytes")),
            "{log}"
        );

        full.stop()?;
        let output = run(&full, &["doctor"])?;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let report = String::from_utf8(output.stdout)?;
        assert!(report.lines().any(|line| line.starts_with("BROKEN  berthd ")), "{report}");
        Ok(())
    })
}
