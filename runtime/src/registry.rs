//! The sandboxes and containers that exist, by id and by name.
//!
//! Objects appear here when they are complete, and disappear when they are gone; during creation
//! they hold only their name, by a [`Reservation`]. All locks here are held for a look-up only.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use berth_model::id::{ContainerId, SandboxId};

use crate::container::Container;
use crate::lock;
use crate::names::{Name, NameTaken};
use crate::sandbox::Sandbox;
use crate::snapshot::PodSnapshot;

/// The result of looking up an object.
#[derive(Debug)]
pub(crate) enum Found<T> {
    /// It was found.
    One(T),
    /// There is none.
    Nothing,
    /// The prefix is ambiguous.
    Ambiguous,
}

#[derive(Debug, Default)]
struct Inner {
    sandboxes: HashMap<SandboxId, Arc<Sandbox>>,
    containers: HashMap<ContainerId, Arc<Container>>,
    names: HashMap<Name, String>,
    /// Ids of objects whose records cannot be read, and of which nothing is running.
    unread: HashSet<String>,
}

impl Inner {
    /// Frees a name, unless another object has it by now: of two concurrent removals the later one
    /// may find the name taken again.
    fn give_back(&mut self, name: &Name, owner: &str) {
        if self.names.get(name).is_some_and(|found| found == owner) {
            self.names.remove(name);
        }
    }
}

/// All objects.
#[derive(Debug, Default)]
pub(crate) struct Registry(Arc<Mutex<Inner>>);

/// A name that is held for an object until it is removed; freed when dropped before that.
#[derive(Debug)]
pub(crate) struct Reservation {
    inner: Arc<Mutex<Inner>>,
    name: Option<Name>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            lock(&self.inner).names.remove(&name);
        }
    }
}

impl Registry {
    /// Reserves `name` for the object `owner`.
    ///
    /// # Errors
    /// [`NameTaken`].
    pub(crate) fn reserve(&self, name: Name, owner: &str) -> Result<Reservation, NameTaken> {
        let mut inner = lock(&self.0);
        if let Some(taken) = inner.names.get(&name) {
            return Err(NameTaken { name: name.to_string(), owner: taken.clone() });
        }
        inner.names.insert(name.clone(), owner.to_owned());
        Ok(Reservation { inner: self.0.clone(), name: Some(name) })
    }

    /// Whether the object with this id has its name, but is not complete yet.
    pub(crate) fn is_being_made(&self, id: &str) -> bool {
        let inner = lock(&self.0);
        let complete = id.parse::<SandboxId>().is_ok_and(|id| inner.sandboxes.contains_key(&id))
            || id.parse::<ContainerId>().is_ok_and(|id| inner.containers.contains_key(&id));
        !complete && inner.names.values().any(|owner| owner == id)
    }

    /// Makes a sandbox visible; its name stays taken until [`Registry::remove_sandbox`].
    pub(crate) fn add_sandbox(&self, sandbox: Arc<Sandbox>, mut reservation: Reservation) {
        reservation.name = None;
        lock(&self.0).sandboxes.insert(sandbox.id().clone(), sandbox);
    }

    /// Makes a container visible; its name stays taken until [`Registry::remove_container`].
    pub(crate) fn add_container(&self, container: Arc<Container>, mut reservation: Reservation) {
        reservation.name = None;
        lock(&self.0).containers.insert(container.id().clone(), container);
    }

    /// Makes a sandbox of a previous daemon visible. If another has its name, both are visible
    /// nevertheless: what exists has to have an owner.
    pub(crate) fn adopt_sandbox(&self, sandbox: Arc<Sandbox>) {
        let name = Name::Sandbox(sandbox.config().metadata.clone());
        self.adopt(name, sandbox.id().as_str());
        lock(&self.0).sandboxes.insert(sandbox.id().clone(), sandbox);
    }

    /// The same for a container.
    pub(crate) fn adopt_container(&self, container: Arc<Container>) {
        self.adopt(container.name(), container.id().as_str());
        lock(&self.0).containers.insert(container.id().clone(), container);
    }

    fn adopt(&self, name: Name, id: &str) {
        match self.reserve(name, id) {
            Ok(mut reservation) => reservation.name = None,
            Err(taken) => tracing::error!(id, error = %taken, "two objects have the same name"),
        }
        lock(&self.0).unread.remove(id);
    }

    /// Adds an object whose record cannot be read.
    pub(crate) fn keep_unread(&self, id: &str) {
        lock(&self.0).unread.insert(id.to_owned());
    }

    /// The objects whose records cannot be read.
    pub(crate) fn unread(&self) -> Vec<String> {
        lock(&self.0).unread.iter().cloned().collect()
    }

    /// Forgets an object that could not be read.
    pub(crate) fn forget_unread(&self, id: &str) {
        lock(&self.0).unread.remove(id);
    }

    /// Whether an object with this id exists.
    pub(crate) fn has(&self, id: &str) -> bool {
        let inner = lock(&self.0);
        inner.unread.contains(id)
            || id.parse().is_ok_and(|id: SandboxId| inner.sandboxes.contains_key(&id))
            || id.parse().is_ok_and(|id: ContainerId| inner.containers.contains_key(&id))
    }

    /// Whether there are no objects.
    pub(crate) fn is_empty(&self) -> bool {
        let inner = lock(&self.0);
        inner.sandboxes.is_empty() && inner.containers.is_empty() && inner.unread.is_empty()
    }

    /// Returns whether it was still there.
    pub(crate) fn remove_sandbox(&self, sandbox: &Sandbox) -> bool {
        let mut inner = lock(&self.0);
        let was_there = inner.sandboxes.remove(sandbox.id()).is_some();
        inner.give_back(&Name::Sandbox(sandbox.config().metadata.clone()), sandbox.id().as_str());
        was_there
    }

    /// The same for a container.
    pub(crate) fn remove_container(&self, container: &Container) -> bool {
        let mut inner = lock(&self.0);
        let was_there = inner.containers.remove(container.id()).is_some();
        inner.give_back(&container.name(), container.id().as_str());
        was_there
    }

    /// By id, or by an unambiguous prefix of one.
    pub(crate) fn find_sandbox(&self, text: &str) -> Found<Arc<Sandbox>> {
        let inner = lock(&self.0);
        if let Ok(id) = text.parse::<SandboxId>() {
            return inner.sandboxes.get(&id).cloned().map_or(Found::Nothing, Found::One);
        }
        one(inner
            .sandboxes
            .iter()
            .filter(|(id, _)| is_beginning(text, id.as_str()))
            .map(|(_, sandbox)| sandbox))
    }

    /// By id, or by an unambiguous prefix of one.
    pub(crate) fn find_container(&self, text: &str) -> Found<Arc<Container>> {
        let inner = lock(&self.0);
        if let Ok(id) = text.parse::<ContainerId>() {
            return inner.containers.get(&id).cloned().map_or(Found::Nothing, Found::One);
        }
        one(inner
            .containers
            .iter()
            .filter(|(id, _)| is_beginning(text, id.as_str()))
            .map(|(_, container)| container))
    }

    pub(crate) fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        lock(&self.0).sandboxes.values().cloned().collect()
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.0).containers.values().cloned().collect()
    }

    /// A function that takes snapshots of pods, by the ids of their sandboxes. After this registry
    /// is gone it finds none.
    pub(crate) fn snapshots(&self) -> impl Fn(&SandboxId) -> PodSnapshot + Send + Sync + 'static {
        let inner = Arc::downgrade(&self.0);
        move |id| {
            let Some(registry) = inner.upgrade().map(Self) else { return PodSnapshot::default() };
            let mut containers = registry.containers_of(id);
            containers.sort_by_key(|container| std::cmp::Reverse(container.record().created_at_unix_ns));
            let sandbox = lock(&registry.0).sandboxes.get(id).cloned();
            PodSnapshot {
                sandbox: sandbox.map(|sandbox| sandbox.snapshot()),
                containers: containers.iter().map(|container| container.snapshot()).collect(),
            }
        }
    }

    pub(crate) fn containers_of(&self, sandbox: &SandboxId) -> Vec<Arc<Container>> {
        lock(&self.0)
            .containers
            .values()
            .filter(|container| container.sandbox_id() == sandbox)
            .cloned()
            .collect()
    }
}

fn is_beginning(text: &str, id: &str) -> bool {
    !text.is_empty() && id.starts_with(text)
}

fn one<'a, T: Clone + 'a>(mut found: impl Iterator<Item = &'a T>) -> Found<T> {
    match (found.next(), found.next()) {
        (None, _) => Found::Nothing,
        (Some(one), None) => Found::One(one.clone()),
        (Some(_), Some(_)) => Found::Ambiguous,
    }
}

#[cfg(test)]
mod tests {
    use berth_model::sandbox::Metadata;

    use super::*;

    #[test]
    fn a_name_is_free_again_when_its_making_failed() {
        let registry = Registry::default();
        let name = Name::Sandbox(Metadata { name: "a".to_owned(), ..Metadata::default() });
        let reservation = registry.reserve(name.clone(), "first").unwrap();
        assert!(registry.is_being_made("first") && !registry.is_being_made("second"));
        let taken = registry.reserve(name.clone(), "second").unwrap_err();
        assert!(taken.to_string().contains("first"), "{taken}");
        drop(reservation);
        assert!(registry.reserve(name, "second").is_ok());
    }

    #[test]
    fn a_name_that_was_taken_anew_is_not_freed_by_its_old_owner() {
        let registry = Registry::default();
        let name = Name::Sandbox(Metadata::default());
        let reservation = registry.reserve(name.clone(), "new").unwrap();
        lock(&registry.0).give_back(&name, "old");
        assert!(registry.reserve(name.clone(), "third").is_err());
        drop(reservation);
        assert!(registry.reserve(name, "third").is_ok());
    }

    #[test]
    fn beginnings_of_ids_are_found_and_the_empty_text_is_none() {
        assert!(is_beginning("ab", "abc"));
        assert!(!is_beginning("", "abc"));
        assert!(!is_beginning("b", "abc"));
        assert!(matches!(one([1, 2].iter()), Found::Ambiguous));
        assert!(matches!(one::<i32>([].iter()), Found::Nothing));
    }
}
