//! Pulls an image: through Berth's own service, which reports progress, or through the CRI where
//! that is missing.

use std::time::Instant;

use berth_api::v1::pull_event::Event;
use berth_api::v1::{PullEvent, PullRequest};
use berth_cri::v1::{AuthConfig, PullImageRequest};
use tonic::{Code, Streaming};

use crate::daemon::{CallError, Daemon, answer, image_spec};
use crate::output;
use crate::progress::LayerBars;
use crate::quantity::bytes_text;

/// Credentials for the registry. No `Debug`, so that the password stays out of messages.
pub(crate) struct Credentials {
    /// Account name.
    pub(crate) username: String,
    /// Password or access token.
    pub(crate) password: String,
}

/// How much of a pull is shown on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Narration {
    /// Progress bars, and a line when it is done.
    Full,
    /// Nothing.
    Silent,
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    /// The daemon refused or failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The call succeeded without naming an image.
    #[error("cannot pull {0}: the daemon did not name the image it pulled")]
    NoImage(String),
}

/// Pulls an image and returns its id. Dropping the future cancels the pull.
///
/// # Errors
/// When the pull fails.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use berth_api::v1::{LayerPhase, LayerProgress, PullResolved, PulledImage};
    use tonic::Status;

    use super::*;
    use crate::fake_daemon::{FakeDaemon, Script};

    fn event(event: Event) -> Result<PullEvent, Status> {
        Ok(PullEvent { event: Some(event) })
    }

    fn layer(phase: LayerPhase, bytes_done: u64) -> Result<PullEvent, Status> {
        let digest = "sha256:1".to_owned();
        event(Event::Layer(LayerProgress { digest, phase: phase.into(), bytes_done, bytes_total: 9 }))
    }

    async fn outcome(events: Vec<Result<PullEvent, Status>>) -> Result<String, PullError> {
        let fake = FakeDaemon::start(Script { pull: events, ..Script::default() }).await;
        pull(&fake.daemon, "busybox", None, Narration::Silent).await
    }

    #[tokio::test]
    async fn a_pull_ends_with_the_images_id() {
        let resolved = PullResolved {
            reference: "docker.io/library/busybox:latest".into(),
            layers: vec!["sha256:1".into()],
        };
        let id = outcome(vec![
            event(Event::Resolved(resolved)),
            layer(LayerPhase::Downloading, 4),
            layer(LayerPhase::Done, 9),
            Ok(PullEvent { event: None }),
            event(Event::Image(PulledImage { id: "sha256:2".into() })),
        ]);
        assert_eq!(id.await.unwrap(), "sha256:2");
    }

    #[tokio::test]
    async fn a_pull_that_breaks_off_is_no_success() {
        let broken =
            outcome(vec![layer(LayerPhase::Downloading, 4), Err(Status::unknown("digest mismatch"))]).await;
        assert!(
            matches!(broken, Err(PullError::Call(error)) if error.refusal.to_string() == "digest mismatch")
        );
        let silent = outcome(vec![layer(LayerPhase::Done, 9)]).await;
        assert!(matches!(silent, Err(PullError::NoImage(image)) if image == "busybox"));
    }

    #[tokio::test]
    async fn credentials_are_sent_along() {
        let script =
            Script { pull: vec![event(Event::Image(PulledImage { id: "x".into() }))], ..Script::default() };
        let pulled = Arc::clone(&script.pulled);
        let fake = FakeDaemon::start(script).await;
        let credentials = Credentials { username: "me".into(), password: "secret".into() };
        pull(&fake.daemon, "a/b", Some(credentials), Narration::Silent).await.unwrap();
        let pulled = pulled.lock().unwrap();
        let [request] = pulled.as_slice() else { panic!("one pull, not {}", pulled.len()) };
        assert_eq!(
            (request.image.as_str(), request.username.as_str(), request.password.as_str()),
            ("a/b", "me", "secret")
        );
    }

    #[tokio::test]
    async fn a_daemon_without_the_own_service_is_asked_through_cri() {
        let own_words = "not here";
        let error = outcome(vec![Err(Status::unimplemented(own_words))]).await.unwrap_err();
        let PullError::Call(error) = error else { panic!("not a refused call: {error:?}") };
        // The fake does not serve CRI either, so the second call is refused as well, and not in the
        // script's words.
        assert_eq!(error.refusal.code, Code::Unimplemented);
        assert!(!error.refusal.to_string().contains(own_words), "{}", error.refusal);
    }
}
