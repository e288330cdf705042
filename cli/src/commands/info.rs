//! `berth version` and `berth info`: versions, settings and state.

use std::path::Path;

use berth_api::v1::{InfoRequest, InfoResponse};
use berth_cri::v1::{StatusRequest, StatusResponse, VersionRequest};

use crate::daemon::{Daemon, ask};
use crate::error::Error;
use crate::output;

/// Prints the version of this command, and the daemon's if one answers.
///
/// # Errors
/// When there is no daemon; our own version is printed anyway.
pub(crate) async fn version(socket: &Path) -> Result<(), Error> {
    output::line(format_args!("berth   {}", env!("CARGO_PKG_VERSION")))?;
    let daemon = Daemon::connect(socket).await?;
    let request = VersionRequest { version: String::new() };
    let version = ask("get the version", daemon.runtime.clone().version(request)).await?;
    let (name, number, api) = (version.runtime_name, version.runtime_version, version.runtime_api_version);
    Ok(output::line(format_args!("berthd  {number} ({name}, CRI {api})"))?)
}

/// Prints the daemon's settings and state.
///
/// # Errors
/// When a call to the daemon fails.
pub(crate) async fn info(daemon: &Daemon, socket: &Path) -> Result<(), Error> {
    let info = ask("get information", daemon.own.clone().info(InfoRequest {})).await?;
    let request = StatusRequest { verbose: false };
    let status = ask("get the status", daemon.runtime.clone().status(request)).await?;
    Ok(output::text(&info_text(socket, &info, &status))?)
}

/// A line for each fact: a label, padding, the value.
fn info_text(socket: &Path, info: &InfoResponse, status: &StatusResponse) -> String {
    let cgroup = info.cgroup.clone().unwrap_or_default();
    let network = info.network.clone().unwrap_or_default();
    let mut facts = vec![
        ("version", info.version.clone()),
        ("pid", info.pid.to_string()),
        ("socket", socket.display().to_string()),
        ("root", info.root.clone()),
        ("state", info.state.clone()),
        ("cgroups", format!("version {}, {} driver", cgroup.version, cgroup.driver)),
        (
            "network",
            format!("{} {} {}", network.kind, network.name, network.subnets.join(" ")).trim_end().to_owned(),
        ),
    ];
    for condition in status.status.iter().flat_map(|status| &status.conditions) {
        let state = match condition.status {
            true => "yes".to_owned(),
            false => format!("no: {} {}", condition.reason, condition.message).trim_end().to_owned(),
        };
        facts.push((condition.r#type.as_str(), state));
    }
    let width = facts.iter().map(|(word, _)| word.len()).max().unwrap_or(0) + 2;
    let line = |(word, fact): (&str, String)| format!("{word:width$}{}\n", crate::table::printable(&fact));
    facts.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use berth_api::v1::{CgroupInfo, NetworkInfo};
    use berth_cri::v1::{RuntimeCondition, RuntimeStatus};

    use super::*;

    #[test]
    fn every_fact_has_a_line() {
        let info = InfoResponse {
            version: "0.1.0".into(),
            pid: 7,
            root: "/var/lib/berth".into(),
            state: "/run/berth".into(),
            cgroup: Some(CgroupInfo { driver: "cgroupfs".into(), version: 1 }),
            network: Some(NetworkInfo {
                kind: "bridge".into(),
                name: "berth0".into(),
                subnets: vec!["10.88.0.0/16".into(), "fd00::/64".into()],
                ..NetworkInfo::default()
            }),
            ..InfoResponse::default()
        };
        let condition = |name: &str, status, reason: &str, message: &str| RuntimeCondition {
            r#type: name.into(),
            status,
            reason: reason.into(),
            message: message.into(),
        };
        let conditions = vec![
            condition("RuntimeReady", true, "", ""),
            condition("NetworkReady", false, "NetworkPluginNotReady", "no\nbridge"),
        ];
        let status =
            StatusResponse { status: Some(RuntimeStatus { conditions }), ..StatusResponse::default() };
        assert_eq!(
            info_text(Path::new("/run/berth/berth.sock"), &info, &status),
            "version       0.1.0\n\
             pid           7\n\
             socket        /run/berth/berth.sock\n\
             root          /var/lib/berth\n\
             state         /run/berth\n\
             cgroups       version 1, cgroupfs driver\n\
             network       bridge berth0 10.88.0.0/16 fd00::/64\n\
             RuntimeReady  yes\n\
             NetworkReady  no: NetworkPluginNotReady no?bridge\n"
        );
    }
}
