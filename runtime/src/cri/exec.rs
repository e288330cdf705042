//! Calls that run a program in a container, and streams into pods: `ExecSync`, and the URLs of
//! `Exec`, `Attach` and `PortForward`.

use std::time::Duration;

use berth_cri::v1;
use berth_model::state::SandboxState;
use berth_streaming::command::Wanted;

use super::error::CallError;
use super::runtime_service::RuntimeService;
use crate::container::{self, ContainerError};
use crate::streaming::Reach;

impl RuntimeService {
    pub(super) async fn exec_sync(
        &self,
        request: v1::ExecSyncRequest,
    ) -> Result<v1::ExecSyncResponse, CallError> {
        let container = self.container(&request.container_id)?;
        if request.cmd.is_empty() {
            return Err(CallError::Missing("cmd"));
        }
        let limit =
            u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
        // Not in a separate task: if the caller goes away, this future is dropped, and the program
        // is killed.
        let output =
            container::exec::exec_sync(&container, &self.node.output_room, request.cmd, limit).await?;
        let (stdout, stderr) = fitting(output.stdout, output.stderr);
        Ok(v1::ExecSyncResponse { stdout, stderr, exit_code: output.exit_code })
    }

    pub(super) fn exec(&self, request: v1::ExecRequest, reach: Reach) -> Result<v1::ExecResponse, CallError> {
        let container = self.container(&request.container_id)?;
        if request.cmd.is_empty() {
            return Err(CallError::Missing("cmd"));
        }
        let wanted = wanted_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        container.running_shim()?;
        Ok(v1::ExecResponse { url: self.streaming.exec(reach, container, request.cmd, wanted)? })
    }

    pub(super) async fn attach(
        &self,
        request: v1::AttachRequest,
        reach: Reach,
    ) -> Result<v1::AttachResponse, CallError> {
        let container = self.container(&request.container_id)?;
        let wanted = wanted_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        container.live_shim()?.check_attach().await.map_err(ContainerError::from)?;
        // The client needs one as well when it comes; until then it keeps none from others.
        drop(container.attach()?);
        Ok(v1::AttachResponse { url: self.streaming.attach(reach, container, wanted)? })
    }

    pub(super) fn port_forward(
        &self,
        request: v1::PortForwardRequest,
        reach: Reach,
    ) -> Result<v1::PortForwardResponse, CallError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        if let Some(port) = request.port.iter().find(|port| !(1..=65535).contains(*port)) {
            return Err(CallError::Argument(format!("port {port} is not between 1 and 65535")));
        }
        if sandbox.state() != SandboxState::Ready {
            return Err(ContainerError::SandboxNotReady { id: sandbox.id().clone() }.into());
        }
        let ports = request.port.iter().filter_map(|port| u16::try_from(*port).ok()).collect();
        Ok(v1::PortForwardResponse { url: self.streaming.port_forward(reach, sandbox, ports)? })
    }
}

/// The streams that a request asks for.
fn wanted_streams(stdin: bool, stdout: bool, stderr: bool, terminal: bool) -> Result<Wanted, CallError> {
    if terminal && stderr {
        return Err(CallError::Argument(
            "tty and stderr are mutually exclusive: a terminal has only one output".into(),
        ));
    }
    if !(stdin || stdout || stderr) {
        return Err(CallError::Argument(
            "at least one of stdin, stdout and stderr has to be requested".into(),
        ));
    }
    Ok(Wanted { stdin, stdout, stderr, terminal })
}

/// Truncates the two streams so that clients accept the message; each may be as long as a message
/// on its own. The longer one is cut, as little as possible.
fn fitting(mut stdout: Vec<u8>, mut stderr: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    // Tags, lengths and the exit code take less than this.
    const ENVELOPE: usize = 64;
    let room = berth_cri::MAX_MESSAGE_BYTES - ENVELOPE;
    if stdout.len() + stderr.len() > room {
        let half = room / 2;
        if stderr.len() <= half {
            stdout.truncate(room - stderr.len());
        } else if stdout.len() <= half {
            stderr.truncate(room - stdout.len());
        } else {
            stdout.truncate(half);
            stderr.truncate(half);
        }
    }
    (stdout, stderr)
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn a_request_for_streams_names_some_and_no_second_output_of_a_terminal() {
        let all = [false, true];
        for (stdin, stdout, stderr, terminal) in all.into_iter().flat_map(|stdin| {
            all.into_iter().flat_map(move |stdout| {
                all.into_iter().flat_map(move |stderr| all.map(|terminal| (stdin, stdout, stderr, terminal)))
            })
        }) {
            let wanted = wanted_streams(stdin, stdout, stderr, terminal);
            assert_eq!(wanted.is_ok(), (stdin || stdout || stderr) && !(terminal && stderr));
        }
    }

    #[test]
    fn the_output_of_a_command_fits_into_a_message_and_is_cut_no_more_than_needed() {
        const MIB: usize = 1024 * 1024;
        for (out, err) in [
            (0, 0),
            (5, 7),
            (16 * MIB, 0),
            (0, 16 * MIB),
            (16 * MIB, 16 * MIB),
            (15 * MIB, 2 * MIB),
            (MIB, 16 * MIB),
        ] {
            let (stdout, stderr) = fitting(vec![0; out], vec![0; err]);
            let length = stdout.len() + stderr.len();
            assert!(length == out + err || length > 16 * MIB - 100, "{out} {err}");
            let message = v1::ExecSyncResponse { stdout, stderr, exit_code: i32::MIN };
            assert!(message.encoded_len() <= berth_cri::MAX_MESSAGE_BYTES, "{out} {err}");
        }
    }
}
