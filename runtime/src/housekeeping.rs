//! What can wait until the daemon serves: deleting what was thrown away before, and reading again what could
//! not be read.
//!
//! Nothing waits for this. What fails is logged, and tried again by the next start at the
//! latest.

use crate::log_rotation;
use crate::node::Node;
use crate::trash;
use std::sync::Arc;
use std::time::Duration;

/// How soon records of images that could not be read are read again, and how rarely in the end.
const FIRST_LOOK: Duration = Duration::from_secs(1);
const LAST_LOOK: Duration = Duration::from_secs(60);

/// Begins with it, in the background.
pub(crate) fn begin(node: &Arc<Node>) {
    let emptying = node.clone();
    tokio::task::spawn_blocking(move || {
        if let Err(error) = trash::empty(&emptying.layout) {
            tracing::warn!(%error, "cannot empty the trash");
        }
    });
    node.images.sweep();
    node.collect_images();
    tokio::spawn(look_again(node.clone()));
    tokio::spawn(log_rotation::keep(node.clone()));
}

/// Reads again what the image store could not read, until nothing is left.
async fn look_again(node: Arc<Node>) {
    let mut pause = FIRST_LOOK;
    loop {
        let looking = node.clone();
        // A panic in there is a bug that is logged; looking again would bring it again.
        let unread = tokio::task::spawn_blocking(move || looking.images.look_again()).await;
        if !unread.unwrap_or(false) {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
    }
}
