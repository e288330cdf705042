//! The output of containers, in files of the CRI format.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::log::{self, Entry};
use berth_tests::pod::{idle, shell};
use tonic::{Code, Status};

fn reopen(daemon: &Daemon, id: &str) -> Result<(), Status> {
    let request = v1::ReopenContainerLogRequest { container_id: id.to_owned() };
    daemon.client().reopen_container_log(request).map(drop)
}

#[test]
fn every_line_is_an_entry_with_its_stream_and_a_time_that_does_not_go_back() -> Result<()> {
    rootful(|daemon| {
        let script = "echo one; echo two >&2; echo; printf 'ü \\t\\0 x\\n'; printf 'no newline'";
        let main = daemon.pod("logs")?.start(shell("main", script))?;
        main.ended()?;
        let entries = main.log()?;
        let of = |stream: &str| -> Vec<(String, bool)> {
            let of_stream = entries.iter().filter(|entry| entry.stream == stream);
            of_stream
                .map(|entry| (String::from_utf8_lossy(&entry.content).into_owned(), entry.partial))
                .collect()
        };
        let line = |text: &str| (text.to_owned(), false);
        let rest = ("no newline".to_owned(), true);
        assert_eq!(of("stdout"), [line("one"), line(""), line("ü \t\0 x"), rest]);
        assert_eq!(of("stderr"), [line("two")]);
        assert!(entries.is_sorted_by_key(|entry| entry.time.clone()), "{entries:?}");
        let mode = fs::metadata(&main.log_path)?.permissions().mode();
        assert_eq!(mode & 0o777, 0o640, "readable by the group of log collectors");
        Ok(())
    })
}

#[test]
fn long_lines_are_cut_into_parts_that_fit_together() -> Result<()> {
    rootful(|daemon| {
        let script = "head -c 100000 /dev/zero | tr '\\0' x; echo; head -c 16384 /dev/zero | tr '\\0' y; echo; echo end";
        let main = daemon.pod("logs")?.start(shell("main", script))?;
        let said = main.ended()?.stdout;
        assert_eq!(said, format!("{}\n{}\nend\n", "x".repeat(100_000), "y".repeat(16_384)));
        let entries = main.log()?;
        assert!(entries.iter().all(|entry| entry.content.len() <= 16_384), "no entry is longer than 16 KiB");
        let whole = |entry: &&Entry| entry.content.starts_with(b"y");
        assert_eq!(entries.iter().filter(whole).count(), 1, "what fits is not cut");
        Ok(())
    })
}

#[test]
fn a_hundred_thousand_lines_are_all_there_in_order() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("logs")?.start(shell("main", "seq 1 100000; seq 1 1000 >&2"))?;
        let ended = main.ended()?;
        let numbers = |last: u32| {
            (1..=last).fold(String::new(), |mut text, number| {
                let _ = writeln!(text, "{number}");
                text
            })
        };
        assert!(ended.stdout == numbers(100_000), "{} bytes of standard output", ended.stdout.len());
        assert!(ended.stderr == numbers(1000), "{} bytes of standard error", ended.stderr.len());
        Ok(())
    })
}

#[test]
fn rotation_loses_nothing_and_doubles_nothing() -> Result<()> {
    rootful(|daemon| {
        let script = "i=0; while [ ! -e /tmp/end ]; do i=$((i + 1)); echo $i; done";
        let main = daemon.pod("logs")?.start(shell("main", script))?;
        let mut rotated = Vec::new();
        for turn in 0..5 {
            within(SOON, "the log grows", || Ok((fs::metadata(&main.log_path)?.len() > 1000).then_some(())))?;
            let old = main.log_path.with_extension(format!("log.{turn}"));
            fs::rename(&main.log_path, &old)?;
            reopen(daemon, &main.id)?;
            assert!(main.log_path.exists(), "the new file is there when the call returns");
            let length = fs::metadata(&old)?.len();
            rotated.push((old, length));
        }
        main.call_off("/tmp/end");
        main.ended()?;
        let mut said = String::new();
        for (old, length) in &rotated {
            assert_eq!(
                fs::metadata(old)?.len(),
                *length,
                "nothing is written to the old file after the call"
            );
            said += &log::text(&log::read(old)?, "stdout");
        }
        said += &log::text(&main.log()?, "stdout");
        for (index, line) in said.lines().enumerate() {
            assert_eq!(line.parse::<usize>().ok(), Some(index + 1));
        }
        Ok(())
    })
}

#[test]
fn a_log_that_is_gone_comes_back_by_reopening() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("logs")?;
        let main = pod.start(shell("main", "while sleep 0.05; do echo line; done"))?;
        main.says("line")?;
        fs::remove_file(&main.log_path)?;
        reopen(daemon, &main.id)?;
        main.says("line")?;
        main.stop(0)?;
        assert_eq!(
            reopen(daemon, &main.id).err().map(|status| status.code()),
            Some(Code::FailedPrecondition)
        );
        assert_eq!(reopen(daemon, &"0".repeat(64)).err().map(|status| status.code()), Some(Code::NotFound));
        Ok(())
    })
}

#[test]
fn reopening_that_fails_makes_no_file_and_the_old_one_goes_on() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("logs")?;
        let main = pod.start(shell("main", "while sleep 0.05; do echo line; done"))?;
        main.says("line")?;
        let old = main.log_path.with_extension("old");
        fs::rename(&main.log_path, &old)?;
        fs::create_dir(&main.log_path)?;
        let refused = reopen(daemon, &main.id).err().context("a directory cannot be written to")?;
        assert!(refused.message().contains("log"), "{refused}");
        let before = fs::metadata(&old)?.len();
        within(SOON, "the old file grows", || Ok((fs::metadata(&old)?.len() > before).then_some(())))?;
        Ok(())
    })
}

#[test]
fn a_terminals_lines_have_no_carriage_return() -> Result<()> {
    rootful(|daemon| {
        let mut config = shell("main", "echo one; echo two >&2; echo three");
        config.tty = true;
        let main = daemon.pod("logs")?.start(config)?;
        assert_eq!(main.ended()?.stdout, "one\ntwo\nthree\n");
        Ok(())
    })
}

#[test]
fn without_a_path_there_is_no_log() -> Result<()> {
    rootful(|daemon| {
        let mut pod_config = daemon.pod_config("logs");
        pod_config.log_directory = String::new();
        let pod = daemon.pod_of(pod_config)?;
        let mut config = shell("main", "seq 1 10000");
        config.log_path = String::new();
        let status = pod.run_container(config)?.status;
        assert_eq!((status.exit_code, status.log_path.as_str()), (0, ""));
        assert!(!daemon.logs().exists());
        Ok(())
    })
}

#[test]
fn all_output_is_in_the_log_when_the_end_is_told_but_a_straggler_does_not_delay_it() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("logs")?;
        for number in 0..20 {
            let ended = pod.run_container(shell(&format!("fast-{number}"), "seq 1 200"))?;
            assert!(ended.stdout.ends_with("\n200\n"), "{:?}", ended.stdout);
        }
        // In the pod's pid namespace the child outlives the program and holds the pipe.
        let mut pod_config = daemon.pod_config("shared");
        let linux = pod_config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().namespace_options =
            Some(v1::NamespaceOption::default());
        let shared = daemon.pod_of(pod_config)?;
        let mut config = shell("main", "sleep 1000 & echo begun");
        berth_tests::pod::security(&mut config).namespace_options = Some(v1::NamespaceOption::default());
        assert_eq!(shared.run_container(config)?.stdout, "begun\n");
        Ok(())
    })
}

#[test]
fn a_container_that_nobody_reads_is_not_blocked_by_a_dead_daemon() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("logs")?;
        let main = pod.start(shell(
            "main",
            "while [ ! -e /tmp/go ]; do sleep 0.05; done; seq 1 200000; touch /tmp/done",
        ))?;
        let evidence = pod.start(idle("other"))?;
        main.sh("touch /tmp/go")?;
        daemon.kill()?;
        within(SOON, "all lines are written without a daemon", || {
            let bytes = fs::read(&main.log_path)?;
            Ok(bytes.ends_with(b" 200000\n").then_some(()))
        })?;
        daemon.start_again()?;
        assert_eq!(evidence.sh("echo alive")?, "alive\n");
        Ok(())
    })
}
