//! The configuration, reloaded while pods run: on SIGHUP, which `berthd --reload` and with it
//! `systemctl reload berthd` sends ([`crate::reload_request`]).
//!
//! What new work goes by takes effect at once: images, registries, resource limits of new containers, the
//! log. What the daemon has opened or built by its start stays as it was until the next one, and is named in
//! the log. A configuration that is wrong changes nothing.

use crate::config::Config;
use crate::node::Node;
use crate::notify::Notifier;
use crate::reload_request::Progress;
use std::fmt;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Reads the files and flags of the program again; the error says everything that is wrong with them.
pub type Read = Arc<dyn Fn() -> Result<Config, String> + Send + Sync>;

/// Puts another filter ([`Config::log`]) into force.
pub type SetLog = Box<dyn Fn(&str) + Send + Sync>;

/// What the daemon needs to reload its configuration.
pub struct Reload {
    /// A message for each time that it is to.
    pub wanted: mpsc::Receiver<()>,
    /// How. It may block.
    pub read: Read,
    /// Where the log's filter goes.
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
