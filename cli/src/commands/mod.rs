//! The subcommands, one file each.

pub(crate) mod attach;
pub(crate) mod completion;
pub(crate) mod cp;
pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod images;
pub(crate) mod import;
pub(crate) mod info;
pub(crate) mod inspect;
pub(crate) mod logs;
pub(crate) mod port_forward;
pub(crate) mod ps;
pub(crate) mod pull;
pub(crate) mod rm;
pub(crate) mod run;
pub(crate) mod stats;
pub(crate) mod stop;
