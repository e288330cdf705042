//! The `berth` command: a command-line client of berthd.
//!
//! It talks to the daemon's socket only: CRI, as a kubelet does, and Berth's own service for what
//! the CRI has no call for; streams use the URLs that the daemon returns. It keeps no state.
//! Besides, it reads log files, whose paths the daemon reports.
//!
//! `args` defines the command line, `commands` has the subcommands; the other modules have one
//! subject each.
#![forbid(unsafe_code)]

mod args;
mod clock;
mod commands;
mod copy;
mod daemon;
mod detach_keys;
mod ending;
mod env_spec;
mod error;
#[cfg(test)]
mod fake_daemon;
mod interrupts;
mod log_file;
mod log_line;
mod log_stream;
mod mount_spec;
mod names;
mod output;
mod pod_name;
mod port_spec;
mod progress;
mod pull;
mod quantity;
mod relay;
mod remote;
mod run_plan;
mod table;
mod terminal;
mod user_spec;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::commands::{
    attach, completion, cp, doctor, exec, images, import, info, inspect, logs, port_forward, ps,
    pull as pull_command, rm, run, stats, stop,
};
use crate::daemon::Daemon;
use crate::error::{BERTH_FAILED, Error};

fn main() -> anyhow::Result<ExitCode> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return Ok(refuse_command_line(&error)),
    };
    // One thread is enough: a command mostly waits for the daemon. Following a log has its own
    // thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let runs_a_program = matches!(cli.command, Command::Run(_) | Command::Exec(_) | Command::Attach(_));
    let outcome = runtime.block_on(perform(cli));
    // Not dropped: that would wait for a thread that may be writing to a stalled reader.
    runtime.shutdown_background();
    Ok(outcome.unwrap_or_else(|error| {
        if !error.reader_is_gone() {
            output::remark(error.one_line());
        }
        error.exit_code(runs_a_program)
    }))
}

async fn perform(cli: Cli) -> Result<ExitCode, Error> {
    if let Command::Version = cli.command {
        return info::version(&cli.socket).await.map(|()| ExitCode::SUCCESS);
    }
    if let Command::Doctor = cli.command {
        return doctor::doctor(&cli.socket).await;
    }
    if let Command::Completion(args) = cli.command {
        return Ok(completion::completion(args.shell).map(|()| ExitCode::SUCCESS)?);
    }
    let daemon = &Daemon::connect(&cli.socket).await?;
    match cli.command {
        Command::Run(args) => return run::run(daemon, *args).await,
        Command::Exec(args) => return exec::exec(daemon, args).await,
        Command::Attach(args) => return attach::attach(daemon, args).await,
        Command::Pull(args) => pull_command::pull(daemon, args).await?,
        Command::Ps(args) => ps::containers(daemon, &args).await?,
        Command::Pods(args) => ps::pods(daemon, &args).await?,
        Command::Logs(args) => logs::logs(daemon, args).await?,
        Command::Cp(args) => cp::cp(daemon, args).await?,
        Command::PortForward(args) => port_forward::port_forward(daemon, &args).await?,
        Command::Stop(args) => stop::stop(daemon, &args).await?,
        Command::Rm(args) => rm::remove(daemon, &args).await?,
        Command::Images => images::list(daemon).await?,
        Command::Rmi(args) => images::remove(daemon, &args).await?,
        Command::Import(args) => import::import(daemon, args).await?,
        Command::Stats(args) => stats::stats(daemon, &args).await?,
        Command::Inspect(args) => inspect::inspect(daemon, &args).await?,
        Command::Info => info::info(daemon, &cli.socket).await?,
        // Handled above, since they need no daemon.
        Command::Version | Command::Doctor | Command::Completion(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what is wrong with the command line, or the requested help.
fn refuse_command_line(error: &clap::Error) -> ExitCode {
    // Fails only when there is no reader.
    let _unheard = error.print();
    if error.use_stderr() && args::runs_a_program(std::env::args_os()) {
        return ExitCode::from(BERTH_FAILED);
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(BERTH_FAILED))
}
