//! Resolves names: a pod or container by id, id prefix, pod name, or `pod/container`.
//!
//! A full id wins, then a name, then an id prefix. If a name has been reused (the next attempt
//! of a container, a recreated pod) the newest one is meant. Remaining ambiguity is an error that
//! lists the candidates. Pure functions over the daemon's lists.

use std::collections::BTreeMap;

use berth_cri::v1::{Container, PodSandbox};

/// Characters of an id that are shown, as in other tools.
pub(crate) const SHORT_ID: usize = 12;

/// Characters of an id that are required to remove something by force.
const CERTAIN_ID: usize = 4;

/// How many candidates an error lists.
const MOST_CANDIDATES: usize = 8;

/// Why a name cannot be resolved.
#[derive(Debug, thiserror::Error, PartialEq)]
pub(crate) enum NameError {
    /// Nothing has this id or name.
    #[error("no pod or container named `{0}`; `berth ps -a` lists them")]
    Unknown(String),
    /// The pod has no container of that name.
    #[error("pod `{pod}` has no container `{container}`; it has {}", listed(.candidates))]
    UnknownInPod {
        /// Name of the pod.
        pod: String,
        /// The name of the container.
        container: String,
        /// Names of its containers.
        candidates: Vec<String>,
    },
    /// The prefix is unique, but so short that it may be a typing error.
    #[error("id prefix `{0}` is too short for --force; give at least {CERTAIN_ID} characters")]
    TooShort(String),
    /// The name is ambiguous.
    #[error("`{name}` matches more than one: {}; use a longer name or id", listed(.candidates))]
    Ambiguous {
        /// The requested name.
        name: String,
        /// The candidates.
        candidates: Vec<String>,
    },
    /// The pod has no containers.
    #[error("pod `{0}` has no containers")]
    EmptyPod(String),
}

/// The names as a list in a sentence, shortened if long.
pub(crate) fn listed(candidates: &[String]) -> String {
    let more = candidates.len().saturating_sub(MOST_CANDIDATES);
    let shown = candidates.iter().take(MOST_CANDIDATES).cloned().collect::<Vec<_>>().join(", ");
    match more {
        _ if candidates.is_empty() => "none".into(),
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The first characters of an id, without the hash algorithm of an image's.
pub(crate) fn short_id(id: &str) -> &str {
    let id = id.strip_prefix("sha256:").unwrap_or(id);
    id.get(..SHORT_ID).unwrap_or(id)
}

/// The object of a name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Target<'a> {
    /// A pod as a whole.
    Pod(&'a PodSandbox),
    /// One container.
    Container(&'a Container),
}

/// A snapshot of all pods and containers of a daemon.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    /// Every sandbox, including stopped ones.
    pub(crate) pods: Vec<PodSandbox>,
    /// Every container, including exited ones.
    pub(crate) containers: Vec<Container>,
}

impl Inventory {
    /// The sandbox with this id.
    pub(crate) fn pod(&self, id: &str) -> Option<&PodSandbox> {
        self.pods.iter().find(|pod| pod.id == id)
    }

    /// The containers of a sandbox.
    pub(crate) fn containers_of<'a>(&'a self, pod_id: &'a str) -> impl Iterator<Item = &'a Container> {
        self.containers.iter().filter(move |container| container.pod_sandbox_id == pod_id)
    }

    /// The container's name as commands accept it: `pod/container`.
    pub(crate) fn label(&self, container: &Container) -> String {
        let pod = self.pod(&container.pod_sandbox_id).map_or("?", pod_name);
        format!("{pod}/{}", container_name(container))
    }

    /// Finds the container that `name` means; a pod's name means its only container.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub(crate) fn container(&self, name: &str) -> Result<&Container, NameError> {
        match self.target(name)? {
            Target::Container(container) => Ok(container),
            Target::Pod(pod) => {
                let candidates = self.newest_of_each_name(self.containers_of(&pod.id));
                self.only(name, &candidates)?.ok_or_else(|| NameError::EmptyPod(pod_name(pod).to_owned()))
            }
        }
    }

    /// [`Inventory::target`] for what cannot be undone: a full name or id, or a longer id prefix
    /// than one types by mistake.
    ///
    /// # Errors
    /// When there is none, or more than one, or too short a prefix of an id is given.
    pub(crate) fn certain_target(&self, name: &str) -> Result<Target<'_>, NameError> {
        let target = self.target(name)?;
        let (id, is_named) = match target {
            Target::Container(container) => (&container.id, name.contains('/')),
            Target::Pod(pod) => (&pod.id, pod_name(pod) == name),
        };
        let is_certain = is_named || id == name || name.len() >= CERTAIN_ID;
        if is_certain { Ok(target) } else { Err(NameError::TooShort(name.to_owned())) }
    }

    /// Finds the pod or container that `name` means.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub(crate) fn target(&self, name: &str) -> Result<Target<'_>, NameError> {
        if let Some(container) = self.containers.iter().find(|container| container.id == name) {
            return Ok(Target::Container(container));
        }
        if let Some(pod) = self.pod(name) {
            return Ok(Target::Pod(pod));
        }
        if let Some((pod, container)) = name.split_once('/') {
            return self.container_in_pod(name, pod, container).map(Target::Container);
        }
        let named = self.pods.iter().filter(|pod| pod_name(pod) == name);
        if let Some(pod) = self.only_pod(name, named)? {
            return Ok(Target::Pod(pod));
        }
        self.by_start_of_id(name)
    }

    fn container_in_pod(&self, name: &str, pod: &str, container: &str) -> Result<&Container, NameError> {
        let in_pod = |candidate: &&Container| self.pod(&candidate.pod_sandbox_id).map(pod_name) == Some(pod);
        let all: Vec<_> = self.containers.iter().filter(in_pod).collect();
        let named = all.iter().copied().filter(|candidate| container_name(candidate) == container);
        if let Some(found) = self.only(name, &self.newest_of_each_name(named))? {
            return Ok(found);
        }
        if !self.pods.iter().any(|candidate| pod_name(candidate) == pod) {
            return Err(NameError::Unknown(name.to_owned()));
        }
        let mut candidates: Vec<_> =
            all.iter().map(|container| container_name(container).to_owned()).collect();
        candidates.sort();
        candidates.dedup();
        Err(NameError::UnknownInPod { pod: pod.to_owned(), container: container.to_owned(), candidates })
    }

    fn by_start_of_id(&self, name: &str) -> Result<Target<'_>, NameError> {
        if name.is_empty() {
            return Err(NameError::Unknown(String::new()));
        }
        let containers = self.containers.iter().filter(|container| container.id.starts_with(name));
        let pods = self.pods.iter().filter(|pod| pod.id.starts_with(name));
        let found: Vec<_> = containers.map(Target::Container).chain(pods.map(Target::Pod)).collect();
        match found.as_slice() {
            [] => Err(NameError::Unknown(name.to_owned())),
            [target] => Ok(*target),
            _ => {
                let describe = |target: &Target<'_>| match target {
                    Target::Container(container) => self.describe(container),
                    Target::Pod(pod) => describe_pod(pod),
                };
                Err(NameError::Ambiguous {
                    name: name.to_owned(),
                    candidates: found.iter().map(describe).collect(),
                })
            }
        }
    }

    /// The newest container of each pod and container name: earlier attempts exist until they are
    /// removed.
    fn newest_of_each_name<'a>(
        &'a self,
        containers: impl Iterator<Item = &'a Container>,
    ) -> Vec<&'a Container> {
        let mut newest: BTreeMap<_, &Container> = BTreeMap::new();
        for container in containers {
            let namespace = self.pod(&container.pod_sandbox_id).map_or("", pod_namespace);
            let key = (namespace, self.label(container));
            let kept = newest.entry(key).or_insert(container);
            if kept.created_at < container.created_at {
                *kept = container;
            }
        }
        newest.into_values().collect()
    }

    fn only<'a>(&self, name: &str, candidates: &[&'a Container]) -> Result<Option<&'a Container>, NameError> {
        match candidates {
            [] => Ok(None),
            [container] => Ok(Some(container)),
            _ => {
                let candidates = candidates.iter().map(|container| self.describe(container)).collect();
                Err(NameError::Ambiguous { name: name.to_owned(), candidates })
            }
        }
    }

    /// The newest of the pods, if all are in one namespace: the others are earlier attempts.
    fn only_pod<'a>(
        &self,
        name: &str,
        pods: impl Iterator<Item = &'a PodSandbox>,
    ) -> Result<Option<&'a PodSandbox>, NameError> {
        let mut newest: BTreeMap<&str, &PodSandbox> = BTreeMap::new();
        for pod in pods {
            let kept = newest.entry(pod_namespace(pod)).or_insert(pod);
            if kept.created_at < pod.created_at {
                *kept = pod;
            }
        }
        if newest.len() > 1 {
            let candidates = newest.into_values().map(describe_pod).collect();
            return Err(NameError::Ambiguous { name: name.to_owned(), candidates });
        }
        Ok(newest.into_values().next())
    }

    fn describe(&self, container: &Container) -> String {
        format!("container {} ({})", short_id(&container.id), self.label(container))
    }
}

fn describe_pod(pod: &PodSandbox) -> String {
    format!("pod {} ({} in namespace {})", short_id(&pod.id), pod_name(pod), pod_namespace(pod))
}

/// The pod's name; empty if it has none.
pub(crate) fn pod_name(pod: &PodSandbox) -> &str {
    pod.metadata.as_ref().map_or("", |metadata| &metadata.name)
}

/// The namespace of the pod.
pub(crate) fn pod_namespace(pod: &PodSandbox) -> &str {
    pod.metadata.as_ref().map_or("", |metadata| &metadata.namespace)
}

/// The container's name in its pod; empty if it has none.
pub(crate) fn container_name(container: &Container) -> &str {
    container.metadata.as_ref().map_or("", |metadata| &metadata.name)
}

#[cfg(test)]
mod tests {
    use berth_cri::v1::{ContainerMetadata, PodSandboxMetadata};

    use super::*;

    fn pod(id: &str, namespace: &str, name: &str, created_at: i64) -> PodSandbox {
        let metadata =
            PodSandboxMetadata { name: name.into(), namespace: namespace.into(), ..Default::default() };
        PodSandbox { id: id.into(), metadata: Some(metadata), created_at, ..Default::default() }
    }

    fn container(id: &str, pod: &str, name: &str, created_at: i64) -> Container {
        let metadata = ContainerMetadata { name: name.into(), attempt: 0 };
        let (id, pod_sandbox_id) = (id.into(), pod.into());
        Container { id, pod_sandbox_id, metadata: Some(metadata), created_at, ..Default::default() }
    }

    /// Pods `web` (two containers, one of them in two attempts), `job` (one container), `empty`,
    /// and `twin` in two namespaces; the pod `abc` has the name of other things' first figures.
    fn inventory() -> Inventory {
        Inventory {
            pods: vec![
                pod("p1", "default", "web", 1),
                pod("p2", "default", "job", 1),
                pod("p3", "default", "empty", 1),
                pod("p4", "default", "twin", 1),
                pod("p5", "other", "twin", 2),
                pod("p6", "default", "abc", 1),
                pod("p7", "default", "job", 9),
            ],
            containers: vec![
                container("c1aa", "p1", "app", 1),
                container("c1ab", "p1", "app", 2),
                container("c1b0", "p1", "proxy", 1),
                container("c2", "p2", "main", 1),
                container("c4", "p4", "main", 1),
                container("c5", "p5", "main", 1),
                container("abcd", "p6", "main", 1),
                container("abce", "p6", "main", 2),
                container("abc0", "p7", "main", 9),
                container("c", "p7", "side", 9),
            ],
        }
    }

    fn found(name: &str) -> Result<String, NameError> {
        inventory().container(name).map(|container| container.id.clone())
    }

    #[test]
    fn containers_are_found_by_every_kind_of_name() {
        for (name, id) in [
            ("c1aa", "c1aa"),
            ("c1b", "c1b0"),
            ("c2", "c2"),
            // A whole id, although others begin with it.
            ("c", "c"),
            // The newest attempt.
            ("web/app", "c1ab"),
            ("web/proxy", "c1b0"),
            // A pod's name goes before the start of an id.
            ("abc", "abce"),
            ("abcd", "abcd"),
            ("p6", "abce"),
        ] {
            assert_eq!(found(name).as_deref(), Ok(id), "{name}");
        }
    }

    #[test]
    fn force_takes_more_than_a_slip_of_the_finger() {
        let known = inventory();
        let certain = |name: &str| {
            known.certain_target(name).map(|target| match target {
                Target::Container(container) => container.id.clone(),
                Target::Pod(pod) => pod.id.clone(),
            })
        };
        for (name, id) in [("c", "c"), ("p1", "p1"), ("abc", "p6"), ("job", "p7"), ("web/app", "c1ab")] {
            assert_eq!(certain(name).as_deref(), Ok(id), "{name}");
        }
        let mut long = inventory();
        long.pods.push(pod("4711af", "default", "long", 1));
        for name in ["4", "47", "471"] {
            assert_eq!(long.certain_target(name), Err(NameError::TooShort(name.into())), "{name}");
            assert!(long.target(name).is_ok());
        }
        assert_eq!(long.certain_target("4711"), long.target("4711af"));
        assert_eq!(certain("c1b"), Err(NameError::TooShort("c1b".into())));
        assert!(matches!(certain("c1"), Err(NameError::Ambiguous { .. })));
        assert_eq!(certain("zz"), Err(NameError::Unknown("zz".into())));
    }

    #[test]
    fn unknown_names_are_refused() {
        for name in [
            "",
            "zz",
            "web2",
            "WEB",
            "c1zz",
            "nopod/app",
            "/",
            "/app",
            "../web",
            "web\0",
            &"9".repeat(1 << 16),
        ] {
            assert_eq!(found(name), Err(NameError::Unknown(name.to_owned())), "{name:?}");
        }
    }

    #[test]
    fn a_wrong_container_of_a_pod_tells_the_right_ones() {
        assert_eq!(
            found("web/db").unwrap_err().to_string(),
            "pod `web` has no container `db`; it has app, proxy"
        );
        assert_eq!(
            found("empty/db").unwrap_err().to_string(),
            "pod `empty` has no container `db`; it has none"
        );
        assert_eq!(found("empty"), Err(NameError::EmptyPod("empty".into())));
    }

    #[test]
    fn an_open_choice_lists_the_candidates() {
        for (name, candidates) in [
            ("web", &["container c1ab (web/app)", "container c1b0 (web/proxy)"][..]),
            (
                "c1",
                &["container c1aa (web/app)", "container c1ab (web/app)", "container c1b0 (web/proxy)"][..],
            ),
            ("twin", &["pod p4 (twin in namespace default)", "pod p5 (twin in namespace other)"][..]),
            ("twin/main", &["container c4 (twin/main)", "container c5 (twin/main)"][..]),
        ] {
            let candidates = candidates.iter().map(|text| (*text).to_owned()).collect();
            assert_eq!(found(name), Err(NameError::Ambiguous { name: name.into(), candidates }));
        }
    }

    #[test]
    fn a_long_choice_is_cut() {
        let candidates = (0..20).map(|number| number.to_string()).collect();
        let error = NameError::Ambiguous { name: "x".into(), candidates };
        assert_eq!(
            error.to_string(),
            "`x` matches more than one: 0, 1, 2, 3, 4, 5, 6, 7 and 12 more; use a longer name or id"
        );
    }

    #[test]
    fn a_pod_is_found_by_name_and_its_newest_attempt_is_meant() {
        let inventory = inventory();
        assert_eq!(inventory.target("job"), Ok(Target::Pod(inventory.pod("p7").unwrap())));
        assert_eq!(inventory.target("p1"), Ok(Target::Pod(inventory.pod("p1").unwrap())));
        assert!(matches!(inventory.target("p"), Err(NameError::Ambiguous { .. })));
    }

    #[test]
    fn short_ids_are_short_whatever_the_id() {
        for (id, short) in [
            ("0123456789abcdef", "0123456789ab"),
            ("sha256:0123456789abcdef", "0123456789ab"),
            ("abc", "abc"),
            ("", ""),
            ("ééééééééééééé", "éééééé"),
        ] {
            assert_eq!(short_id(id), short);
        }
    }
}
