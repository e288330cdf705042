//! The environment and the arguments of a container's main process, as text for execve(2).
//!
//! The image's strings may not be assignments; the request's are what its author wanted. A line
//! break in a value is legitimate, and here only a byte: none of this is ever written to a
//! line-based file (CVE-2022-4318).

use std::collections::HashMap;

use berth_shim_proto::launch::DEFAULT_PATH;

use super::{Inputs, SpecError};

/// The longest argument or variable: `MAX_ARG_STRLEN` of execve(2) is 32 pages of 4 KiB, with the
/// final NUL.
pub(super) const MAX_TEXT_BYTES: usize = 128 * 1024 - 1;

/// All arguments and variables together, in bytes. execve(2) allows a quarter of the stack limit, 2
/// MiB by default, and the program's name and pointers count too; refusing it here makes it an
/// error of the creation and not of the start.
pub(super) const MAX_TOTAL_BYTES: usize = 1024 * 1024;

/// The name of the request's variables in messages.
const REQUEST: &str = "envs";
/// The name of the image's variables in messages.
const IMAGE: &str = "the image's Env";

/// `NAME=value`, each name once, in the order of first appearance and with the last value.
pub(super) fn of_container(inputs: &Inputs<'_>) -> Result<Vec<String>, SpecError> {
    let mut variables = Variables::default();
    variables.set("PATH", DEFAULT_PATH);
    if inputs.config.tty {
        variables.set("TERM", "xterm");
    }
    if !inputs.hostname.is_empty() {
        variables.set("HOSTNAME", inputs.hostname);
    }
    for assignment in &inputs.image.env {
        check(IMAGE, assignment)?;
        // Strings without an assignment are left out: no program could use them, and such images
        // run elsewhere.
        if let Some((name, value)) = assignment.split_once('=').filter(|(name, _)| !name.is_empty()) {
            variables.set(name, value);
        }
    }
    for (name, value) in &inputs.config.envs {
        check(REQUEST, value)?;
        variables.set(name, value);
    }
    let assignments = variables.assignments;
    assignments.iter().try_for_each(|assignment| check(REQUEST, assignment))?;
    Ok(assignments)
}

/// Whether the text can be one argument or variable.
pub(super) fn check(origin: &'static str, text: &str) -> Result<(), SpecError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(SpecError::TextTooLong { origin, length: text.len() });
    }
    if text.contains('\0') {
        return Err(SpecError::NulByte { origin, text: text.to_owned() });
    }
    Ok(())
}

/// Whether all texts can be given to one program.
pub(super) fn check_total(args: &[String], env: &[String]) -> Result<(), SpecError> {
    let length = args.iter().chain(env).map(|text| text.len() + 1).sum();
    if length > MAX_TOTAL_BYTES { Err(SpecError::TooMuchText { length }) } else { Ok(()) }
}

#[derive(Default)]
struct Variables {
    assignments: Vec<String>,
    /// The position of each name in `assignments`: an image may have a million of them.
    places: HashMap<String, usize>,
}

impl Variables {
    fn set(&mut self, name: &str, value: &str) {
        let assignment = format!("{name}={value}");
        match self.places.get(name).and_then(|place| self.assignments.get_mut(*place)) {
            Some(earlier) => *earlier = assignment,
            None => {
                self.places.insert(name.to_owned(), self.assignments.len());
                self.assignments.push(assignment);
            }
        }
    }
}
