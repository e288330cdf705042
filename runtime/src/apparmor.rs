//! AppArmor: the default profile, and which profiles the kernel has.
//!
//! The default profile is loaded at every start, so that a new version of the daemon brings its
//! own. It takes `apparmor_parser` (Debian: `apparmor`), which alone compiles policy. Where the
//! kernel does not enforce AppArmor, none of this is used. Where it does and the profile cannot be
//! loaded, containers that would have it are refused: loading is retried for each, so that
//! installing the parser is enough. The same applies when it was removed from the kernel.
//!
//! Putting a process under a profile is up to the shim.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use berth_sys::program::Run;

use crate::lock;

/// The profile of containers that ask for the runtime's default.
pub(crate) const DEFAULT_PROFILE: &str = "berth-default";

/// It is the second line of defence behind masked paths, capabilities and namespaces: it forbids
/// writing the parts of `/proc` and `/sys` that are the host's, mounting, and interfering with
/// processes outside. It allows everything else, so that root in the container works.
///
/// The language is apparmor.d(5). Deny rules win over allow rules. It includes no rule of a file of
/// the host, so that it means the same on each; what it does not mention depends on [`ABI`].
const DEFAULT_TEXT: &str = "\
profile berth-default flags=(attach_disconnected, mediate_deleted) {
  capability,
  file,
  network,
  unix,
  umount,

  signal (send, receive) peer=berth-default,
  signal (receive) peer=unconfined,
  ptrace (trace, read, tracedby, readby) peer=berth-default,

  deny mount,

  deny /proc/* w,
  deny /proc/{kcore,kmem,mem,sysrq-trigger} rwklx,
  deny /proc/{acpi,asound,bus,driver,fs,irq,scsi,tty}/** wklx,
  deny /proc/sys/{abi,crypto,debug,dev,sunrpc,user,vm}/** wklx,
  deny /proc/sys/fs/{[^m]**,mount-max} wklx,
  deny /proc/sys/kernel/{[^hms]**,h[^o]**,hot**,m[^s]**,s[^eh]**,se[^m]**} wklx,

  deny /sys/{block,bus,class,dev,devices,hypervisor,module,power}/** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/kernel/** wklx,
  deny /sys/kernel/security/** rwklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
}
";

/// The features that AppArmor mediates: those of version 3.0, which other runtimes' profiles are
/// written for. Without it newer kernels also ask about user namespaces, message queues and
/// io_uring, and deny what is not mentioned, which breaks programs that create sandboxes in a
/// container (browsers, builders of images); that is up to the seccomp profile. The file comes with
/// the parser, below its directory (apparmor.d(5), "Feature ABI").
const ABI: &str = "abi/3.0";

/// The parser's directory, in which it looks for [`ABI`].
const PARSERS_DIRECTORY: &str = "/etc/apparmor.d";

/// The kernel's file that says whether AppArmor is enforced.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";

/// The kernel's list of loaded profiles, a line each: `NAME (MODE)`. In securityfs.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// The most that is read of that list, in bytes. A desktop with all of its distribution's profiles
/// has some 10 KiB.
const MAX_PROFILES_BYTES: u64 = 16 << 20;

/// How long the parser may take. It takes a tenth of a second; on a machine that is just booting,
/// more.
const PARSER_LIMIT: Duration = Duration::from_secs(30);

/// The most that is kept of the parser's messages, in bytes.
const MAX_COMPLAINT_BYTES: usize = 4096;

const PARSERS: [&str; 3] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser", "/usr/bin/apparmor_parser"];

/// Why AppArmor could not be queried or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppArmorError {
    /// The parser is not installed.
    #[error("apparmor_parser is not installed: install the package apparmor")]
    NoParser,
    /// The parser could not be run.
    #[error("cannot run {program}")]
    Run {
        /// The program.
        program: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The parser did not end.
    #[error("apparmor_parser did not finish within {PARSER_LIMIT:?}")]
    Late,
    /// The parser failed.
    #[error("apparmor_parser failed: {complaint}")]
    Refused {
        /// Its message.
        complaint: String,
    },
    /// The kernel's list cannot be read.
    #[error("cannot read {path}")]
    List {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The default profile is not loaded, and cannot be.
#[derive(Debug, thiserror::Error)]
#[error(
    "the kernel enforces AppArmor, and the profile {DEFAULT_PROFILE} of RuntimeDefault cannot be loaded; \
     fix this on the node; no restart is needed"
)]
pub(crate) struct NotLoaded(#[source] AppArmorError);

/// Whether the kernel enforces AppArmor. If that is unknown it counts as enforced.
pub(crate) fn is_enabled() -> bool {
    says_enabled(Path::new(ENABLED))
}

fn says_enabled(path: &Path) -> bool {
    match std::fs::read(path) {
        Ok(text) => text.starts_with(b"Y"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot tell whether AppArmor is enabled; assuming that it is");
            true
        }
    }
}

/// The default profile of this node.
#[derive(Debug)]
pub(crate) struct DefaultProfile {
    enforced: bool,
    /// Loaded by this daemon or, in an earlier version, by one before it. Held while it is being
    /// loaded.
    was_loaded: Mutex<bool>,
}

impl DefaultProfile {
    /// Loads it where AppArmor is enforced; a failure is logged. Blocking.
    pub(crate) fn new(enforced: bool) -> Self {
        let profile = Self { enforced, was_loaded: Mutex::new(false) };
        if let Err(error) = profile.name() {
            tracing::error!(error = %crate::chain(&error), "containers with the default AppArmor profile are refused until this is fixed");
        }
        profile
    }

    /// Its name, once it is loaded, which is done if needed; `None` where the kernel enforces
    /// no AppArmor. Blocking.
    ///
    /// # Errors
    /// Why it could not be loaded.
    pub(crate) fn name(&self) -> Result<Option<&'static str>, NotLoaded> {
        self.name_by(load_default, || is_loaded(DEFAULT_PROFILE))
    }

    fn name_by(
        &self,
        load: impl FnOnce() -> Result<(), AppArmorError>,
        is_loaded: impl Fn() -> Result<bool, AppArmorError>,
    ) -> Result<Option<&'static str>, NotLoaded> {
        if !self.enforced {
            return Ok(None);
        }
        let mut was_loaded = lock(&self.was_loaded);
        // If the list cannot be read, the shim will find out.
        if !*was_loaded || !is_loaded().unwrap_or(true) {
            *was_loaded = false;
            if let Err(failed) = load() {
                // One of an earlier daemon confines as well.
                if !is_loaded().unwrap_or(false) {
                    return Err(NotLoaded(failed));
                }
                tracing::warn!(
                    error = %crate::chain(&failed),
                    "cannot load the AppArmor profile {DEFAULT_PROFILE}; using an earlier version of it"
                );
            }
            *was_loaded = true;
        }
        Ok(Some(DEFAULT_PROFILE))
    }
}

/// Loads [`DEFAULT_PROFILE`], in place of an earlier version: containers under that one change over
/// at once. Blocking.
///
/// # Errors
/// [`AppArmorError`]; an earlier version then stays.
pub(crate) fn load_default() -> Result<(), AppArmorError> {
    let program = PARSERS.iter().map(Path::new).find(|path| path.exists()).ok_or(AppArmorError::NoParser)?;
    let run = |source| AppArmorError::Run { program: program.to_owned(), source };
    // apparmor_parser(8): no cache, since that is a directory of the distribution's.
    let text = default_text(Path::new(PARSERS_DIRECTORY));
    let parser = Run {
        program,
        arguments: &["--replace", "--skip-cache", "--quiet"],
        environment: &[],
        stdin: text.as_bytes(),
        deadline: PARSER_LIMIT,
        max_output: None,
        max_message: MAX_COMPLAINT_BYTES,
        caller: None,
    };
    let ended = parser.to_end().map_err(run)?.ok_or(AppArmorError::Late)?;
    if ended.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&ended.message).split_whitespace().collect::<Vec<_>>().join(" ");
    Err(AppArmorError::Refused {
        complaint: if complaint.is_empty() { ended.status.to_string() } else { complaint },
    })
}

/// The text of the default profile for the parser. A parser without the file is older than it, and
/// knows nothing newer.
fn default_text(directory: &Path) -> String {
    if directory.join(ABI).exists() {
        format!("abi <{ABI}>,\n{DEFAULT_TEXT}")
    } else {
        DEFAULT_TEXT.to_owned()
    }
}

/// Whether the kernel has a profile of this name.
///
/// # Errors
/// [`AppArmorError::List`], for example if securityfs is not mounted.
pub(crate) fn is_loaded(name: &str) -> Result<bool, AppArmorError> {
    is_listed(Path::new(PROFILES), name)
}

fn is_listed(path: &Path, name: &str) -> Result<bool, AppArmorError> {
    let failed = |source| AppArmorError::List { path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_PROFILES_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_PROFILES_BYTES {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "longer than 16 MiB")));
    }
    Ok(lists(&text, name))
}

/// Names may contain spaces and brackets; the mode, at the end of the line, does not.
fn lists(text: &[u8], name: &str) -> bool {
    text.split(|byte| *byte == b'\n').any(|line| {
        let Some(rest) = line.strip_prefix(name.as_bytes()) else { return false };
        !name.is_empty()
            && rest
                .strip_prefix(b" (")
                .and_then(|rest| rest.strip_suffix(b")"))
                .is_some_and(|mode| !mode.contains(&b'('))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_loaded_when_a_line_has_its_whole_name() {
        let text = b"berth-default (enforce)\n/usr/bin/man (complain)\nodd (name) here (kill)\na//b (unconfined)\n\xff\xfe (enforce)\n\nx";
        for (name, expected) in [
            ("berth-default", true),
            ("/usr/bin/man", true),
            ("odd (name) here", true),
            ("a//b", true),
            ("", false),
            ("berth", false),
            ("berth-default (enforce)", false),
            ("odd", false),
            ("odd (name)", false),
            ("x", false),
            ("default", false),
            ("berth-default\n/usr/bin/man", false),
        ] {
            assert_eq!(lists(text, name), expected, "{name:?}");
        }
        assert!(!lists(b"", "x"));
        assert!(!lists(b" (enforce)\n", ""));
    }

    #[test]
    fn a_list_that_cannot_be_read_is_an_error_and_not_an_absent_profile() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("profiles");
        assert!(matches!(is_listed(&list, "a"), Err(AppArmorError::List { .. })));
        std::fs::write(&list, "a (enforce)\n").unwrap();
        assert!(is_listed(&list, "a").unwrap());
        assert!(!is_listed(&list, "b").unwrap());
    }

    #[test]
    fn the_default_profile_is_loaded_whenever_it_is_not_there() {
        let profile = DefaultProfile { enforced: true, was_loaded: Mutex::new(false) };
        let fails = || Err(AppArmorError::NoParser);
        let (there, gone) = (|| Ok(true), || Ok(false));
        let refused = profile.name_by(fails, gone).unwrap_err().to_string();
        assert!(refused.contains(DEFAULT_PROFILE), "{refused}");
        assert_eq!(profile.name_by(|| Ok(()), gone).unwrap(), Some(DEFAULT_PROFILE));
        assert_eq!(profile.name_by(|| panic!("it is there"), there).unwrap(), Some(DEFAULT_PROFILE));
        let unknown = || Err(AppArmorError::NoParser);
        assert_eq!(profile.name_by(|| panic!("it was loaded"), unknown).unwrap(), Some(DEFAULT_PROFILE));
        // It was removed.
        assert!(profile.name_by(fails, gone).is_err());
        assert!(profile.name_by(fails, unknown).is_err());
        assert_eq!(profile.name_by(|| Ok(()), gone).unwrap(), Some(DEFAULT_PROFILE));
        // An earlier version would do, too.
        let later = DefaultProfile { enforced: true, was_loaded: Mutex::new(false) };
        assert_eq!(later.name_by(fails, there).unwrap(), Some(DEFAULT_PROFILE));
        let off = DefaultProfile { enforced: false, was_loaded: Mutex::new(false) };
        assert_eq!(off.name_by(|| panic!("not asked"), || panic!("not asked")).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_read_counts_as_enforced() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("enabled");
        assert!(!says_enabled(&file), "a kernel without it");
        for (text, expected) in [("Y\n", true), ("N\n", false)] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(says_enabled(&file), expected);
        }
        assert!(says_enabled(directory.path()), "a directory cannot be read");
    }

    #[test]
    fn the_default_profile_is_silent_about_what_is_newer_than_it() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(default_text(directory.path()), DEFAULT_TEXT);
        std::fs::create_dir(directory.path().join("abi")).unwrap();
        std::fs::write(directory.path().join(ABI), "").unwrap();
        assert_eq!(default_text(directory.path()), format!("abi <abi/3.0>,\n{DEFAULT_TEXT}"));
    }

    #[test]
    fn the_default_profile_is_called_what_containers_ask_for() {
        assert!(DEFAULT_TEXT.starts_with(&format!("profile {DEFAULT_PROFILE} ")));
        assert!(DEFAULT_TEXT.contains(&format!("signal (send, receive) peer={DEFAULT_PROFILE},")));
        // Containers are ended by shims, which have no profile.
        assert!(DEFAULT_TEXT.contains("signal (receive) peer=unconfined,"));
        for line in DEFAULT_TEXT.lines().filter(|line| line.starts_with("  ")) {
            assert!(line.ends_with(','), "{line}");
        }
    }
}
