//! Calls about containers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use berth_cri::v1;
use berth_model::container::Config as ContainerConfig;

use super::convert::{self, ContainerFilter, ContainerView, Field};
use super::error::CallError;
use super::info;
use super::pages::{Items, PAGE, pages};
use super::runtime_service::{RuntimeService, absent_is_none, apart};
use crate::container::{self, Container};
use crate::node::Node;
use crate::snapshot::ContainerSnapshot;

impl RuntimeService {
    pub(super) async fn create_container(
        &self,
        request: v1::CreateContainerRequest,
    ) -> Result<v1::CreateContainerResponse, CallError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        let message = request.config.ok_or(CallError::Missing("config"))?;
        let node = self.node.clone();
        let config = convert::container_config(message, sandbox.config(), selinux(&node))?;
        let container =
            apart(async move { Ok(container::create::create(node, sandbox, config).await?) }).await?;
        Ok(v1::CreateContainerResponse { container_id: container.id().to_string() })
    }

    pub(super) async fn start_container(
        &self,
        request: v1::StartContainerRequest,
    ) -> Result<v1::StartContainerResponse, CallError> {
        let container = self.container(&request.container_id)?;
        apart(async move { Ok(container::start::start(&container).await?) }).await?;
        Ok(v1::StartContainerResponse {})
    }

    pub(super) async fn stop_container(
        &self,
        request: v1::StopContainerRequest,
    ) -> Result<v1::StopContainerResponse, CallError> {
        if let Some(container) = absent_is_none(self.container(&request.container_id))? {
            // Negative is "at once". A grace period beyond a year never ends in practice.
            let seconds = u64::try_from(request.timeout).unwrap_or(0).min(365 * 24 * 3600);
            let grace = Duration::from_secs(seconds);
            apart(async move { Ok(container::stop::stop(&container, grace).await?) }).await?;
        }
        Ok(v1::StopContainerResponse {})
    }

    pub(super) async fn remove_container(
        &self,
        request: v1::RemoveContainerRequest,
    ) -> Result<v1::RemoveContainerResponse, CallError> {
        if let Some(container) = absent_is_none(self.container(&request.container_id))? {
            let (node, samples) = (self.node.clone(), self.samples.clone());
            apart(async move {
                container::remove::remove(&node, &container).await?;
                samples.forget(container.id().as_str());
                Ok(())
            })
            .await?;
        }
        Ok(v1::RemoveContainerResponse {})
    }

    pub(super) fn container_status(
        &self,
        request: v1::ContainerStatusRequest,
    ) -> Result<v1::ContainerStatusResponse, CallError> {
        let container = self.container(&request.container_id)?;
        Ok(v1::ContainerStatusResponse {
            status: Some(with_view(&container.snapshot(), convert::container_status)),
            info: if request.verbose { info::container(&container) } else { BTreeMap::new() },
        })
    }

    pub(super) fn list_containers(
        &self,
        request: v1::ListContainersRequest,
    ) -> Result<v1::ListContainersResponse, CallError> {
        Ok(v1::ListContainersResponse { containers: self.container_messages(request.filter) })
    }

    pub(super) fn stream_containers(
        &self,
        request: v1::StreamContainersRequest,
    ) -> Result<Items<v1::StreamContainersResponse>, CallError> {
        let containers = self.container_messages(request.filter);
        pages(PAGE, &containers, |containers| v1::StreamContainersResponse { containers })
    }

    pub(super) async fn update_container_resources(
        &self,
        request: v1::UpdateContainerResourcesRequest,
    ) -> Result<v1::UpdateContainerResourcesResponse, CallError> {
        let container = self.container(&request.container_id)?;
        let linux = request.linux.ok_or(CallError::Missing("linux"))?;
        apart(async move {
            container::update::resources(&container, |current| {
                Ok(convert::updated_resources(&Field::root("linux"), current, &linux)?)
            })
            .await
        })
        .await?;
        Ok(v1::UpdateContainerResourcesResponse {})
    }

    pub(super) async fn reopen_container_log(
        &self,
        request: v1::ReopenContainerLogRequest,
    ) -> Result<v1::ReopenContainerLogResponse, CallError> {
        let container = self.container(&request.container_id)?;
        container::update::reopen_log(&container).await?;
        Ok(v1::ReopenContainerLogResponse {})
    }

    /// The containers that match a filter, the newest first.
    pub(super) fn containers(&self, filter: &ContainerFilter) -> Vec<Arc<Container>> {
        let mut containers = self.node.registry.containers();
        containers.sort_by_key(|container| std::cmp::Reverse(container.record().created_at_unix_ns));
        containers.retain(|container| with_view(&container.snapshot(), |view| filter.matches(view)));
        containers
    }

    fn container_messages(&self, filter: Option<v1::ContainerFilter>) -> Vec<v1::Container> {
        let containers = self.containers(&ContainerFilter::new(filter));
        containers.iter().map(|container| with_view(&container.snapshot(), convert::container)).collect()
    }
}

/// Whether SELinux options have an effect on this node.
pub(super) fn selinux(node: &Node) -> convert::SeLinux {
    if node.facts.selinux_is_on { convert::SeLinux::On } else { convert::SeLinux::Off }
}

/// A container for an answer.
pub(super) fn with_view<T>(container: &ContainerSnapshot, look: impl FnOnce(&ContainerView<'_>) -> T) -> T {
    let ContainerSnapshot { record, resources, state } = container;
    let changed = resources.clone().map(|resources| ContainerConfig { resources, ..record.config.clone() });
    look(&ContainerView {
        id: &record.id,
        sandbox_id: &record.sandbox_id,
        config: changed.as_ref().unwrap_or(&record.config),
        image_id: &record.image_id,
        image_name: &record.image_name,
        image_ref: &record.image_ref,
        created_at_unix_ns: record.created_at_unix_ns,
        state,
        log_path: &record.log_path,
        uid: record.uid,
        gid: record.gid,
        groups: &record.groups,
        stop_signal: record.stop_signal,
    })
}
