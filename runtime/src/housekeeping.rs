//! Work that can wait until the daemon serves: emptying the trash, and reading again what could
//! not be read.
//!
//! Nothing waits for this. Failures are logged, and retried at the next start at the
//! latest.

use std::sync::Arc;
use std::time::Duration;

use crate::log_rotation;
use crate::node::Node;
use crate::trash;

/// The first and the longest pause between attempts to read unreadable image records.
const FIRST_LOOK: Duration = Duration::from_secs(1);
const LAST_LOOK: Duration = Duration::from_secs(60);

/// Starts it, in the background.
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

/// Retries what the image store could not read, until nothing is left.
async fn look_again(node: Arc<Node>) {
    let mut pause = FIRST_LOOK;
    loop {
        let looking = node.clone();
        // A panic in there is a bug, which is logged; retrying would repeat it.
        let unread = tokio::task::spawn_blocking(move || looking.images.look_again()).await;
        if !unread.unwrap_or(false) {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
    }
}
