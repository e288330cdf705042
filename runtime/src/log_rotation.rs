//! Rotates the logs of pods that ask for it by an annotation: those of `berth run`, which no kubelet looks
//! after. It happens here, and not in the command, because such a pod runs without one when it is detached.
//!
//! ```text
//!  main.log.3 -> main.log.4      main.log.1 -> main.log.2      main.log -> main.log.1, then the shim reopens
//! ```
//! As with a kubelet the limit is looked at now and then: a log may grow beyond it for [`LOOK`].

use crate::container::{self, Container};
use crate::node::Node;
use crate::sandbox::Sandbox;
use berth_model::state::ContainerState;
use berth_sys::beneath::{Dir, FileType, Root};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// On a sandbox: how many bytes a log of its containers may have.
const ANNOTATION: &str = "berth.log-bytes";

/// On every sandbox of a kubelet: where it has the pod from (Kubernetes, `pkg/kubelet/types`,
/// `ConfigSourceAnnotationKey`). A pod's author can neither remove nor set it.
const OF_A_KUBELET: &str = "kubernetes.io/config.source";

/// The least that is taken from it: a log of less would be rotated all the time.
const LEAST_BYTES: u64 = 4096;

/// How often logs are looked at: as often as a kubelet does.
const LOOK: Duration = Duration::from_secs(10);

/// Files that are kept beside the one that is written.
const KEPT: u32 = 4;

/// Looks after the logs for ever.
pub(crate) async fn keep(node: Arc<Node>) {
    loop {
        tokio::time::sleep(LOOK).await;
        for sandbox in node.registry.sandboxes() {
            let Some(limit) = limit(&sandbox.config().annotations) else { continue };
            for container in node.registry.containers_of(sandbox.id()) {
                look_after(&sandbox, &container, limit).await;
            }
        }
    }
}

/// The limit of a sandbox that asks for one. One of a kubelet never does: its annotations are the pod
/// author's, and its logs the kubelet's to rotate.
fn limit(annotations: &BTreeMap<String, String>) -> Option<u64> {
    if annotations.contains_key(OF_A_KUBELET) {
        return None;
    }
    let bytes = annotations.get(ANNOTATION)?.parse::<u64>().ok()?;
    (bytes > 0).then_some(bytes.max(LEAST_BYTES))
}

async fn look_after(sandbox: &Sandbox, container: &Arc<Container>, limit: u64) {
    let (directory, name) = (sandbox.config().log_directory.clone(), container.config().log_path.clone());
    let runs = matches!(container.state(), ContainerState::Running { .. });
    if !runs || directory.is_empty() || name.is_empty() {
        return;
    }
    let rotating =
        tokio::task::spawn_blocking(move || rotate_if_large(Path::new(&directory), Path::new(&name), limit));
    let outcome = match rotating.await {
        Ok(Ok(false)) | Err(_) => return,
        Ok(Ok(true)) => container::update::reopen_log(container).await.map_err(|error| crate::chain(&error)),
        Ok(Err(error)) => Err(error.to_string()),
    };
    if let Err(error) = outcome {
        // Tried again at the next look: a log that is not there asks for a new one.
        tracing::warn!(container = %container.id(), error, "could not rotate the log");
    }
}

/// Moves a log away that has grown beyond the limit. Returns whether the shim has to make a new one, which is
/// also so when there is none. Pods can plant links in their log directory, so none is followed.
fn rotate_if_large(directory: &Path, name: &Path, limit: u64) -> io::Result<bool> {
    let below = name.parent().unwrap_or(Path::new(""));
    let Some(name) = name.file_name() else { return Ok(false) };
    let directory = Root::open(directory)?.open_dir_no_links(below)?;
    match directory.stat(name) {
        Ok(stat) if stat.file_type != FileType::Regular || stat.size <= limit => Ok(false),
        Ok(_) => rotate(&directory, name).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

fn rotate(directory: &Dir, name: &OsStr) -> io::Result<()> {
    let numbered = |number: u32| -> OsString {
        let mut name = name.to_owned();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        name
    };
    for number in (0..KEPT).rev() {
        match directory.rename(&numbered(number), directory, &numbered(number + 1)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && number > 0 => {}
            renamed => renamed?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn annotations_of_pods_of_a_kubelet_ask_for_nothing() {
        let mut annotations = BTreeMap::from([(ANNOTATION.to_owned(), "1".to_owned())]);
        assert_eq!(limit(&annotations), Some(LEAST_BYTES));
        annotations.insert(OF_A_KUBELET.to_owned(), "api".to_owned());
        assert_eq!(limit(&annotations), None);
        assert_eq!(limit(&BTreeMap::from([(ANNOTATION.to_owned(), "0".to_owned())])), None);
    }

    #[test]
    fn a_log_that_is_too_large_is_moved_and_the_oldest_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let look = || rotate_if_large(directory.path(), Path::new("main.log"), 3).unwrap();
        assert!(look(), "there is none");
        for round in 0..7 {
            fs::write(path("main.log"), "abc").unwrap();
            assert!(!look());
            fs::write(path("main.log"), format!("log {round}")).unwrap();
            assert!(look());
            assert!(!path("main.log").exists());
        }
        for (number, round) in [(1, 6), (2, 5), (3, 4), (4, 3)] {
            let log = fs::read_to_string(path(&format!("main.log.{number}"))).unwrap();
            assert_eq!(log, format!("log {round}"));
        }
        assert!(!path("main.log.5").exists());
    }

    #[test]
    fn planted_links_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("main.log"), "of the host").unwrap();
        let look = |name: &str| rotate_if_large(directory.path(), Path::new(name), 3);
        std::os::unix::fs::symlink(outside.path().join("main.log"), directory.path().join("main.log"))
            .unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("sub")).unwrap();
        assert!(!look("main.log").unwrap());
        assert!(look("sub/main.log").is_err());
        assert!(outside.path().join("main.log").exists());
    }
}
