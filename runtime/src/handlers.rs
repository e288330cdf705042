//! Runtime handlers: the names by which a pod chooses what runs its containers
//! (`RunPodSandboxRequest.runtime_handler`), what is behind each name, and what that can do.

/// What makes and runs the containers of a handler, with what it needs to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Berth's own: a shim for each container.
    Shim,
}

/// What `Status` says about a handler: CRI `RuntimeHandlerFeatures`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Mounts that are read-only with everything below them.
    pub recursive_read_only_mounts: bool,
    /// Pods in user namespaces.
    pub user_namespaces: bool,
}

/// A handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// As a `RuntimeClass` names it; empty for the one of pods that name none.
    pub name: String,
    /// What is behind it.
    pub kind: Kind,
    /// What it can do.
    pub features: Features,
}

/// The handlers of a node.
#[derive(Debug, Clone)]
pub struct Handlers(Vec<Handler>);

impl Handlers {
    /// Berth's own, as the default and by its name.
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
