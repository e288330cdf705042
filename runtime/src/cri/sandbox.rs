//! Calls about sandboxes.

use std::collections::BTreeMap;

use berth_cri::v1;

use super::container::selinux;
use super::convert::{self, SandboxFilter, SandboxView};
use super::error::CallError;
use super::info;
use super::pages::{Items, PAGE, pages};
use super::runtime_service::{RuntimeService, absent_is_none, apart};
use crate::sandbox;
use crate::snapshot::SandboxSnapshot;

impl RuntimeService {
    pub(super) async fn run_pod_sandbox(
        &self,
        request: v1::RunPodSandboxRequest,
    ) -> Result<v1::RunPodSandboxResponse, CallError> {
        let message = request.config.ok_or(CallError::Missing("config"))?;
        let node = self.node.clone();
        let config =
            convert::sandbox_config(message, &request.runtime_handler, &node.handlers, selinux(&node))?;
        let sandbox = apart(async move { Ok(sandbox::create::create(node, config).await?) }).await?;
        Ok(v1::RunPodSandboxResponse { pod_sandbox_id: sandbox.id().to_string() })
    }

    pub(super) async fn stop_pod_sandbox(
        &self,
        request: v1::StopPodSandboxRequest,
    ) -> Result<v1::StopPodSandboxResponse, CallError> {
        if let Some(sandbox) = absent_is_none(self.sandbox(&request.pod_sandbox_id))? {
            let node = self.node.clone();
            apart(async move { Ok(sandbox::stop::stop(&node, &sandbox).await?) }).await?;
        }
        Ok(v1::StopPodSandboxResponse {})
    }

    pub(super) async fn remove_pod_sandbox(
        &self,
        request: v1::RemovePodSandboxRequest,
    ) -> Result<v1::RemovePodSandboxResponse, CallError> {
        if let Some(sandbox) = absent_is_none(self.sandbox(&request.pod_sandbox_id))? {
            let (node, samples) = (self.node.clone(), self.samples.clone());
            apart(async move {
                sandbox::stop::remove(&node, &sandbox).await?;
                samples.forget(sandbox.id().as_str());
                Ok(())
            })
            .await?;
        }
        Ok(v1::RemovePodSandboxResponse {})
    }

    pub(super) fn pod_sandbox_status(
        &self,
        request: v1::PodSandboxStatusRequest,
    ) -> Result<v1::PodSandboxStatusResponse, CallError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        Ok(v1::PodSandboxStatusResponse {
            status: Some(convert::sandbox_status(&view(&sandbox.snapshot()))),
            info: if request.verbose { info::sandbox(&sandbox) } else { BTreeMap::new() },
            // A kubelet with evented PLEG that finds a timestamp takes the statuses from here, and
            // then knows no active containers: it runs init containers again and again (1.37,
            // `GetPodStatus`). Without one, as from containerd, it asks for each container.
            containers_statuses: Vec::new(),
            timestamp: 0,
        })
    }

    pub(super) fn list_pod_sandbox(
        &self,
        request: v1::ListPodSandboxRequest,
    ) -> Result<v1::ListPodSandboxResponse, CallError> {
        Ok(v1::ListPodSandboxResponse { items: self.sandboxes(request.filter) })
    }

    pub(super) fn stream_pod_sandboxes(
        &self,
        request: v1::StreamPodSandboxesRequest,
    ) -> Result<Items<v1::StreamPodSandboxesResponse>, CallError> {
        let sandboxes = self.sandboxes(request.filter);
        pages(PAGE, &sandboxes, |pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes })
    }

    pub(super) fn update_pod_sandbox_resources(
        &self,
        request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<v1::UpdatePodSandboxResourcesResponse, CallError> {
        // The kubelet has changed the pod's cgroup itself; this is only a notification.
        self.sandbox(&request.pod_sandbox_id)?;
        Ok(v1::UpdatePodSandboxResourcesResponse {})
    }

    fn sandboxes(&self, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
        let filter = SandboxFilter::new(filter);
        let mut sandboxes = self.node.registry.sandboxes();
        sandboxes.sort_by_key(|sandbox| std::cmp::Reverse(sandbox.created_at_unix_ns()));
        let snapshots: Vec<SandboxSnapshot> = sandboxes.iter().map(|sandbox| sandbox.snapshot()).collect();
        let views = snapshots.iter().map(view);
        views.filter(|view| filter.matches(view)).map(|view| convert::sandbox(&view)).collect()
    }
}

/// A sandbox for an answer.
pub(super) fn view(sandbox: &SandboxSnapshot) -> SandboxView<'_> {
    SandboxView {
        id: &sandbox.id,
        config: &sandbox.config,
        created_at_unix_ns: sandbox.created_at_unix_ns,
        state: sandbox.state,
        addresses: &sandbox.addresses,
    }
}
