//! `berth doctor`: what is wrong with this node, and what to do.

use std::path::Path;
use std::process::ExitCode;

use berth_api::v1::InfoRequest;
use berth_cri::v1::StatusRequest;

use crate::checkup::{Finding, Grade, finding, look};
use crate::daemon::{Daemon, answer};
use crate::error::{Error, FAILURE};
use crate::{one_line, output, table};

/// Looks at the node and at its daemon, and prints a line for each finding. The exit code says whether something is broken.
///
/// # Errors
/// When nobody reads the report; a daemon that is not there is a finding.
pub(crate) async fn doctor(socket: &Path) -> Result<ExitCode, Error> {
    let mut findings = look(Path::new("/"));
    match ask(socket).await {
        Ok(more) => findings.extend(more),
        Err(error) => findings.push(finding(Grade::Broken, "berthd", one_line(&error))),
    }
    output::text(&report(&findings))?;
    let broken = findings.iter().any(|finding| finding.grade == Grade::Broken);
    Ok(if broken { ExitCode::from(FAILURE) } else { ExitCode::SUCCESS })
}

/// What the daemon says of itself: the conditions that a kubelet asks for.
async fn ask(socket: &Path) -> Result<Vec<Finding>, Error> {
    let daemon = Daemon::connect(socket).await?;
    let request = StatusRequest { verbose: false };
    let status = answer("ask for the status", daemon.runtime.clone().status(request)).await?;
    let info = answer("ask for information", daemon.own.clone().info(InfoRequest {})).await?;
    let driver = info.cgroup.unwrap_or_default().driver;
    let conditions = status.status.unwrap_or_default().conditions;
    let mut findings = vec![finding(Grade::Good, "berthd", format!("answers on {}", socket.display()))];
    findings.push(finding(
        Grade::Good,
        "driver",
        format!("{driver}; a kubelet with another cgroupDriver has to be given this one"),
    ));
    findings.extend(conditions.into_iter().filter(|condition| !condition.status).map(|condition| {
        let text = format!(
            "{} is false: {} {}; the daemon's log says more",
            condition.r#type, condition.reason, condition.message
        );
        finding(Grade::Broken, "berthd", text)
    }));
    Ok(findings)
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

    #[tokio::test]
    async fn a_missing_daemon_is_broken() {
        let folder = tempfile::tempdir().unwrap();
        assert!(ask(&folder.path().join("berth.sock")).await.is_err());
    }
}
