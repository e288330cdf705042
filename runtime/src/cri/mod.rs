//! The CRI edge: the only module that names CRI messages.
//!
//! - `runtime_service`, `image_service`: the two services, as tables (`table`) of calls;
//! - `runtime`, `sandbox`, `container`, `exec`, `events`, `image`, `stats`, `metrics`: the calls,
//!   by the object that they are about, each under its CRI name; `not_offered`: unsupported calls;
//! - `convert`: converts messages to checked plain data, and back;
//! - `pages`: lists as streams;
//! - `info`: the verbose JSON that node tools read;
//! - `error`: errors as gRPC codes, the one place for that.

mod container;
pub mod convert;
pub(crate) mod error;
mod events;
mod exec;
mod image;
mod image_service;
mod info;
mod metrics;
mod not_offered;
mod pages;
mod runtime;
mod runtime_service;
mod sandbox;
mod stats;
mod table;

pub(crate) use image_service::ImageService;
pub(crate) use runtime_service::RuntimeService;
