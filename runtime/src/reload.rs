//! The configuration, reloaded while pods run: on SIGHUP, which `berthd --reload` and with it
//! `systemctl reload berthd` sends ([`crate::reload_request`]).
//!
//! Settings for new work take effect at once: images, registries, resource limits of new
//! containers, the log. Anything opened or built at the start stays as it is until the next one,
//! and is named in the log. An invalid configuration changes nothing.

use std::fmt;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::config::Config;
use crate::node::Node;
use crate::notify::Notifier;
use crate::reload_request::Progress;

/// Reads the files and flags of the program again; the error lists all mistakes.
pub type Read = Arc<dyn Fn() -> Result<Config, String> + Send + Sync>;

/// Applies a new filter ([`Config::log`]).
pub type SetLog = Box<dyn Fn(&str) + Send + Sync>;

/// What the daemon needs to reload its configuration.
pub struct Reload {
    /// A message for each request.
    pub wanted: mpsc::Receiver<()>,
    /// Reads the configuration. May block.
    pub read: Read,
    /// Sets the filter of the log.
    pub set_log: SetLog,
}

impl fmt::Debug for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reload")
    }
}

/// Reloads on each request. Ends with the sender of [`Reload::wanted`]. `status` is what the
/// service manager shows afterwards.
pub(crate) async fn serve(
    node: Arc<Node>,
    notifier: Arc<Notifier>,
    status: fn(&Node) -> String,
    mut reload: Reload,
    mut progress: Progress,
) {
    while reload.wanted.recv().await.is_some() {
        notifier.reloading();
        progress.begin();
        let read = reload.read.clone();
        let mistakes = match tokio::task::spawn_blocking(move || read()).await {
            Ok(Ok(config)) => {
                take_over(&node, config, &reload.set_log);
                String::new()
            }
            Ok(Err(mistakes)) => {
                tracing::error!(
                    "{mistakes}; nothing was changed, and the previous configuration stays in force"
                );
                mistakes
            }
            Err(error) => {
                tracing::error!(%error, "reloading the configuration was interrupted");
                format!("reloading the configuration was interrupted: {error}")
            }
        };
        progress.finish(&mistakes);
        notifier.ready(&status(&node));
    }
}

fn take_over(node: &Node, read: Config, set_log: &SetLog) {
    let before = node.config();
    let (config, waiting) = before.taking_over(read);
    set_log(&config.log);
    let changed = before.differences(&config);
    node.set_config(config);
    match changed.as_slice() {
        [] => tracing::info!("configuration reloaded; nothing changed"),
        keys => tracing::info!(changed = keys.join(", "), "configuration reloaded"),
    }
    if !waiting.is_empty() {
        tracing::warn!(
            keys = waiting.join(", "),
            "some changes take effect when berthd is restarted; until then the previous values are in force"
        );
    }
}
