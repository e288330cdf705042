//! Pods and containers of a test, created by CRI calls: handles, and requests to start from.
//!
//! Nothing is removed on drop: the daemon's end removes everything, and tests of removal want to do
//! it themselves.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use tonic::Status;

use crate::census;
use crate::cri::{Client, image_spec};
use crate::daemon::{IMAGE, SOON, own_namespaces};
use crate::deadline::within;
use crate::log;

/// A sandbox.
#[derive(Debug)]
pub struct Pod {
    client: Client,
    /// Its id.
    pub id: String,
    /// The requested configuration.
    pub config: v1::PodSandboxConfig,
    scripts: AtomicU32,
}

/// A container.
#[derive(Debug, Clone)]
pub struct Container {
    client: Client,
    /// Its id.
    pub id: String,
    /// Where its log should be.
    pub log_path: PathBuf,
}

/// A container that has ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Its status.
    pub status: v1::ContainerStatus,
    /// All its standard output.
    pub stdout: String,
    /// All its standard error.
    pub stderr: String,
}

/// The outcome of a program in a container, as ExecSync reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Pod {
    /// `RunPodSandbox`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn run(client: Client, config: v1::PodSandboxConfig) -> Result<Self, Status> {
        let request =
            v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let id = client.run_pod_sandbox(request)?.pod_sandbox_id;
        Ok(Self { client, id, config, scripts: AtomicU32::new(0) })
    }

    /// `CreateContainer`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn create(&self, config: v1::ContainerConfig) -> Result<Container, Status> {
        let log_path = Path::new(&self.config.log_directory).join(&config.log_path);
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id = self.client.create_container(request)?.container_id;
        Ok(Container { client: self.client.clone(), id, log_path })
    }

    /// Creates a container and starts it.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn start(&self, config: v1::ContainerConfig) -> Result<Container, Status> {
        let container = self.create(config)?;
        container.start()?;
        Ok(container)
    }

    /// Creates a container, starts it and waits for its end.
    ///
    /// # Errors
    /// The daemon's refusal, and when it does not end in time.
    pub fn run_container(&self, config: v1::ContainerConfig) -> Result<Ended> {
        self.start(config)?.ended()
    }

    /// Runs a shell script in a container whose request `change` has modified, and returns its
    /// output.
    ///
    /// # Errors
    /// When it does not end with success; the message has its standard error.
    pub fn script(&self, script: &str, change: impl FnOnce(&mut v1::ContainerConfig)) -> Result<String> {
        let mut config = shell(&format!("script-{}", self.scripts.fetch_add(1, Ordering::Relaxed)), script);
        change(&mut config);
        let ended = self.run_container(config).with_context(|| format!("the script {script:?}"))?;
        ensure!(
            ended.status.exit_code == 0,
            "{script:?} ended with {} {}: {}{}",
            ended.status.exit_code,
            ended.status.reason,
            ended.stdout,
            ended.stderr
        );
        Ok(ended.stdout)
    }

    /// A container that does nothing until it is asked to end, for tests that observe it from
    /// outside or by exec.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn idle(&self, name: &str) -> Result<Container, Status> {
        let container = self.start(idle(name))?;
        // Tests stop it and count processes at once: by now its shell handles signals, and its
        // child has its name.
        if let Ok(pid) = container.pid() {
            let _ = within(SOON, "it idles", || Ok(census::has_child(pid, "sleep").then_some(())));
        }
        Ok(container)
    }

    /// Its status.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn status(&self) -> Result<v1::PodSandboxStatus, Status> {
        self.client.sandbox(&self.id)
    }

    /// The process id of its first process, as the host numbers it.
    ///
    /// # Errors
    /// The daemon's refusal, and when it has none.
    pub fn first_process(&self) -> Result<i32> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        let info = self.client.pod_sandbox_status(request)?.info;
        let text = info.get("info").context("the verbose status has no info")?;
        let details: serde_json::Value = serde_json::from_str(text).context("reading the info")?;
        let pid = details.pointer("/pid").and_then(serde_json::Value::as_i64);
        Ok(pid.filter(|pid| *pid > 1).context("no first process")?.try_into()?)
    }

    /// Its first address.
    ///
    /// # Errors
    /// The daemon's refusal, and when it has none.
    pub fn ip(&self) -> Result<String> {
        let ip = self.status()?.network.unwrap_or_default().ip;
        ensure!(!ip.is_empty(), "the pod has no address");
        Ok(ip)
    }

    /// Stops it.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn stop(&self) -> Result<(), Status> {
        self.client.stop_sandbox(&self.id)
    }

    /// Removes it.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn remove(&self) -> Result<(), Status> {
        self.client.remove_sandbox(&self.id)
    }
}

impl Container {
    /// `StartContainer`.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn start(&self) -> Result<(), Status> {
        self.client.start_container(v1::StartContainerRequest { container_id: self.id.clone() }).map(drop)
    }

    /// `ExecSync` with a limit in seconds, 0 for none. Output that is not text is shown with
    /// replacement characters.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn exec_within(&self, command: &[&str], seconds: i64) -> Result<Output, Status> {
        let answer = self.client.exec_sync(v1::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: words(command),
            timeout: seconds,
        })?;
        Ok(Output {
            code: answer.exit_code,
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// [`exec_within`](Self::exec_within) half a minute, more than any of the programs here takes.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn exec(&self, command: &[&str]) -> Result<Output, Status> {
        self.exec_within(command, 30)
    }

    /// Creates the file `path` in it, for which its program waits to end. The container may end
    /// before the program that creates the file does, and end that one with it; the caller judges
    /// the outcome.
    pub fn call_off(&self, path: &str) {
        let _ = self.exec(&["touch", path]);
    }

    /// Runs a shell script in it and returns its output.
    ///
    /// # Errors
    /// When it does not end with success; the message has its standard error.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.exec(&["sh", "-c", script])?;
        ensure!(
            output.code == 0,
            "{script:?} ended with {}: {}{}",
            output.code,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }

    /// Its status.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn status(&self) -> Result<v1::ContainerStatus, Status> {
        self.client.container(&self.id)
    }

    /// Its log.
    ///
    /// # Errors
    /// When it cannot be read or is not in the format.
    pub fn log(&self) -> Result<Vec<log::Entry>> {
        log::read(&self.log_path)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end in time, or its log cannot be read.
    pub fn ended(&self) -> Result<Ended> {
        let status = within(SOON, "the container ends", || {
            let status = self.status()?;
            Ok((status.state() == v1::ContainerState::ContainerExited).then_some(status))
        })?;
        let entries = if status.log_path.is_empty() { Vec::new() } else { self.log()? };
        Ok(Ended { status, stdout: log::text(&entries, "stdout"), stderr: log::text(&entries, "stderr") })
    }

    /// Waits until its log contains this text on standard output, and returns all of it.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn says(&self, text: &str) -> Result<String> {
        within(SOON, &format!("the log has {text:?}"), || {
            let said = log::text(&self.log()?, "stdout");
            Ok(said.contains(text).then_some(said))
        })
    }

    /// The process id of its program, as the host numbers it.
    ///
    /// # Errors
    /// The daemon's refusal, and when the verbose status has none.
    pub fn pid(&self) -> Result<i32> {
        Ok(self
            .details()?
            .pointer("/pid")
            .and_then(serde_json::Value::as_i64)
            .context("no pid")?
            .try_into()?)
    }

    /// The process id of its shim: the parent of its program.
    ///
    /// # Errors
    /// The daemon's refusal, and when the program has ended.
    pub fn shim_pid(&self) -> Result<i32> {
        let pid = self.pid()?;
        census::parent(pid).with_context(|| format!("process {pid} has no parent"))
    }

    /// The part of the verbose status that is not in CRI.
    ///
    /// # Errors
    /// The daemon's refusal, and when the status has none.
    pub fn details(&self) -> Result<serde_json::Value> {
        let request = v1::ContainerStatusRequest { container_id: self.id.clone(), verbose: true };
        let info = self.client.container_status(request)?.info;
        let text = info.get("info").context("the verbose status has no info")?;
        serde_json::from_str(text).context("reading the info")
    }

    /// Stops it.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn stop(&self, grace_seconds: i64) -> Result<(), Status> {
        self.client.stop(&self.id, grace_seconds)
    }

    /// Removes it.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn remove(&self) -> Result<(), Status> {
        self.client.remove(&self.id)
    }
}

/// The request for a container of the demo image with a command, as a kubelet would write it for a
/// manifest without further settings.
#[must_use]
pub fn container(name: &str, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(image_spec(IMAGE)),
        command: words(command),
        log_path: format!("{name}.log"),
        linux: Some(v1::LinuxContainerConfig {
            resources: None,
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(own_namespaces()),
                seccomp: Some(v1::SecurityProfile::default()),
                masked_paths: words(&["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]),
                readonly_paths: words(&[
                    "/proc/bus",
                    "/proc/fs",
                    "/proc/irq",
                    "/proc/sys",
                    "/proc/sysrq-trigger",
                ]),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// The request for a container that runs a shell script.
#[must_use]
pub fn shell(name: &str, script: &str) -> v1::ContainerConfig {
    container(name, &["sh", "-c", script])
}

/// The request for a container that does nothing, and ends at once on request.
#[must_use]
pub fn idle(name: &str) -> v1::ContainerConfig {
    shell(name, "trap 'exit 0' TERM; sleep 1000 & wait")
}

/// The security context of a request.
///
/// # Panics
/// When the request has none; those of [`container`] have.
#[expect(clippy::expect_used, reason = "a test's own mistake")]
pub fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    let linux = config.linux.as_mut().expect("the request has a linux part");
    linux.security_context.as_mut().expect("the request has a security context")
}

/// The namespaces of a pod whose containers see each other's processes (`shareProcessNamespace`).
#[must_use]
pub fn shared_processes() -> v1::NamespaceOption {
    v1::NamespaceOption { pid: v1::NamespaceMode::Pod.into(), ..Default::default() }
}

/// The request for a pod, with [`shared_processes`].
#[must_use]
pub fn sharing_pod(mut config: v1::PodSandboxConfig) -> v1::PodSandboxConfig {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().namespace_options = Some(shared_processes());
    config
}

/// The request for a container of a [`sharing_pod`].
///
/// # Panics
/// As [`security`].
#[must_use]
pub fn sharing(mut config: v1::ContainerConfig) -> v1::ContainerConfig {
    security(&mut config).namespace_options = Some(shared_processes());
    config
}

/// A file or directory of the host, to be mounted at a path of the container with the defaults of a
/// request: writable.
#[must_use]
pub fn volume(host: &Path, container: &str) -> v1::Mount {
    v1::Mount {
        container_path: container.to_owned(),
        host_path: host.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

/// Sets the limits of a request.
pub fn limit(config: &mut v1::ContainerConfig, resources: v1::LinuxContainerResources) {
    config.linux.get_or_insert_default().resources = Some(resources);
}

/// Words in the form that CRI wants.
#[must_use]
pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
