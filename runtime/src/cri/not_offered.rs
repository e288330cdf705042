//! Calls that Berth does not offer yet.

use berth_cri::v1;

use super::error::CallError;
use super::runtime_service::RuntimeService;

const CHECKPOINT: CallError = CallError::NotOffered("checkpoint and restore are not offered yet");

impl RuntimeService {
    pub(super) fn checkpoint_container(
        &self,
        _request: v1::CheckpointContainerRequest,
    ) -> Result<v1::CheckpointContainerResponse, CallError> {
        Err(CHECKPOINT)
    }

    pub(super) fn checkpoint_pod(
        &self,
        _request: v1::CheckpointPodRequest,
    ) -> Result<v1::CheckpointPodResponse, CallError> {
        Err(CHECKPOINT)
    }

    pub(super) fn restore_pod(
        &self,
        _request: v1::RestorePodRequest,
    ) -> Result<v1::RestorePodResponse, CallError> {
        Err(CHECKPOINT)
    }
}
