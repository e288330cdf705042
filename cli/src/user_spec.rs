//! `USER[:GROUP]`, the user that a program runs as.
//!
//! Pure parsing. Names are looked up in the image's passwd file, by the daemon.

/// The user of a container's program, as the CRI represents it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum UserSpec {
    /// By id, with a group if one is given.
    Id {
        /// User id in the container.
        uid: u32,
        /// Group id in the container.
        gid: Option<u32>,
    },
    /// By name, with a group if one is given.
    Name {
        /// A name from the image's passwd file.
        name: String,
        /// Group id in the container.
        gid: Option<u32>,
    },
}

/// Why a text is not a user.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum UserSpecError {
    /// Empty, or with characters that a name in a passwd file cannot have.
    #[error("`{0}` is not a user; use a name or id, optionally followed by :GID")]
    User(String),
    /// The CRI has no field for group names.
    #[error("`{0}` is not a group id; groups cannot be given by name")]
    Group(String),
}

impl std::str::FromStr for UserSpec {
    type Err = UserSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let gid = match group {
            Some(group) => Some(parse_id(group).ok_or_else(|| UserSpecError::Group(group.to_owned()))?),
            None => None,
        };
        let bad = || UserSpecError::User(user.to_owned());
        if user.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok(Self::Id { uid: parse_id(user).ok_or_else(bad)?, gid });
        }
        // A leading minus sign is a misplaced option; the rest would break a line of passwd(5).
        let allowed = |character: char| !character.is_control() && !character.is_whitespace();
        if user.starts_with('-') || !user.chars().all(allowed) {
            return Err(bad());
        }
        Ok(Self::Name { name: user.to_owned(), gid })
    }
}

/// Parses a user or group id. The highest number is refused: to the kernel it means "none"
/// (chown(2)).
fn parse_id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok().filter(|id| *id != u32::MAX) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read_by_name_and_number() {
        for (text, expected) in [
            ("0", UserSpec::Id { uid: 0, gid: None }),
            ("1000:100", UserSpec::Id { uid: 1000, gid: Some(100) }),
            ("4294967294", UserSpec::Id { uid: 4_294_967_294, gid: None }),
            ("www-data", UserSpec::Name { name: "www-data".into(), gid: None }),
            ("www-data:33", UserSpec::Name { name: "www-data".into(), gid: Some(33) }),
            ("1a", UserSpec::Name { name: "1a".into(), gid: None }),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_user_is_refused() {
        for (text, user) in [
            ("", ""),
            (":5", ""),
            ("-1", "-1"),
            ("a b", "a b"),
            ("a\0", "a\0"),
            ("a\nroot", "a\nroot"),
            ("4294967295", "4294967295"),
            ("99999999999", "99999999999"),
        ] {
            assert_eq!(text.parse::<UserSpec>(), Err(UserSpecError::User(user.into())), "{text:?}");
        }
        for (text, group) in
            [("0:", ""), ("0:staff", "staff"), ("0:1:2", "1:2"), ("a:-1", "-1"), ("a:+1", "+1")]
        {
            assert_eq!(text.parse::<UserSpec>(), Err(UserSpecError::Group(group.into())), "{text:?}");
        }
    }
}
