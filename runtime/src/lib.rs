//! The daemon.
//!
//! `docs/ARCHITECTURE.md` has the map. In short: [`cri`] is the edge, where requests become plain data; `sandbox` and `container` own the
//! objects; `oci_spec` and `plan` turn what was asked for into what a shim does; `shim_client` talks to the shims.
#![forbid(unsafe_code)]

pub mod cri;
pub mod oci_spec;
pub mod plan;
