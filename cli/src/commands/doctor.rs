//! `berth doctor`: what is wrong with this node, and what to do.

use std::path::Path;
use std::process::ExitCode;

use berth_api::v1::{InfoRequest, InfoResponse};
use berth_checkup::{Finding, Grade, finding, look};
use berth_cri::v1::{RuntimeCondition, StatusRequest};

use crate::daemon::{Daemon, ask};
use crate::error::{Error, FAILURE};
use crate::{output, table};

/// Checks the node and its daemon, and prints a line for each finding. The exit code says whether
/// something is broken.
///
/// # Errors
/// When the report cannot be written; a missing daemon is a finding.
pub(crate) async fn doctor(socket: &Path) -> Result<ExitCode, Error> {
    let mut daemon = berth_checkup::Daemon { socket: socket.to_owned(), ..Default::default() };
    let of_daemon = match ask_daemon(socket).await {
        Ok((info, conditions)) => {
            let findings = judge(socket, &info, conditions);
            take_over(&mut daemon, info);
            findings
        }
        // Its directories are unknown then; those of a daemon without a configuration are checked.
        Err(error) => vec![finding(Grade::Broken, "berthd", error.one_line())],
    };
    let mut findings = look(Path::new("/"), &daemon);
    findings.extend(of_daemon);
    output::text(&report(&findings))?;
    let broken = findings.iter().any(|finding| finding.grade == Grade::Broken);
    Ok(if broken { ExitCode::from(FAILURE) } else { ExitCode::SUCCESS })
}

/// The daemon's own report, and the conditions that a kubelet asks for.
async fn ask_daemon(socket: &Path) -> Result<(InfoResponse, Vec<RuntimeCondition>), Error> {
    let daemon = Daemon::connect(socket).await?;
    let request = StatusRequest { verbose: false };
    let status = ask("get the status", daemon.runtime.clone().status(request)).await?;
    let info = ask("get information", daemon.own.clone().info(InfoRequest {})).await?;
    Ok((info, status.status.unwrap_or_default().conditions))
}

fn take_over(daemon: &mut berth_checkup::Daemon, info: InfoResponse) {
    daemon.root = info.root.into();
    daemon.state = info.state.into();
    if let Some(network) = info.network {
        // An older daemon does not tell.
        if !network.cni_config_directory.is_empty() {
            daemon.cni_config_directory = network.cni_config_directory.into();
            daemon.cni_plugin_directories =
                network.cni_plugin_directories.into_iter().map(Into::into).collect();
        }
        if network.kind == "bridge" {
            daemon.network_kind = network.kind;
            daemon.bridge = network.name;
        }
    }
    daemon.cgroup_driver = info.cgroup.unwrap_or_default().driver;
    daemon.cadvisor_socket = Some(info.cadvisor_socket).filter(|path| !path.is_empty()).map(Into::into);
    daemon.min_free_bytes = info.min_free_bytes;
    daemon.min_free_percent = u8::try_from(info.min_free_percent).unwrap_or(u8::MAX);
}

fn judge(socket: &Path, info: &InfoResponse, conditions: Vec<RuntimeCondition>) -> Vec<Finding> {
    let driver = info.cgroup.clone().unwrap_or_default().driver;
    let mut findings = vec![finding(Grade::Good, "berthd", format!("answers on {}", socket.display()))];
    findings.push(finding(
        Grade::Good,
        "driver",
        format!("{driver}; the kubelet's cgroupDriver must be the same"),
    ));
    findings.extend(conditions.into_iter().filter(|condition| !condition.status).map(|condition| {
        let text = format!(
            "{} is false: {} {}; see the daemon's log",
            condition.r#type, condition.reason, condition.message
        );
        finding(Grade::Broken, "berthd", text)
    }));
    findings.extend(info.faults.iter().map(|fault| finding(Grade::Note, "faults", fault.clone())));
    findings
}

fn report(findings: &[Finding]) -> String {
    let line = |found: &Finding| {
        let grade = match found.grade {
            Grade::Good => "ok",
            Grade::Note => "note",
            Grade::Broken => "BROKEN",
        };
        format!("{grade:<8}{:<12}{}\n", found.subject, table::printable(&found.text))
    };
    findings.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line_that_begins_with_how_bad_it_is() {
        let findings = [
            finding(Grade::Good, "kernel", "6.12"),
            finding(Grade::Note, "network", "odd\nname"),
            finding(Grade::Broken, "berthd", "gone"),
        ];
        assert_eq!(
            report(&findings),
            "ok      kernel      6.12\nnote    network     odd?name\nBROKEN  berthd      gone\n"
        );
    }

    #[test]
    fn what_a_kubelet_would_be_told_is_broken_is() {
        let faults = vec!["image x is damaged".to_owned()];
        let info = InfoResponse { root: "/r".into(), min_free_percent: 7, faults, ..InfoResponse::default() };
        let condition = RuntimeCondition { r#type: "NetworkReady".into(), ..RuntimeCondition::default() };
        let good = RuntimeCondition { status: true, ..condition.clone() };
        let findings = judge(Path::new("/s"), &info, vec![condition, good]);
        let broken: Vec<_> = findings.iter().filter(|found| found.grade == Grade::Broken).collect();
        assert!(
            matches!(broken[..], [found] if found.text.starts_with("NetworkReady is false")),
            "{findings:?}"
        );
        assert!(findings.contains(&finding(Grade::Note, "faults", "image x is damaged")));
        let mut daemon = berth_checkup::Daemon::default();
        take_over(&mut daemon, info);
        assert_eq!(
            (daemon.root.to_str(), daemon.min_free_bytes, daemon.min_free_percent),
            (Some("/r"), 0, 7)
        );
    }

    #[tokio::test]
    async fn a_missing_daemon_is_broken() {
        let directory = tempfile::tempdir().unwrap();
        assert!(ask_daemon(&directory.path().join("berth.sock")).await.is_err());
    }
}
