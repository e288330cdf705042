//! What streaming clients do that no good one does, and a server that cannot listen.

use crate::streams::piped;
use anyhow::{Context as _, Result, ensure};
use berth_tests::daemon::{SOON, Setup, rootful_with};
use berth_tests::deadline::within;
use berth_tests::streams::Command;
use tonic::Code;

#[test]
fn an_address_in_use_delays_streams_and_nothing_else() -> Result<()> {
    let setup = Setup { configuration: "[streaming]\naddress = '127.0.0.1:41234'\n", ..Setup::default() };
    rootful_with(setup, |daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let request = piped(&main, &["true"]);
        ensure!(daemon.client().exec(request.clone())?.url.starts_with("http://127.0.0.1:41234/exec/"));
        daemon.stop()?;
        let listener = daemon.host().inside(|| Ok(std::net::TcpListener::bind("127.0.0.1:41234")?))?;
        daemon.start_again()?;
        let refused = daemon.client().exec(request.clone()).err().context("nobody listens")?;
        assert_eq!(refused.code(), Code::Unavailable);
        ensure!(
            refused.message().contains("127.0.0.1:41234") && refused.message().contains("in use"),
            "{refused}"
        );
        ensure!(daemon.log()?.contains("cannot listen on streaming.address"), "it is not in the log");
        assert_eq!(main.sh("echo served")?, "served\n");
        drop(listener);
        within(SOON, "the streaming server listens", || Ok(daemon.client().exec(request.clone()).ok()))?;
        assert_eq!(Command::start(daemon, request)?.finished()?.code(), Some(0));
        Ok(())
    })
}
