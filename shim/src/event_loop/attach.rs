//! Clients that attach to the container's own streams.
//!
//! Their output is copied beside the log ([`crate::attached`]), their input goes to the container's
//! by flows ([`crate::relay`]). Any number may attach, from when the container waits for its start,
//! and their input is interleaved.

use std::os::fd::OwnedFd;

use berth_shim_proto::control::{AttachRequest, Failed, Resize};

use super::execs::set_size;
use super::{Shim, State};
use crate::attached::LastWords;
use crate::cri_log::Stream;
use crate::failure::{Step, refused};
use crate::relay::{self, Ends, Way};
use crate::stdio::Output;

const ATTACH: &str = "attach to the container";

impl State {
    /// The streams of a container that has not ended.
    fn live_output(&mut self) -> Option<&mut Output> {
        if matches!(self, Self::Draining { .. }) { None } else { self.output_mut() }
    }
}

impl Shim {
    pub(super) fn attach(&mut self, request: AttachRequest, descriptors: Vec<OwnedFd>) -> Result<(), Failed> {
        self.check_descriptors(ATTACH)?;
        let token = self.new_tokens(2 + relay::TOKENS);
        let output = self.state.live_output().ok_or_else(|| refused(ATTACH, "it is not running"))?;
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(|| refused(ATTACH, "a descriptor is missing"));
        for (wanted, stream, token) in
            [(request.stdout, Stream::Stdout, token), (request.stderr, Stream::Stderr, token + 1)]
        {
            if wanted {
                output.attach(stream, next()?, token, &self.poll).step(ATTACH, "")?;
            }
        }
        // Without an input, the client's is closed.
        if request.stdin
            && let (from, Some(input)) = (next()?, output.input())
        {
            let to = input.try_clone_to_owned().step(ATTACH, "")?;
            let token = token + 2;
            self.relays.add(Ends { way: Way::In, from, to }, token, token, &self.poll).step(ATTACH, "")?;
            self.inputs.push(token);
        }
        Ok(())
    }

    /// Sets the size of the container's terminal.
    pub(super) fn resize_main(&mut self, resize: Resize) -> Result<(), Failed> {
        const STEP: &str = "resize the terminal";
        let output = self.state.live_output().ok_or_else(|| refused(STEP, "the container is not running"))?;
        set_size(output.terminal().ok_or_else(|| refused(STEP, "the container has none"))?, resize)
    }

    /// Handles a wake-up for a client that closed one of its pipes.
    pub(super) fn client_left(&mut self, token: u64) -> bool {
        // Also while output is drained: it would be reported again and again.
        self.state.output_mut().is_some_and(|output| output.leave(token, &self.poll))
    }

    /// Closes the container's input when a client with input has left, if so configured.
    pub(super) fn look_after_input(&mut self) {
        let attached = self.inputs.len();
        self.inputs.retain(|group| self.relays.has(*group));
        let is_once = self.state.launch().is_some_and(|launch| launch.stdin_once && !launch.process.terminal);
        if self.inputs.len() < attached
            && is_once
            && let Some(output) = self.state.live_output()
        {
            output.close_input();
            for group in std::mem::take(&mut self.inputs) {
                self.relays.end(group, &self.poll);
            }
        }
    }

    pub(super) fn say_last_words(&mut self, untold: Vec<LastWords>) {
        for LastWords { to, token, words } in untold {
            self.relays.add_last_words(to, token, words, &self.poll);
        }
    }
}
