//! The CRI edge: the only module that names CRI messages.
//!
//! - `convert`: messages into plain data, checked, and back;
//! - `runtime_service`, `image_service`: the two services, one method a call;
//! - `stats`, `metrics`: numbers of containers and pods as CRI messages;
//! - `info`: the verbose JSON that node tools read;
//! - `status`: errors as gRPC codes, the one place for that.

pub mod convert;
mod image_service;
mod info;
mod metrics;
mod runtime_service;
mod stats;
pub(crate) mod status;

pub(crate) use image_service::ImageService;
pub(crate) use runtime_service::RuntimeService;
