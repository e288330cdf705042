//! What `berth run` creates for a program, and how it is removed: in reverse order, as far as it
//! got.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use berth_cri::v1::{
    ContainerConfig, ContainerState, CreateContainerRequest, PodSandboxConfig, RunPodSandboxRequest,
    StartContainerRequest,
};

use super::RunError;
use crate::commands::rm::{remove_log, remove_logs};
use crate::daemon::{CallError, Daemon, answer};
use crate::error::Error;
use crate::output;

/// Exit codes of a program that could not be run (126) or found (127), as env(1) and shells have
/// them.
const CANNOT_RUN: [u8; 2] = [126, 127];

/// An object that was created.
enum Step {
    LogDirectory(PathBuf),
    Pod(String),
    /// In an existing pod; otherwise removing the pod removes the container, too.
    Container(String),
}

/// What has been created so far.
pub(super) struct Made<'a> {
    daemon: &'a Daemon,
    steps: Vec<Step>,
}

impl<'a> Made<'a> {
    /// Nothing yet.
    pub(super) fn nothing(daemon: &'a Daemon) -> Self {
        Self { daemon, steps: Vec::new() }
    }

    /// The daemon.
    pub(super) fn daemon(&self) -> &'a Daemon {
        self.daemon
    }

    /// Creates a pod's directory for logs. Output may be secret: other users may not read
    /// in.
    pub(super) fn log_directory(&mut self, directory: &Path) -> Result<(), RunError> {
        let made = DirBuilder::new().recursive(true).mode(0o750).create(directory);
        made.map_err(|error| RunError::LogDirectory { path: directory.to_owned(), error })?;
        self.steps.push(Step::LogDirectory(directory.to_owned()));
        Ok(())
    }

    /// Creates a pod and returns its id.
    pub(super) async fn pod(&mut self, name: &str, config: PodSandboxConfig) -> Result<String, CallError> {
        let request = RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let act = format!("create pod {name}");
        let id = answer(act, self.daemon.runtime.clone().run_pod_sandbox(request)).await?.pod_sandbox_id;
        self.steps.push(Step::Pod(id.clone()));
        Ok(id)
    }

    /// Creates a container and returns its id.
    pub(super) async fn container(
        &mut self,
        pod_sandbox_id: String,
        sandbox_config: PodSandboxConfig,
        config: ContainerConfig,
    ) -> Result<String, CallError> {
        let (config, sandbox_config) = (Some(config), Some(sandbox_config));
        let request = CreateContainerRequest { pod_sandbox_id, config, sandbox_config };
        let call =
            answer("create the container", self.daemon.runtime.clone().create_container(request)).await;
        let id = call?.container_id;
        if !self.steps.iter().any(|step| matches!(step, Step::Pod(_))) {
            self.steps.push(Step::Container(id.clone()));
        }
        Ok(id)
    }

    /// Starts the program of the container.
    pub(super) async fn start(&self, container_id: &str) -> Result<(), RunError> {
        let request = StartContainerRequest { container_id: container_id.to_owned() };
        match self.daemon.runtime.clone().start_container(request).await {
            Ok(_) => Ok(()),
            Err(status) => {
                let exit_code = self.exit_code_of_failed_start(container_id).await;
                Err(RunError::NotStarted { exit_code, refusal: status.into() })
            }
        }
    }

    async fn exit_code_of_failed_start(&self, container_id: &str) -> Option<u8> {
        let status = self.daemon.container_status(container_id).await.ok()?;
        let code = u8::try_from(status.exit_code).ok()?;
        (status.state() == ContainerState::ContainerExited && CANNOT_RUN.contains(&code)).then_some(code)
    }

    /// Removes everything. What cannot be removed is reported and keeps what it needs: the
    /// logs of a pod that still exists may say why.
    pub(super) async fn undo(&mut self) {
        while let Some(step) = self.steps.pop() {
            let undone = match step {
                Step::LogDirectory(directory) => {
                    remove_logs(&directory, fs::remove_dir_all(&directory)).map_err(Error::from)
                }
                Step::Pod(id) => self.undo_pod(&id).await,
                Step::Container(id) => self.undo_container(&id).await,
            };
            if let Err(error) = undone {
                output::remark(error.one_line());
                return;
            }
        }
    }

    async fn undo_pod(&self, id: &str) -> Result<(), Error> {
        // Removing also stops; stopping first makes the error more precise.
        self.daemon.stop_pod(id).await?;
        Ok(self.daemon.remove_pod(id).await?)
    }

    async fn undo_container(&self, id: &str) -> Result<(), Error> {
        let log_path = PathBuf::from(self.daemon.container_status(id).await?.log_path);
        self.daemon.remove_container(id).await?;
        Ok(remove_log(&log_path)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_daemon::{FakeDaemon, Script};

    #[tokio::test]
    async fn a_log_directory_is_made_for_few_eyes_and_undone() {
        use std::os::unix::fs::PermissionsExt;
        let fake = FakeDaemon::start(Script::default()).await;
        let below = tempfile::tempdir().unwrap();
        let directory = below.path().join("a/b");
        let mut made = Made::nothing(&fake.daemon);
        made.log_directory(&directory).unwrap();
        assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o027, 0);
        fs::write(directory.join("main.log"), "x").unwrap();
        made.undo().await;
        assert!(!directory.exists());
    }

    #[tokio::test]
    async fn a_log_directory_that_cannot_be_made_names_the_way_out() {
        let fake = FakeDaemon::start(Script::default()).await;
        let mut made = Made::nothing(&fake.daemon);
        let error = made.log_directory(Path::new("/proc/none/x")).unwrap_err();
        assert!(error.to_string().contains("--log-dir"), "{error}");
        assert!(made.steps.is_empty());
    }

    #[tokio::test]
    async fn the_logs_of_a_pod_that_cannot_be_removed_stay() {
        let fake = FakeDaemon::start(Script::default()).await;
        let directory = tempfile::tempdir().unwrap();
        let mut made = Made::nothing(&fake.daemon);
        made.log_directory(directory.path()).unwrap();
        // The fake has no CRI, so every call about the pod fails.
        made.steps.push(Step::Pod("p".into()));
        made.undo().await;
        assert!(directory.path().exists());
    }
}
