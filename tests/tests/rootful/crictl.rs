//! A real `crictl`, built by `scripts/build-peer`.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::forge::Image;
use berth_tests::peers;
use berth_tests::program::output;
use berth_tests::registry::Registry;
use serde_json::json;

struct Crictl<'daemon> {
    program: PathBuf,
    daemon: &'daemon Daemon,
}

impl Crictl<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let endpoint = format!("unix://{}", self.daemon.socket().display());
        let mut command = Command::new(&self.program);
        command.args(["--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint]).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        Ok(output(&mut self.command(arguments))?.trim_end().to_owned())
    }

    /// With this input, in the network of the daemon's host.
    fn run_with(&self, input: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.daemon.host().inside(|| Ok(command.spawn()?))?;
        child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }
}

#[test]
fn crictl_takes_a_pod_from_the_pull_to_the_end() -> Result<()> {
    rootful(|daemon| {
        let program = peers::directory("crictl")?.join("crictl");
        let crictl = Crictl { program, daemon };
        let registry = Registry::start(daemon, 5000)?;
        let sealed = Image::demo()?.with("Labels", json!({"for": "crictl"})).seal();
        let image = registry.push("demo", "v1", &sealed)?;
        assert!(crictl.run(&["version"])?.contains("berth"));
        crictl.run(&["info"])?;
        assert!(crictl.run(&["pull", &image])?.contains(&sealed.id));
        assert!(crictl.run(&["images"])?.contains("demo"));

        let (pod_file, container_file) = (daemon.dir().join("pod.json"), daemon.dir().join("container.json"));
        let pod_config = json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "u", "attempt": 1},
            "hostname": "web", "log_directory": daemon.logs().join("web"), "linux": {},
        });
        let container_config = json!({
            "metadata": {"name": "main"}, "image": {"image": image}, "log_path": "main.log", "linux": {},
            "command": ["sh", "-c", "echo hello from $HOSTNAME; trap 'exit 0' TERM; sleep 1000 & wait"],
        });
        fs::write(&pod_file, pod_config.to_string())?;
        fs::write(&container_file, container_config.to_string())?;
        let (pod_file, container_file) = (pod_file.to_string_lossy(), container_file.to_string_lossy());
        let pod = crictl.run(&["runp", &pod_file])?;
        let main = crictl.run(&["create", &pod, &container_file, &pod_file])?;
        crictl.run(&["start", &main])?;
        assert!(crictl.run(&["ps", "--quiet"])?.contains(&main));
        assert!(crictl.run(&["pods", "--quiet"])?.contains(&pod));
        assert_eq!(crictl.run(&["exec", "--sync", &main, "hostname"])?, "web");
        within(SOON, "crictl shows the log", || {
            Ok((crictl.run(&["logs", &main])? == "hello from web").then_some(()))
        })?;
        assert!(crictl.run(&["stats", &main])?.contains("main"));
        for transport in ["spdy", "websocket"] {
            let listening = json!({
                "metadata": {"name": format!("listening-{transport}")}, "image": {"image": image}, "linux": {},
                "log_path": "listening.log", "stdin": true, "stdin_once": true,
                "command": ["sh", "-c", "cat; echo over"],
            });
            let file = daemon.dir().join("listening.json");
            fs::write(&file, listening.to_string())?;
            let listening = crictl.run(&["create", &pod, &file.to_string_lossy(), &pod_file])?;
            crictl.run(&["start", &listening])?;
            let attached =
                crictl.run_with("hello", &["attach", "--stdin", "--transport", transport, &listening])?;
            assert_eq!(attached, "helloover", "{transport}");
        }
        let inspected: serde_json::Value = serde_json::from_str(&crictl.run(&["inspect", &main])?)?;
        assert_eq!(inspected.pointer("/status/state").context("a state")?, "CONTAINER_RUNNING");
        crictl.run(&["inspectp", &pod])?;
        crictl.run(&["stop", &main])?;
        assert!(crictl.run(&["ps", "--all", "--state", "exited", "--quiet"])?.contains(&main));
        crictl.run(&["rm", &main])?;
        crictl.run(&["stopp", &pod])?;
        crictl.run(&["rmp", &pod])?;
        crictl.run(&["rmi", &image])?;
        assert_eq!(crictl.run(&["pods", "--quiet"])?, "");
        assert!(!crictl.run(&["images"])?.contains("v1"));
        Ok(())
    })
}

#[test]
fn crictl_shows_events_as_they_come() -> Result<()> {
    rootful(|daemon| {
        let program = peers::directory("crictl")?.join("crictl");
        let crictl = Crictl { program, daemon };
        let shown = daemon.dir().join("events");
        let mut command = crictl.command(&["events", "--output", "json"]);
        let child = Killed(command.stdout(fs::File::create(&shown)?).stderr(Stdio::null()).spawn()?);
        let has = |id: &str, kind: &str| -> Result<Option<()>> {
            let text = fs::read_to_string(&shown)?;
            let events = serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>();
            // The last one may be half written.
            let mut events = events.map_while(Result::ok);
            Ok(events
                .any(|event| event["containerId"] == id && event["containerEventType"] == kind)
                .then_some(()))
        };
        // It does not say when it has subscribed.
        within(SOON, "crictl shows an event", || {
            daemon.pod("probe")?.remove()?;
            Ok((fs::metadata(&shown)?.len() > 0).then_some(()))
        })?;
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        main.stop(0)?;
        pod.remove()?;
        for id in [&pod.id, &main.id] {
            for kind in ["CREATED", "STARTED", "STOPPED", "DELETED"] {
                within(SOON, &format!("{kind} is shown"), || has(id, &format!("CONTAINER_{kind}_EVENT")))?;
            }
        }
        drop(child);
        daemon.stop()
    })
}

/// A program that is killed when this is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
