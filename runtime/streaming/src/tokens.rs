//! What a streaming URL stands for: once, and for a minute.
//!
//! A token has 256 random bits and is the only protection of a URL. It is looked up in a hash table
//! with a random key, so the time of a lookup says nothing about the existing tokens.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::command::{Run, Wanted};
use crate::forward::Connect;

/// How long a token can be used.
pub const LIFETIME: Duration = Duration::from_secs(60);

/// Tokens that may wait for their client.
pub const MAX_PENDING: usize = 1000;

/// The three calls, as the first part of a URL's path names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/exec/`
    Exec,
    /// `/attach/`
    Attach,
    /// `/portforward/`
    PortForward,
}

impl Endpoint {
    const ALL: [(Self, &str); 3] =
        [(Self::Exec, "exec"), (Self::Attach, "attach"), (Self::PortForward, "portforward")];

    /// Its name in a path.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(endpoint, _)| *endpoint == self).map_or("", |(_, name)| name)
    }

    /// The endpoint and the token of a path.
    pub(crate) fn of_path(path: &str) -> Option<(Self, &str)> {
        let (name, token) = path.strip_prefix('/')?.split_once('/')?;
        Self::ALL.iter().find(|(_, found)| *found == name).map(|(endpoint, _)| (*endpoint, token))
    }
}

/// The task for the client that shows the token.
pub enum Task {
    /// Run a command on its streams.
    Command(Wanted, Run),
    /// Connect to ports for it: to any, or to these for a client that names none itself.
    Forward(Connect, Vec<u16>),
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Command(wanted, _) => f.debug_tuple("Command").field(wanted).finish(),
            Self::Forward(_, ports) => f.debug_tuple("Forward").field(ports).finish(),
        }
    }
}

/// Why no token was issued.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// [`MAX_PENDING`] are pending already.
    #[error("too many streaming requests: {MAX_PENDING} are already waiting for their clients")]
    TooMany,
    /// The kernel returned no random bytes.
    #[error("cannot generate a token")]
    Random(#[source] getrandom::Error),
}

struct Pending {
    endpoint: Endpoint,
    task: Task,
    until: Instant,
}

/// The tokens that wait for their clients.
#[derive(Default)]
pub struct Tokens(Mutex<HashMap<String, Pending>>);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // They are secrets.
        f.debug_struct("Tokens").field("pending", &self.pending().len()).finish()
    }
}

impl Tokens {
    fn pending(&self) -> MutexGuard<'_, HashMap<String, Pending>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that have not expired.
    fn current(&self) -> MutexGuard<'_, HashMap<String, Pending>> {
        let (mut pending, now) = (self.pending(), Instant::now());
        pending.retain(|_, pending| pending.until > now);
        pending
    }

    /// Keeps `task` for the client that shows the returned token.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn insert(&self, endpoint: Endpoint, task: Task) -> Result<String, TokenError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(TokenError::Random)?;
        let token = hex::encode(bytes);
        let mut pending = self.current();
        if pending.len() >= MAX_PENDING {
            return Err(TokenError::TooMany);
        }
        pending.insert(token.clone(), Pending { endpoint, task, until: Instant::now() + LIFETIME });
        Ok(token)
    }

    /// Whether the token can be used at this endpoint.
    pub(crate) fn is_known(&self, endpoint: Endpoint, token: &str) -> bool {
        self.current().get(token).is_some_and(|pending| pending.endpoint == endpoint)
    }

    /// The ports that were requested with the token.
    pub(crate) fn ports(&self, token: &str) -> Vec<u16> {
        match self.current().get(token) {
            Some(Pending { task: Task::Forward(_, ports), .. }) => ports.clone(),
            _ => Vec::new(),
        }
    }

    /// Uses the token up.
    pub(crate) fn take(&self, endpoint: Endpoint, token: &str) -> Option<Task> {
        let mut pending = self.current();
        if pending.get(token)?.endpoint != endpoint {
            return None;
        }
        pending.remove(token).map(|pending| pending.task)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn task() -> Task {
        Task::Forward(Arc::new(|_| Box::pin(async { Err(String::new()) })), Vec::new())
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_once_for_a_minute_at_its_endpoint() {
        let tokens = Tokens::default();
        let token = tokens.insert(Endpoint::Exec, task()).unwrap();
        assert_eq!(token.len(), 64);
        assert!(
            tokens.take(Endpoint::Attach, &token).is_none() && !tokens.is_known(Endpoint::Attach, &token)
        );
        assert!(tokens.is_known(Endpoint::Exec, &token) && tokens.take(Endpoint::Exec, &token).is_some());
        assert!(tokens.take(Endpoint::Exec, &token).is_none());
        let token = tokens.insert(Endpoint::Exec, task()).unwrap();
        tokio::time::advance(LIFETIME).await;
        assert!(tokens.take(Endpoint::Exec, &token).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_wait_and_no_more() {
        let tokens = Tokens::default();
        let all: std::collections::HashSet<String> =
            (0..MAX_PENDING).map(|_| tokens.insert(Endpoint::Exec, task()).unwrap()).collect();
        assert_eq!(all.len(), MAX_PENDING);
        assert!(matches!(tokens.insert(Endpoint::Exec, task()), Err(TokenError::TooMany)));
        tokio::time::advance(LIFETIME).await;
        assert!(tokens.insert(Endpoint::Exec, task()).is_ok());
        assert_eq!(tokens.pending().len(), 1);
    }

    #[test]
    fn paths_name_an_endpoint_and_a_token() {
        for endpoint in [Endpoint::Exec, Endpoint::Attach, Endpoint::PortForward] {
            assert_eq!(Endpoint::of_path(&format!("/{}/abc", endpoint.name())), Some((endpoint, "abc")));
        }
        for path in ["", "/", "/exec", "exec/abc", "/run/abc", "//exec/abc", "/EXEC/abc"] {
            assert_eq!(Endpoint::of_path(path), None, "{path}");
        }
    }
}
