//! The real daemon and shim over the real socket: one module for each part of the contract.
#![forbid(unsafe_code)]

mod apparmor;
mod census;
mod command;
mod configuration;
mod containers;
mod crictl;
mod escape;
mod exec;
mod faults;
mod floods;
mod images;
mod isolation;
mod lists;
mod logs;
mod pods;
mod mount_places;
mod privileges;
mod recovery;
mod refusals;
mod registry;
mod resources;
mod shim;
mod stats;
mod shared_files;
mod stop;
mod syscalls;
mod users;
mod targets;
