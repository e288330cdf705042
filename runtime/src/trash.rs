//! Deleting what may be large: renamed out of sight first, then deleted in the background.
//!
//! The rename is the removal, for everybody who looks: it is atomic, quick and needs no space on
//! the disk. What is in the trash when the daemon ends is deleted by the next one.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use berth_model::layout::Layout;
use berth_sys::beneath::Root;

/// Makes `path` disappear. Absent is fine. The deleting itself goes on in the background.
///
/// # Errors
/// What the rename says.
pub(crate) fn discard(layout: &Layout, path: &Path) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    // A name can come again, when something of the same id was thrown away and is still being
    // deleted.
    let unique =
        format!("{}.{}.{}", name.display(), std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let target = layout.trash().join(&unique);
    match std::fs::rename(path, &target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    let trash = layout.trash();
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => {
            runtime.spawn_blocking(move || delete(&trash, &unique));
        }
        Err(_) => delete(&trash, &unique),
    }
    Ok(())
}

/// Deletes everything in the trash. Blocking.
///
/// # Errors
/// When the trash cannot be listed.
pub(crate) fn empty(layout: &Layout) -> io::Result<()> {
    let trash = layout.trash();
    for entry in std::fs::read_dir(&trash)? {
        if let Some(name) = entry?.file_name().to_str() {
            delete(&trash, name);
        }
    }
    Ok(())
}

/// Trees of containers are hostile: any depth, any links. `beneath` walks them by descriptor.
fn delete(trash: &Path, name: &str) {
    let deleted = Root::open(trash).and_then(|root| root.open_dir(Path::new("."))?.remove_all(name.as_ref()));
    if let Err(error) = deleted
        // It was deleted already, by the caller or at the start of the daemon.
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %trash.join(name).display(), %error, "cannot delete; trying again at the next start");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_discarded_is_gone_and_absent_is_fine() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(directory.path().to_owned(), "/nowhere".into());
        std::fs::create_dir(layout.trash()).unwrap();
        let tree = directory.path().join("tree");
        for _ in 0..2 {
            std::fs::create_dir_all(tree.join("a/b/c")).unwrap();
            std::os::unix::fs::symlink("/etc", tree.join("link")).unwrap();
            discard(&layout, &tree).unwrap();
            assert!(!tree.exists());
        }
        discard(&layout, &tree).unwrap();
        assert_eq!(std::fs::read_dir(layout.trash()).unwrap().count(), 0);
        assert!(Path::new("/etc/passwd").exists());
    }
}
