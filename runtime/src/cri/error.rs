//! Maps errors to gRPC codes, the only place for that, and logs failed requests.
//!
//! | situation | code |
//! |---|---|
//! | an unknown id or image | `NotFound` |
//! | an ambiguous id prefix | `InvalidArgument` |
//! | a name that is taken | `AlreadyExists` |
//! | an invalid request | `InvalidArgument` |
//! | an unsupported feature | `Unimplemented` |
//! | an object in the wrong state | `FailedPrecondition` |
//! | a command or a kill that took too long, a shim or a path of the host that hangs | `DeadlineExceeded` |
//! | a registry that cannot be reached | `Unknown`, with the text that kubelets look for |
//! | a program that cannot be started, a command whose end was not observed, an image that cannot be had | `Unknown` |
//! | too many streaming requests that wait for their clients, too many clients attached, a client that reads events too slowly | `ResourceExhausted` |
//! | the daemon is ending, a shim that cannot be reached, a streaming server that cannot listen yet, a path of the host that has hung before | `Unavailable` |
//! | anything else | `Internal` |
//!
//! Messages carry the whole chain of causes: they end up in a pod's events, in front of a reader
//! who has nothing else.

use std::borrow::Cow;
use std::error::Error;
use std::io;

use berth_image::reference::ParseReferenceError;
use berth_image::{ImportError, PullError, StoreError};
use berth_network::bridge::Error as BridgeError;
use berth_streaming::tokens::TokenError;
use berth_sys::errno::{EINVAL, ERANGE};
use tonic::{Code, Status};

use super::convert::Rejected;
use crate::chain;
use crate::container::ContainerError;
use crate::host_paths::HostPathError;
use crate::network::NetworkError;
use crate::sandbox::SandboxError;
use crate::shim_client::ShimError;
use crate::streaming::UrlError;

/// The longest message, in bytes. It travels escaped in HTTP/2 trailers, which some stacks limit to
/// 8 KiB.
const MAX_MESSAGE_BYTES: usize = 2048;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error(transparent)]
    Rejected(#[from] Rejected),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{kind} {id:?} not found")]
    NotFound { kind: &'static str, id: String },
    #[error("{kind} id {id:?} matches more than one {kind}")]
    Ambiguous { kind: &'static str, id: String },
    #[error("{0}")]
    NotOffered(&'static str),
    #[error(transparent)]
    Sandbox(Box<SandboxError>),
    #[error(transparent)]
    Container(Box<ContainerError>),
    #[error(transparent)]
    Reference(#[from] ParseReferenceError),
    #[error(transparent)]
    Pull(Box<PullError>),
    #[error(transparent)]
    Import(Box<ImportError>),
    #[error(transparent)]
    HostPath(Box<HostPathError>),
    #[error("{0}")]
    Auth(&'static str),
    #[error("{0}")]
    Argument(String),
    #[error(transparent)]
    Store(Box<StoreError>),
    #[error(transparent)]
    Network(Box<NetworkError>),
    #[error(transparent)]
    Stats(#[from] berth_cgroup::Error),
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error(
        "missed {missed} events, because this client did not read them in time; list everything and subscribe again"
    )]
    MissedEvents { missed: u64 },
    #[error("the pull was cancelled")]
    Cancelled,
    #[error("the daemon is stopping")]
    Stopping,
    #[error("cannot {action}")]
    File {
        action: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Large variants are boxed: every call returns this type, and they are rare.
macro_rules! boxed {
    ($($variant:ident($error:ty)),* $(,)?) => {
        $(impl From<$error> for CallError {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        })*
    };
}

boxed!(
    Sandbox(SandboxError),
    Container(ContainerError),
    Pull(PullError),
    Import(ImportError),
    HostPath(HostPathError),
    Store(StoreError),
    Network(NetworkError),
);

fn code(error: &CallError) -> Code {
    match error {
        CallError::Rejected(Rejected::Invalid { .. })
        | CallError::Missing(_)
        | CallError::Ambiguous { .. }
        | CallError::Auth(_)
        | CallError::Argument(_)
        | CallError::Reference(_) => Code::InvalidArgument,
        CallError::Rejected(Rejected::NotOffered { .. }) | CallError::NotOffered(_) => Code::Unimplemented,
        CallError::NotFound { .. } => Code::NotFound,
        CallError::Sandbox(error) => sandbox(error),
        CallError::Container(error) => container(error),
        CallError::Pull(error) => match **error {
            PullError::NotFound { .. } => Code::NotFound,
            // Kubelets match the beginning of the text of Unknown.
            _ => Code::Unknown,
        },
        CallError::Import(error) => silent_path(error).map_or(Code::FailedPrecondition, host_path),
        CallError::HostPath(error) => host_path(error),
        CallError::Network(error) => network(error),
        CallError::Stopping | CallError::Url(UrlError::NotListening { .. }) => Code::Unavailable,
        CallError::Url(UrlError::Token(TokenError::TooMany)) | CallError::MissedEvents { .. } => {
            Code::ResourceExhausted
        }
        CallError::Url(UrlError::Token(TokenError::Random(_))) => Code::Internal,
        CallError::Cancelled => Code::Cancelled,
        CallError::Stats(error) if error.is_silent() => Code::Unavailable,
        CallError::Store(_) | CallError::Stats(_) | CallError::File { .. } => Code::Internal,
    }
}

fn network(error: &NetworkError) -> Code {
    match error {
        NetworkError::Bridge(
            BridgeError::HostPort(_)
            | BridgeError::HostPortFamily { .. }
            | BridgeError::SubnetTaken { .. }
            | BridgeError::SubnetWithin { .. }
            | BridgeError::GatewayTaken { .. },
        ) => Code::FailedPrecondition,
        NetworkError::Bandwidth { .. }
        | NetworkError::PodCidr { .. }
        | NetworkError::PodCidrUnusable { .. } => Code::InvalidArgument,
        NetworkError::NotConfigured(_) => Code::Unavailable,
        NetworkError::Cni(error) => host_path(error),
        _ => Code::Internal,
    }
}

/// What kept a read of what is imported from being answered.
fn silent_path(error: &ImportError) -> Option<&HostPathError> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(found) = inner.and_then(|inner| inner.downcast_ref()) {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

fn sandbox(error: &SandboxError) -> Code {
    match error {
        SandboxError::NameTaken(_) => Code::AlreadyExists,
        SandboxError::Sysctl { .. } | SandboxError::Cgroup(berth_cgroup::Error::InvalidParent { .. }) => {
            Code::InvalidArgument
        }
        SandboxError::Network(error) => network(error),
        SandboxError::NetworkLeft { source: NetworkError::Cni(error), .. } => host_path(error),
        SandboxError::AppArmor(_) => Code::FailedPrecondition,
        SandboxError::HostPath(error) => host_path(error),
        SandboxError::Containers { source, .. } => container(source),
        SandboxError::Stopping => Code::Unavailable,
        _ => Code::Internal,
    }
}

fn container(error: &ContainerError) -> Code {
    match error {
        ContainerError::NameTaken(_) => Code::AlreadyExists,
        ContainerError::NoImage { .. } => Code::NotFound,
        ContainerError::SandboxNotReady { .. }
        | ContainerError::NoHandler { .. }
        | ContainerError::WrongState { .. }
        | ContainerError::RecordKept { .. }
        | ContainerError::EndedUnderExec { .. }
        | ContainerError::Shim(ShimError::Older) => Code::FailedPrecondition,
        ContainerError::NoTarget { .. }
        | ContainerError::ImageConfig { .. }
        | ContainerError::Spec(_)
        | ContainerError::Plan(_)
        | ContainerError::Seccomp { .. }
        | ContainerError::AppArmor { .. }
        | ContainerError::Mount { .. }
        | ContainerError::Cgroup(berth_cgroup::Error::InvalidParent { .. }) => Code::InvalidArgument,
        ContainerError::Cgroup(error) if error.is_silent() => Code::Unavailable,
        ContainerError::Cgroup(berth_cgroup::Error::Write { source, .. }) if is_bad_value(source) => {
            Code::InvalidArgument
        }
        ContainerError::ExecTimeout { .. }
        | ContainerError::DoesNotEnd { .. }
        | ContainerError::StartTimeout { .. }
        | ContainerError::StartUnknown { .. }
        | ContainerError::Busy { .. }
        | ContainerError::Shim(ShimError::Silent) => Code::DeadlineExceeded,
        ContainerError::Shim(ShimError::TooLong(_)) => Code::InvalidArgument,
        ContainerError::Shim(ShimError::Failed(_))
        | ContainerError::ShimGoneUnderExec { .. }
        | ContainerError::DisconnectedUnderExec { .. } => Code::Unknown,
        ContainerError::TooManyAttached { .. } => Code::ResourceExhausted,
        ContainerError::HostPath(error) => host_path(error),
        ContainerError::Stopping | ContainerError::ShimUnreached { .. } => Code::Unavailable,
        _ => Code::Internal,
    }
}

fn host_path(error: &HostPathError) -> Code {
    match error {
        HostPathError::Silent { .. } => Code::DeadlineExceeded,
        HostPathError::SilentBefore { .. }
        | HostPathError::TooMany { .. }
        | HostPathError::TooManyPlugins { .. } => Code::Unavailable,
        HostPathError::Failed(_) | HostPathError::Ask(_) | HostPathError::Lost { .. } => Code::Internal,
    }
}

/// Whether the kernel refused a limit because of its value, such as a CPU that the machine does not
/// have.
fn is_bad_value(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(EINVAL | ERANGE))
}

/// Logs the failure of `call` and turns it into its answer.
pub(crate) fn failed(call: &'static str, error: &CallError) -> Status {
    let code = code(error);
    let mut message = chain(error);
    if let CallError::Container(container) = error
        && let ContainerError::Shim(ShimError::Failed(failed)) = &**container
        && let Some(conventional) = failed.shell_code()
    {
        message.push_str(&format!(" (exit code {conventional} in a shell)"));
    }
    if let CallError::Pull(pull) = error
        && matches!(**pull, PullError::Unreachable { .. })
    {
        message.insert_str(0, "RegistryUnavailable: ");
    }
    // May contain text from an image or a registry.
    if let Cow::Owned(escaped) = berth_model::text::printable(&message) {
        message = escaped;
    }
    if message.len() > MAX_MESSAGE_BYTES {
        let end = (0..=MAX_MESSAGE_BYTES).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
        message.truncate(end);
    }
    match code {
        Code::Internal => tracing::error!(call, %code, error = message, "call failed"),
        // Kubelets routinely ask for removed objects.
        Code::NotFound | Code::Unimplemented => tracing::debug!(call, %code, error = message, "call refused"),
        // Probes continue for a while after the end of their container, three times each.
        Code::FailedPrecondition if call == "ExecSync" => {
            tracing::debug!(call, %code, error = message, "call refused");
        }
        _ => tracing::warn!(call, %code, error = message, "call failed"),
    }
    Status::new(code, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim_client::Failed;

    #[test]
    fn the_codes_that_kubelets_rely_on_are_these() {
        let not_found = CallError::NotFound { kind: "container", id: "x".to_owned() };
        assert_eq!(failed("ContainerStatus", &not_found).code(), Code::NotFound);
        let late = CallError::from(ContainerError::ExecTimeout { seconds: 1 });
        assert_eq!(failed("ExecSync", &late).code(), Code::DeadlineExceeded);
    }

    #[test]
    fn a_missing_program_is_told_with_the_code_that_people_know() {
        for (errno, expected) in [(2, "127"), (13, "126"), (8, "126")] {
            let shim =
                ShimError::Failed(Failed { step: "execute".to_owned(), errno, detail: "foo".to_owned() });
            let message =
                failed("StartContainer", &CallError::from(ContainerError::from(shim))).message().to_owned();
            assert!(message.contains("foo") && message.contains(expected), "{message}");
        }
    }

    #[test]
    fn messages_are_one_line_of_printable_text() {
        let error = CallError::Argument("a\u{202e}b\u{2028}c\nd\u{1b}[2J".to_owned());
        assert_eq!(failed("x", &error).message(), r"a\u{202e}b\u{2028}c\nd\u{1b}[2J");
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let long = CallError::NotFound { kind: "image", id: "ä".repeat(5000) };
        assert!(failed("x", &long).message().len() <= MAX_MESSAGE_BYTES);
    }
}
