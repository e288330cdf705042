//! Objects whose records cannot be read: retried until they can be, or are gone.

use std::sync::Arc;
use std::time::Duration;

use berth_model::state::ContainerState;
use tokio::sync::Semaphore;

use super::{Verdict, container_of, sandbox_of};
use crate::container::{follow, recover};
use crate::node::Node;
use crate::record_files::Patience;
use crate::sandbox;

/// The pause between attempts.
const AGAIN: Duration = Duration::from_secs(10);

/// Retries while there are any. Those that can be read become visible.
pub(super) async fn try_again(node: Arc<Node>, room: Arc<Semaphore>) {
    loop {
        let unread = node.registry.unread();
        if unread.is_empty() {
            return;
        }
        tokio::time::sleep(AGAIN).await;
        for id in unread {
            let trying = node.clone();
            // A panic in there is a bug, which is logged.
            let _ = tokio::task::spawn_blocking(move || try_one(&trying, &id)).await;
        }
        // A recovered container is followed like any other.
        for container in node.registry.containers() {
            if container.is_unfollowed() && !matches!(container.state(), ContainerState::Exited(_)) {
                follow::find(&container, &room);
            }
        }
    }
}

fn try_one(node: &Arc<Node>, id: &str) {
    let patience = Patience::of(Duration::ZERO);
    let (Ok(container), Ok(sandbox)) = (id.parse(), id.parse()) else { return };
    let is_container = node.layout.container(&container).durable.exists();
    let gone = if is_container {
        match container_of(node, &container, &patience) {
            Verdict::Is(found) => {
                // A container is never visible without its sandbox.
                let sandbox = found.sandbox_id().clone();
                node.registry.adopt_container(found.clone());
                if !node.registry.has(sandbox.as_str())
                    && let Verdict::Is(found) = sandbox_of(node, &sandbox, &patience)
                {
                    sandbox::recover::adopt(node, found);
                }
                recover::report_end(&found);
                false
            }
            Verdict::Unread => false,
            Verdict::Nothing => true,
        }
    } else {
        match sandbox_of(node, &sandbox, &patience) {
            Verdict::Is(found) => {
                sandbox::recover::adopt(node, found);
                false
            }
            Verdict::Unread => false,
            Verdict::Nothing => true,
        }
    };
    if gone {
        node.registry.forget_unread(id);
    }
}
