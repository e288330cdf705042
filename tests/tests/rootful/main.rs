//! The real daemon and shim over the real socket: one module for each part of the contract.
#![forbid(unsafe_code)]

mod apparmor;
mod census;
mod clients;
mod command;
mod configuration;
mod containers;
mod crictl;
mod daemonsets;
mod escape;
mod exec;
mod faults;
mod floods;
mod image_faults;
mod images;
mod inheritance;
mod isolation;
mod lists;
mod logs;
mod mount_places;
mod odd_images;
mod pods;
mod privileges;
mod recovery;
mod refusals;
mod registry;
mod resources;
mod shared_files;
mod shim;
mod slow_shims;
mod stats;
mod stop;
mod syscalls;
mod targets;
mod unreadable;
mod users;
