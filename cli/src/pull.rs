//! Fetches an image: through Berth's own service, which tells how far it is, or through CRI where that is missing.

use std::time::Instant;

use berth_api::v1::pull_event::Event;
use berth_api::v1::{PullEvent, PullRequest};
use berth_cri::v1::{AuthConfig, PullImageRequest};
use tonic::{Code, Streaming};

use crate::daemon::{CallError, Daemon, answer, image_spec};
use crate::output;
use crate::progress::LayerBars;
use crate::quantity::bytes_text;

/// Who asks the registry for the image. No `Debug`, so that the password stays out of messages.
pub(crate) struct Credentials {
    /// Name of an account.
    pub(crate) username: String,
    /// Its password or access token.
    pub(crate) password: String,
}

/// How much of a pull is told on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Narration {
    /// Bars while it runs, and a line when it is done.
    Full,
    /// Nothing.
    Silent,
}

/// Why a pull did not bring an image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    /// The daemon refused or failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The daemon ended the call well without naming an image.
    #[error("pull {0}: the daemon did not say what it pulled")]
    NoImage(String),
}

/// Pulls an image and returns its id. Going away cancels the pull.
///
/// # Errors
/// When the image cannot be had.
pub(crate) async fn pull(
    daemon: &Daemon,
    image: &str,
    credentials: Option<Credentials>,
    narration: Narration,
) -> Result<String, PullError> {
    let started = Instant::now();
    let (username, password) =
        credentials.map_or_else(Default::default, |given| (given.username, given.password));
    let request = PullRequest { image: image.to_owned(), username, password, ..PullRequest::default() };
    let act = format!("pull {image}");
    let mut bars = LayerBars::new(narration == Narration::Full);
    let id = match answer(act.as_str(), daemon.own.clone().pull(request.clone())).await {
        Ok(events) => {
            watch(&act, events, &mut bars).await?.ok_or_else(|| PullError::NoImage(image.to_owned()))?
        }
        Err(error) if error.refusal.code == Code::Unimplemented => pull_unwatched(daemon, request).await?,
        Err(error) => return Err(error.into()),
    };
    let loaded = bars.bytes_loaded();
    drop(bars);
    if narration == Narration::Full {
        let seconds = started.elapsed().as_secs_f64();
        output::remark(format_args!("pulled {image}: {} in {seconds:.1} s", bytes_text(loaded)));
    }
    Ok(id)
}

async fn watch(
    act: &str,
    mut events: Streaming<PullEvent>,
    bars: &mut LayerBars,
) -> Result<Option<String>, CallError> {
    let mut id = None;
    loop {
        let next = events.message().await;
        let next = next.map_err(|status| CallError { act: act.to_owned(), refusal: status.into() })?;
        let Some(event) = next else { return Ok(id) };
        match event.event {
            Some(Event::Resolved(resolved)) => bars.expect_layers(&resolved.layers),
            Some(Event::Layer(layer)) => bars.show(&layer),
            Some(Event::Image(image)) => id = Some(image.id),
            // From a newer daemon.
            None => {}
        }
    }
}

async fn pull_unwatched(daemon: &Daemon, request: PullRequest) -> Result<String, CallError> {
    let PullRequest { image, username, password, identity_token } = request;
    let auth = AuthConfig { username, password, identity_token, ..AuthConfig::default() };
    let auth = if auth == AuthConfig::default() { None } else { Some(auth) };
    let request = PullImageRequest { image: Some(image_spec(&image)), auth, sandbox_config: None };
    Ok(answer(format!("pull {image}"), daemon.images.clone().pull_image(request)).await?.image_ref)
}
