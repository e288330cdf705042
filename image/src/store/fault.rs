//! What is wrong with something on disk, and what may be done about it.
//!
//! Three answers that look alike to a careless reader: it could not be read this time, it is not
//! understood, it is damaged. Only the last is proven, by a checksum or a digest, and only what is
//! proven damaged is ever set aside. A directory that is in use stays in every case.

use super::record::RecordError;

/// What keeps a record, or what it describes, from being used as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// Reading failed: `EIO`, `EMFILE`, `EACCES` and whatever else may pass. It is read again
    /// later.
    Unread(String),
    /// Written by another version of Berth, which may come back. Never touched by this one.
    Foreign(String),
    /// Its bytes are not those that were written.
    Damaged(String),
}

impl Fault {
    pub(super) fn of(error: &RecordError) -> Self {
        let text = chain(error);
        match error {
            RecordError::Access(_) => Self::Unread(text),
            RecordError::Version(_) | RecordError::Content(_) => Self::Foreign(text),
            RecordError::Form(_) | RecordError::Torn | RecordError::TooLong => Self::Damaged(text),
        }
    }

    pub(super) fn is_unread(&self) -> bool {
        matches!(self, Self::Unread(_))
    }

    pub(super) fn is_foreign(&self) -> bool {
        matches!(self, Self::Foreign(_))
    }

    pub(super) fn is_damaged(&self) -> bool {
        matches!(self, Self::Damaged(_))
    }

    /// Of two, the one that leaves more hope.
    pub(super) fn or(self, other: Self) -> Self {
        let hope = |fault: &Self| match fault {
            Self::Unread(_) => 2,
            Self::Foreign(_) => 1,
            Self::Damaged(_) => 0,
        };
        if hope(&other) > hope(&self) { other } else { self }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unread(why) => write!(f, "cannot be read now: {why}"),
            Self::Foreign(why) => write!(f, "was written by another version of Berth: {why}"),
            Self::Damaged(why) => write!(f, "is damaged: {why}"),
        }
    }
}

/// An error with its causes, on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        text.push_str(": ");
        text.push_str(&below.to_string());
        cause = below.source();
    }
    text
}
