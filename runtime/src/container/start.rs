//! StartContainer: one message to the shim, which lets the waiting process become its program.

use super::{Container, ContainerError};
use crate::shim_client::ShimError;
use berth_model::state::{ContainerEvent, ContainerState};
use std::sync::Arc;

/// Starts it. On return the program runs, or the container has ended with the reason.
pub(crate) async fn start(container: &Arc<Container>) -> Result<(), ContainerError> {
    let _alone = container.operation.lock().await;
    let state = container.state();
    let shim = container.shim();
    let (ContainerState::Created, Some(shim)) = (&state, shim) else {
        return Err(ContainerError::WrongState { id: container.id().clone(), state: state.name() });
    };
    match shim.start().await {
        Ok(at_unix_ns) => {
            // A program that has ended already is past this state; its end has the time too.
            let _ = container.apply(ContainerEvent::Started { at_unix_ns });
            tracing::info!(container = %container.id(), name = %container.config().metadata.name, "container runs");
            Ok(())
        }
        Err(error @ ShimError::Failed(_)) => {
            // The shim has written how it ended; after this call nobody may see it as created.
            container.exited().await;
            Err(error.into())
        }
        Err(error) => Err(error.into()),
    }
}
