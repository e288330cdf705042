//! The OCI runtime spec as a plan for the shim.
