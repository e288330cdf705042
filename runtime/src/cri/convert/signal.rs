//! `Signal` of the CRI and the numbers of signal(7). The CRI numbers them alphabetically.

use berth_cri::v1::Signal;

use super::field::{Field, Rejected};

/// The first and last real-time signal of glibc, which reserves 32 and 33. musl's first is
/// 35, but names in pods and images follow glibc.
const FIRST_REAL_TIME: i32 = 34;
const LAST_REAL_TIME: i32 = 64;

/// The signals before the real-time ones: signal(7), the numbers of x86 and Arm. Of two names for
/// the same number the first is used.
const NUMBERS: [(Signal, i32); 34] = [
    (Signal::Sighup, 1),
    (Signal::Sigint, 2),
    (Signal::Sigquit, 3),
    (Signal::Sigill, 4),
    (Signal::Sigtrap, 5),
    (Signal::Sigabrt, 6),
    (Signal::Sigiot, 6),
    (Signal::Sigbus, 7),
    (Signal::Sigfpe, 8),
    (Signal::Sigkill, 9),
    (Signal::Sigusr1, 10),
    (Signal::Sigsegv, 11),
    (Signal::Sigusr2, 12),
    (Signal::Sigpipe, 13),
    (Signal::Sigalrm, 14),
    (Signal::Sigterm, 15),
    (Signal::Sigstkflt, 16),
    (Signal::Sigchld, 17),
    (Signal::Sigcld, 17),
    (Signal::Sigcont, 18),
    (Signal::Sigstop, 19),
    (Signal::Sigtstp, 20),
    (Signal::Sigttin, 21),
    (Signal::Sigttou, 22),
    (Signal::Sigurg, 23),
    (Signal::Sigxcpu, 24),
    (Signal::Sigxfsz, 25),
    (Signal::Sigvtalrm, 26),
    (Signal::Sigprof, 27),
    (Signal::Sigwinch, 28),
    (Signal::Sigio, 29),
    (Signal::Sigpoll, 29),
    (Signal::Sigpwr, 30),
    (Signal::Sigsys, 31),
];

/// The number of the signal, or `None` for "as the image says".
///
/// # Errors
/// [`Rejected`] when the CRI has no such signal.
pub fn signal_number(field: &Field<'_>, message: i32) -> Result<Option<i32>, Rejected> {
    let signal = Signal::try_from(message).map_err(|_| field.invalid(format!("unknown signal {message}")))?;
    if signal == Signal::RuntimeDefault {
        return Ok(None);
    }
    let named = NUMBERS.iter().find(|(known, _)| *known == signal).map(|(_, number)| *number);
    // All others are real-time signals, in order and without gaps.
    Ok(Some(named.unwrap_or(message - Signal::Sigrtmin as i32 + FIRST_REAL_TIME)))
}

/// The signal with this number, for a status; "not reported" for a number without a name in the
/// CRI.
#[must_use]
pub fn signal_message(number: i32) -> Signal {
    if (FIRST_REAL_TIME..=LAST_REAL_TIME).contains(&number) {
        return Signal::try_from(number - FIRST_REAL_TIME + Signal::Sigrtmin as i32).unwrap_or_default();
    }
    NUMBERS.iter().find(|(_, known)| *known == number).map_or(Signal::RuntimeDefault, |(signal, _)| *signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel_and_not_of_the_enum() {
        let cases = [
            ("SIGNAL_SIGHUP", 1),
            ("SIGNAL_SIGKILL", 9),
            ("SIGNAL_SIGTERM", 15),
            ("SIGNAL_SIGQUIT", 3),
            ("SIGNAL_SIGUSR1", 10),
            ("SIGNAL_SIGWINCH", 28),
            ("SIGNAL_SIGIOT", 6),
            ("SIGNAL_SIGCLD", 17),
            ("SIGNAL_SIGPOLL", 29),
            ("SIGNAL_SIGRTMIN", 34),
            ("SIGNAL_SIGRTMINPLUS1", 35),
            ("SIGNAL_SIGRTMINPLUS3", 37),
            ("SIGNAL_SIGRTMINPLUS15", 49),
            ("SIGNAL_SIGRTMAXMINUS14", 50),
            ("SIGNAL_SIGRTMAXMINUS1", 63),
            ("SIGNAL_SIGRTMAX", 64),
        ];
        for (name, number) in cases {
            let signal = Signal::from_str_name(name).expect(name);
            assert_eq!(signal_number(&Field::root("s"), signal as i32), Ok(Some(number)), "{name}");
        }
    }

    #[test]
    fn every_signal_comes_back_by_its_number() {
        assert_eq!(signal_number(&Field::root("s"), 0), Ok(None));
        let mut seen = std::collections::BTreeSet::new();
        for message in 1..=65 {
            let number = signal_number(&Field::root("s"), message).unwrap().unwrap();
            seen.insert(number);
            let back = signal_message(number);
            assert_eq!(signal_number(&Field::root("s"), back as i32), Ok(Some(number)), "{message}");
        }
        let all: std::collections::BTreeSet<i32> = (1..=31).chain(34..=64).collect();
        assert_eq!(seen, all);
    }

    #[test]
    fn what_is_no_signal_is_refused_or_not_reported() {
        for message in [-1, 66, 137, i32::MAX, i32::MIN] {
            assert!(signal_number(&Field::root("config.stop_signal"), message).is_err(), "{message}");
        }
        for number in [i32::MIN, -1, 0, 32, 33, 65, i32::MAX] {
            assert_eq!(signal_message(number), Signal::RuntimeDefault, "{number}");
        }
    }
}
