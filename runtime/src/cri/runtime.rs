//! Calls about the runtime itself: `Version`, `Status`, `RuntimeConfig` and `UpdateRuntimeConfig`.

use std::collections::BTreeMap;

use berth_cri::v1;

use super::error::CallError;
use super::info;
use super::runtime_service::RuntimeService;
use crate::handlers::Handler;

/// The version of the kubelet's runtime API; containerd and CRI-O report the same.
const KUBELET_API_VERSION: &str = "0.1.0";

impl RuntimeService {
    pub(super) fn version(&self, _request: v1::VersionRequest) -> Result<v1::VersionResponse, CallError> {
        Ok(v1::VersionResponse {
            version: KUBELET_API_VERSION.to_owned(),
            runtime_name: "berth".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: "v1".to_owned(),
        })
    }

    pub(super) fn status(&self, request: v1::StatusRequest) -> Result<v1::StatusResponse, CallError> {
        let condition = |kind: &str, state: Result<(), (&str, String)>| v1::RuntimeCondition {
            r#type: kind.to_owned(),
            status: state.is_ok(),
            reason: state.as_ref().err().map(|(reason, _)| (*reason).to_owned()).unwrap_or_default(),
            message: state.err().map(|(_, message)| message).unwrap_or_default(),
        };
        let network = self.node.network.state().map_err(|broken| (broken.reason, broken.message));
        let handler = |handler: &Handler| v1::RuntimeHandler {
            name: handler.name.clone(),
            features: Some(v1::RuntimeHandlerFeatures {
                recursive_read_only_mounts: handler.features.recursive_read_only_mounts,
                user_namespaces: handler.features.user_namespaces,
            }),
        };
        Ok(v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![condition("RuntimeReady", Ok(())), condition("NetworkReady", network)],
            }),
            info: if request.verbose { info::node(&self.node) } else { BTreeMap::new() },
            runtime_handlers: self.node.handlers.iter().map(handler).collect(),
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..v1::RuntimeFeatures::default()
            }),
        })
    }

    pub(super) fn runtime_config(
        &self,
        _request: v1::RuntimeConfigRequest,
    ) -> Result<v1::RuntimeConfigResponse, CallError> {
        let driver = match self.node.cgroups.driver {
            berth_cgroup::Driver::Cgroupfs => v1::CgroupDriver::Cgroupfs,
            berth_cgroup::Driver::Systemd => v1::CgroupDriver::Systemd,
        };
        let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        Ok(v1::RuntimeConfigResponse { linux: Some(linux) })
    }

    pub(super) async fn update_runtime_config(
        &self,
        request: v1::UpdateRuntimeConfigRequest,
    ) -> Result<v1::UpdateRuntimeConfigResponse, CallError> {
        let network = request.runtime_config.and_then(|config| config.network_config);
        if let Some(cidr) = network.map(|network| network.pod_cidr).filter(|cidr| !cidr.is_empty()) {
            self.blocking(move |node, _| node.network.take_pod_cidr(&cidr)).await??;
        }
        Ok(v1::UpdateRuntimeConfigResponse {})
    }
}
