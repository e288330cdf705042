//! The configuration, reloaded under running pods.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, SOON, programs, rootful};
use berth_tests::deadline::within;
use serde_json::Value;

/// Reloads the configuration with `text` in a further file, and waits for the line in the log that
/// says `outcome`.
fn reload(daemon: &Daemon, text: &str, outcome: &str) -> Result<String> {
    let more = daemon.directory("berth.toml.d")?;
    fs::write(more.join("more.toml"), text).context("writing the configuration")?;
    let before = daemon.log()?.len();
    daemon.reload()?;
    within(SOON, &format!("the log says {outcome:?}"), || {
        let log = daemon.log()?;
        let news = log.get(before..).unwrap_or_default();
        Ok(news.contains(outcome).then(|| news.to_owned()))
    })
}

/// The configuration in force, according to the daemon.
fn in_force(daemon: &Daemon, key: &str) -> Result<Value> {
    let status = daemon.client().status(v1::StatusRequest { verbose: true })?;
    let config: Value = serde_json::from_str(status.info.get("config").context("no configuration")?)?;
    config.pointer(&format!("/berth{key}")).cloned().with_context(|| format!("{key} is not in {config}"))
}

#[test]
fn new_values_count_for_new_containers_and_running_ones_are_left_alone() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("before")?;
        let before = pod.idle("main")?;
        let limit = before.sh("ulimit -Sn")?;
        let pid = daemon.pid()?;

        reload(daemon, "[container.rlimits]\nnofile = '300:400'\n", "changed=\"container\"")?;
        let after = pod.idle("after")?;
        assert_eq!(after.sh("ulimit -Sn; ulimit -Hn")?, "300\n400\n");
        assert_eq!(before.sh("ulimit -Sn")?, limit, "exec goes by the container's own limits");

        reload(daemon, "log = 'debug'\n", "changed=\"log, container\"")?;
        reload(daemon, "log = 'debug'\n", "nothing changed")?;
        assert_eq!(daemon.pid()?, pid, "it is the same daemon");
        Ok(())
    })
}

#[test]
fn the_rules_of_registries_and_the_space_for_images_change_too() -> Result<()> {
    rootful(|daemon| {
        let rules = daemon.directory("other-certs.d")?;
        let refused = daemon.directory("other-certs.d/registry.test")?.join("hosts.toml");
        fs::write(refused, "server = 7\n").context("writing rules that are wrong")?;
        let text = format!("[registry]\nconfig_path = '{}'\n[image]\nmin_free_bytes = 1\n", rules.display());
        reload(daemon, &text, "changed=\"registry, image\"")?;
        assert_eq!(in_force(daemon, "/image/min_free_bytes")?, 1);
        let image =
            v1::ImageSpec { image: "registry.test/some/image:latest".to_owned(), ..Default::default() };
        let error = daemon
            .client()
            .pull_image(v1::PullImageRequest { image: Some(image), ..Default::default() })
            .expect_err("the rules of this registry are wrong");
        ensure!(error.to_string().contains("invalid value of 'server'"), "the new rules are asked: {error}");
        Ok(())
    })
}

#[test]
fn what_needs_a_restart_is_named_and_waits() -> Result<()> {
    rootful(|daemon| {
        let bridge = in_force(daemon, "/network/bridge")?;
        let text = "log = 'warn'\n[network]\nbridge = 'other0'\n[cgroup]\nparent = '/other'\n";
        let said = reload(daemon, text, "when berthd is restarted")?;
        ensure!(said.contains("keys=\"network, cgroup\""), "{said}");
        assert_eq!(in_force(daemon, "/network/bridge")?, bridge);
        assert_eq!(in_force(daemon, "/log")?, "warn");
        assert_eq!(daemon.pod("pod")?.idle("main")?.sh("echo fine")?, "fine\n");
        Ok(())
    })
}

#[test]
fn a_wrong_configuration_changes_nothing_and_every_mistake_is_told() -> Result<()> {
    rootful(|daemon| {
        let before = in_force(daemon, "")?;
        for (text, mistakes) in [
            (
                "[container.rlimits]\nnofile = 'many'\n[network]\nmtu = 1\n",
                &["container.rlimits", "network.mtu"][..],
            ),
            ("nonsense = 1\n", &["more.toml", "nonsense"]),
            ("not toml at all\n", &["more.toml"]),
            ("log = 'this=is=no=filter'\n", &["log: "]),
        ] {
            let said = reload(daemon, text, "stays in force")?;
            ensure!(mistakes.iter().all(|mistake| said.contains(mistake)), "{text}: {said}");
            assert_eq!(in_force(daemon, "")?, before, "{text}");
        }
        assert_eq!(daemon.pod("pod")?.idle("main")?.sh("echo fine")?, "fine\n");
        Ok(())
    })
}

/// What `systemctl reload` runs. The daemon is kept from reading its configuration by a FIFO.
#[test]
fn a_reload_returns_when_the_new_values_are_in_force_and_not_before() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let fifo = daemon.directory("berth.toml.d")?.join("more.toml");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
        for soft in [300, 301, 302] {
            let pid = daemon.pid()?.to_string();
            let mut reload = Command::new(programs()?.join("berthd"))
                .args(["--reload", &pid])
                .stderr(Stdio::piped())
                .spawn()
                .context("asking for the reload")?;
            // It cannot be opened before the daemon reads it: fifo(7).
            let mut text = within(SOON, "the daemon reads its configuration", || {
                let mut options = fs::File::options();
                Ok(options.write(true).custom_flags(nix::libc::O_NONBLOCK).open(&fifo).ok())
            })?;
            ensure!(reload.try_wait()?.is_none(), "the daemon does not know the new values yet");
            write!(text, "[container.rlimits]\nnofile = '{soft}:400'\n")?;
            drop(text);
            let status = within(SOON, "the reload returns", || Ok(reload.try_wait()?))?;
            ensure!(status.success(), "{status}");
            let container = pod.idle(&format!("after-{soft}"))?;
            assert_eq!(container.sh("ulimit -Sn")?, format!("{soft}\n"));
        }
        Ok(())
    })
}
