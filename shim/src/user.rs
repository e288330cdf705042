//! The user of a process: the text of the request, resolved by the container's own `/etc/passwd`
//! and `/etc/group`.
//!
//! The rules are the CRI's (`LinuxContainerSecurityContext.run_as_user`, `run_as_username`,
//! `run_as_group`, `supplemental_groups_policy`) and the OCI image's (`config.User`). A text of
//! digits is always a number, never a name, and a number that does not fit or has a sign is an
//! error and never a name: an image could map such a "name" to root (CVE-2016-3697, CVE-2024-40635,
//! CVE-2026-46680). No NSS: nothing of the image is executed or loaded.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use berth_shim_proto::control::Failed;
use berth_shim_proto::launch::User;
use berth_sys::beneath::Root;
use berth_sys::file;

use crate::failure::{Step, refused, shown};

/// The largest user or group number: what the peers accept, so that no number turns negative on its
/// way through an `int`.
const MAX_ID: u32 = i32::MAX.unsigned_abs();

/// The largest passwd or group file that is read, in bytes; the same as containerd's cap.
const MAX_FILE: u64 = 10 * 1024 * 1024;

/// The longest line in one; longer ones are skipped, as they cannot name a user.
const MAX_LINE: usize = 64 * 1024;

/// The bytes of a container's passwd and group files, empty where it has none.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    passwd: Vec<u8>,
    group: Vec<u8>,
}

impl Accounts {
    /// Reads them below `root`.
    ///
    /// Anything but a plain file of a sane size is an error: a FIFO would block, `/dev/zero` would
    /// never end (CVE-2026-47262).
    pub(crate) fn read(root: &Root) -> Result<Self, Failed> {
        Ok(Self { passwd: read(root, "etc/passwd")?, group: read(root, "etc/group")? })
    }
}

fn read(root: &Root, name: &str) -> Result<Vec<u8>, Failed> {
    const STEP: &str = "read the accounts";
    let file = match root.open_with(Path::new(name), file::READ_NONBLOCKING) {
        Ok(file) => File::from(file),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error).step(STEP, name),
    };
    let metadata = file.metadata().step(STEP, name)?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(refused(STEP, format!("/{name} is not a regular file of at most {MAX_FILE} bytes")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).step(STEP, name)?;
    Ok(bytes)
}

/// A resolved user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All supplementary groups, the primary one first, without duplicates.
    pub(crate) groups: Vec<u32>,
    /// The home directory, `/` when the passwd file has none.
    pub(crate) home: Vec<u8>,
}

const STEP: &str = "find the user";

/// A number if the text is one. A number with a sign is an error, not a name: its author did not
/// mean an account that the image gives that name.
fn number(text: &[u8]) -> Result<Option<u32>, Failed> {
    let digits = text.strip_prefix(b"-").or(text.strip_prefix(b"+")).unwrap_or(text);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Ok(None);
    }
    if digits.len() < text.len() {
        return Err(refused(
            STEP,
            format!("{} has a sign, which neither an id nor a name can have", shown(text)),
        ));
    }
    let value =
        std::str::from_utf8(text).ok().filter(|text| text.len() <= 10).and_then(|text| text.parse().ok());
    match value {
        Some(id) if id <= MAX_ID => Ok(Some(id)),
        _ => Err(refused(STEP, format!("{} is not between 0 and {MAX_ID}", shown(text)))),
    }
}

struct PasswdEntry<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// A line with a number that does not fit is not an entry: passwd(5).
fn passwd_entries(file: &[u8]) -> impl Iterator<Item = PasswdEntry<'_>> {
    lines(file).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = number(fields.nth(1)?).ok()??;
        let gid = number(fields.next()?).ok()??;
        let home = fields.nth(1).unwrap_or_default();
        Some(PasswdEntry { name, uid, gid, home })
    })
}

struct GroupEntry<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

fn group_entries(file: &[u8]) -> impl Iterator<Item = GroupEntry<'_>> {
    lines(file).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?).ok()??;
        Some(GroupEntry { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// Lines with DOS line endings are accepted too: editors of other systems write them.
fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = file.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    lines.filter(|line| line.len() <= MAX_LINE && !line.starts_with(b"#"))
}

/// Resolves `user` by the container's accounts.
pub(crate) fn resolve(user: &User, accounts: &Accounts) -> Result<Resolved, Failed> {
    let Accounts { passwd, group } = accounts;
    let (user_text, group_text) = match user.user.as_bytes().iter().position(|byte| *byte == b':') {
        Some(colon) => {
            let (left, right) = user.user.as_bytes().split_at(colon);
            (left, right.get(1..).unwrap_or_default())
        }
        None => (user.user.as_bytes(), b"".as_slice()),
    };
    let text = if user_text.is_empty() { b"0" } else { user_text };
    let entry = match number(text)? {
        Some(uid) => passwd_entries(passwd).find(|entry| entry.uid == uid).ok_or(uid),
        None => Ok(passwd_entries(passwd).find(|entry| entry.name == text).ok_or_else(|| {
            refused(STEP, format!("no user {} in the container's /etc/passwd", shown(text)))
        })?),
    };
    let (name, uid, mut gid, home) = match entry {
        Ok(entry) => (Some(entry.name), entry.uid, entry.gid, entry.home),
        Err(uid) => (None, uid, 0, b"".as_slice()),
    };
    if !group_text.is_empty() {
        gid = match number(group_text)? {
            Some(gid) => gid,
            None => group_entries(group)
                .find(|entry| entry.name == group_text)
                .map(|entry| entry.gid)
                .ok_or_else(|| {
                    refused(STEP, format!("no group {} in the container's /etc/group", shown(group_text)))
                })?,
        };
    }
    if let Some(asked) = user.group {
        gid = asked;
    }
    let mut groups = vec![gid];
    groups.extend_from_slice(&user.supplementary_groups);
    if user.merge_groups
        && let Some(name) = name
    {
        groups.extend(
            group_entries(group)
                .filter(|entry| entry.members.split(|byte| *byte == b',').any(|member| member == name))
                .map(|entry| entry.gid),
        );
    }
    if let Some(wrong) = groups.iter().find(|gid| **gid > MAX_ID) {
        return Err(refused(STEP, format!("group {wrong} is not between 0 and {MAX_ID}")));
    }
    let mut seen = std::collections::BTreeSet::new();
    groups.retain(|gid| seen.insert(*gid));
    let home = if home.is_empty() { b"/".to_vec() } else { home.to_vec() };
    Ok(Resolved { uid, gid, groups, home })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# comment:x:9:9::/:\nbad:x:4294967296:0::/:\nweb:x:33:44:Web:/srv:/bin/sh\n\
        1000:x:0:0:numeric name:/root:/bin/sh\nnohome:x:7:8\n99999999999:x:0:0::/:\nshort:x\n";
    const GROUP: &[u8] = b"root:x:0:\nweb:x:44:\nextra:x:500:web,other\nmore:x:501:other,web\nagain:x:500:web\nbroken:x:-1:web\n";

    fn accounts() -> Accounts {
        Accounts { passwd: PASSWD.to_vec(), group: GROUP.to_vec() }
    }

    fn asked(user: &str) -> User {
        User { user: user.to_owned(), merge_groups: true, ..User::default() }
    }

    #[test]
    fn the_words_of_images_are_resolved() {
        type Expected = Result<(u32, u32, &'static [u32], &'static str), &'static str>;
        let cases: &[(&str, Expected)] = &[
            ("", Ok((0, 0, &[0], "/root"))),
            ("0", Ok((0, 0, &[0], "/root"))),
            ("root", Ok((0, 0, &[0], "/root"))),
            ("web", Ok((33, 44, &[44, 500, 501], "/srv"))),
            ("33", Ok((33, 44, &[44, 500, 501], "/srv"))),
            ("1000", Ok((1000, 0, &[0], "/"))),
            ("7", Ok((7, 8, &[8], "/"))),
            ("33:7", Ok((33, 7, &[7, 500, 501], "/srv"))),
            ("web:extra", Ok((33, 500, &[500, 501], "/srv"))),
            (":44", Ok((0, 44, &[44], "/root"))),
            ("nobody", Err("no user nobody")),
            ("web:nogroup", Err("no group nogroup")),
            ("4294967295", Err("not between")),
            ("4294967296", Err("not between")),
            ("2147483648", Err("not between")),
            ("99999999999", Err("not between")),
            ("bad", Err("no user bad")),
            ("short", Err("no user short")),
            ("+1", Err("+1 has a sign")),
            ("-1", Err("-1 has a sign")),
            ("web:-44", Err("-44 has a sign")),
            ("-", Err("no user -")),
            ("--1", Err("no user --1")),
            (" 0", Err("no user  0")),
            ("0x0", Err("no user 0x0")),
            ("web\0", Err("no user web\\x00")),
        ];
        for (text, expected) in cases {
            match (resolve(&asked(text), &accounts()), expected) {
                (Ok(found), Ok((uid, gid, groups, home))) => {
                    assert_eq!((found.uid, found.gid, &found.groups[..]), (*uid, *gid, *groups), "{text:?}");
                    assert_eq!(found.home, home.as_bytes(), "{text:?}");
                }
                (Err(failed), Err(words)) => assert!(failed.detail.contains(words), "{text:?}: {failed}"),
                (found, expected) => panic!("{text:?}: {found:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn files_with_the_line_ends_of_dos_are_read_as_others() {
        let dos = |file: &[u8]| String::from_utf8_lossy(file).replace('\n', "\r\n").into_bytes();
        let dos = Accounts { passwd: dos(PASSWD), group: dos(GROUP) };
        for user in ["web", "33", "web:extra", "7", "root"] {
            assert_eq!(
                resolve(&asked(user), &dos).unwrap(),
                resolve(&asked(user), &accounts()).unwrap(),
                "{user}"
            );
        }
        let short = Accounts { passwd: b"web:x:33:44\r\n".to_vec(), group: b"more:x:501:web\r\n".to_vec() };
        assert_eq!(resolve(&asked("web"), &short).unwrap().groups, [44, 501]);
    }

    #[test]
    fn groups_of_the_request_come_before_those_of_the_file() {
        let mut user = asked("web");
        user.supplementary_groups = vec![1234, 500];
        assert_eq!(resolve(&user, &accounts()).unwrap().groups, [44, 1234, 500, 501]);
        user.merge_groups = false;
        assert_eq!(resolve(&user, &accounts()).unwrap().groups, [44, 1234, 500]);
        user.group = Some(9);
        assert_eq!(resolve(&user, &accounts()).unwrap().groups, [9, 1234, 500]);
        user.supplementary_groups = vec![u32::MAX];
        assert!(resolve(&user, &accounts()).is_err());
    }

    proptest! {
        #[test]
        fn only_a_root_of_the_files_or_zero_becomes_root(text in "[^:]{1,16}") {
            if let Ok(found) = resolve(&asked(&text), &accounts()) {
                let zero = text.bytes().all(|byte| byte == b'0');
                prop_assert!(found.uid != 0 || zero || text == "root", "{text:?} became root");
            }
        }

        #[test]
        fn any_files_are_survived(passwd in prop::collection::vec(any::<u8>(), 0..300), group in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = resolve(&asked("web:extra"), &Accounts { passwd, group });
        }
    }
}
