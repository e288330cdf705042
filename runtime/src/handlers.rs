//! Runtime handlers: the names by which a pod selects its runtime
//! (`RunPodSandboxRequest.runtime_handler`), the runtime behind each, and its features.

/// The runtime of a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Berth's own engine: a shim for each container.
    Shim,
}

/// The features of a handler in `Status`: CRI `RuntimeHandlerFeatures`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Recursively read-only mounts.
    pub recursive_read_only_mounts: bool,
    /// Pods in user namespaces.
    pub user_namespaces: bool,
}

/// A handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// Its name in a `RuntimeClass`; empty for the default.
    pub name: String,
    /// Its runtime.
    pub kind: Kind,
    /// Its features.
    pub features: Features,
}

/// The handlers of a node.
#[derive(Debug, Clone)]
pub struct Handlers(Vec<Handler>);

impl Handlers {
    /// Berth's own, as the default and by name.
    #[must_use]
    pub fn own() -> Self {
        let features = Features { recursive_read_only_mounts: true, user_namespaces: false };
        Self(["", "berth"].map(|name| Handler { name: name.to_owned(), kind: Kind::Shim, features }).into())
    }

    /// The handler with this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Handler> {
        self.0.iter().find(|handler| handler.name == name)
    }

    /// All of them, the default one first.
    pub fn iter(&self) -> impl Iterator<Item = &Handler> {
        self.0.iter()
    }
}
