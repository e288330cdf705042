//! The stop signal of an image: `StopSignal` of its configuration.
//!
//! OCI image-spec 1.1, `config.md`: "the signal can be in the format `SIGNAME`, for instance
//! `SIGKILL` or `SIGRTMIN+3`". Numbers, names without `SIG` and lower case are in use, too. An
//! invalid signal is an error when the container is created, not a silent SIGTERM: a database that
//! is stopped by the wrong signal loses data.

use berth_sys::process::SIGTERM;

/// The first real-time signal of glibc, which reserves two of the kernel's (32 and 33):
/// signal(7). Names are written for programs, and systemd's `SIGRTMIN+3` is 37 everywhere.
const FIRST_REAL_TIME: i32 = 34;
/// The last one.
const LAST_REAL_TIME: i32 = 64;

/// Numbers as on every architecture but Alpha, MIPS, PA-RISC and SPARC: signal(7).
const NAMES: [(&str, i32); 35] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("UNUSED", 31),
];

/// The image's text names no signal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the image's StopSignal {0:?} is not a signal")]
pub struct UnknownSignal(pub String);

/// The number of the signal, 1 to 64. Empty text is SIGTERM.
///
/// # Errors
/// [`UnknownSignal`].
pub fn stop_signal(text: &str) -> Result<i32, UnknownSignal> {
    if text.is_empty() {
        return Ok(SIGTERM);
    }
    number(text)
        .filter(|number| (1..=LAST_REAL_TIME).contains(number))
        .ok_or_else(|| UnknownSignal(text.to_owned()))
}

fn number(text: &str) -> Option<i32> {
    if let Some(number) = digits(text) {
        return Some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let real_time = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(""), _) => FIRST_REAL_TIME,
        (_, Some("")) => LAST_REAL_TIME,
        (Some(offset), _) => FIRST_REAL_TIME + digits(offset.strip_prefix('+')?)?,
        (_, Some(offset)) => LAST_REAL_TIME - digits(offset.strip_prefix('-')?)?,
        (None, None) => return None,
    };
    (FIRST_REAL_TIME..=LAST_REAL_TIME).contains(&real_time).then_some(real_time)
}

/// At most two digits and no sign.
fn digits(text: &str) -> Option<i32> {
    let plain = (1..=2).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if plain { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_understood() {
        for (text, expected) in [
            ("", 15),
            ("SIGTERM", 15),
            ("TERM", 15),
            ("sigquit", 3),
            ("SIGWINCH", 28),
            ("9", 9),
            ("09", 9),
            ("64", 64),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("rtmin+30", 64),
            ("SIGRTMAX", 64),
            ("RTMAX-30", 34),
            ("SIGRTMAX-0", 64),
        ] {
            assert_eq!(stop_signal(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_names_no_signal_is_refused() {
        for text in [
            "0",
            "65",
            "-1",
            "+9",
            "999",
            " 9",
            "9 ",
            "SIG",
            "SIGSIGTERM",
            "TERM\0",
            "SIGTERM\n",
            "RTMIN-1",
            "RTMIN+31",
            "RTMAX+1",
            "RTMAX-31",
            "RTMIN+",
            "RTMIN+-1",
            "RTMIN+999999999999",
            "١",
            "BOGUS",
        ] {
            assert_eq!(stop_signal(text), Err(UnknownSignal(text.to_owned())), "{text:?}");
        }
    }
}
