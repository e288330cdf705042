//! Labels that a kubelet sets on pods and containers (`pkg/kubelet/types/labels.go`), and by which
//! crictl, cAdvisor and the kubelet itself find their names.

/// Name of the container in its pod.
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// Name of the pod.
pub const POD_NAME: &str = "io.kubernetes.pod.name";

/// Namespace of the pod.
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";

/// UID of the pod in the API server.
pub const POD_UID: &str = "io.kubernetes.pod.uid";
