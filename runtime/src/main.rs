//! `berthd`: arguments and configuration, then the daemon.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use berth_runtime::config::{self, Config, Written};
use berth_runtime::host_paths::worker;
use berth_runtime::log::Lines;
use berth_runtime::reload::Reload;
use berth_runtime::reload_request;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// sysexits.h: configuration error.
const EXIT_CONFIG: u8 = 78;

/// The Berth container runtime: serves the Kubernetes CRI on a Unix socket.
#[derive(Debug, Parser)]
#[command(name = "berthd", version)]
struct Arguments {
    /// The configuration file; files in FILE.d/*.toml are read after it.
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_FILE)]
    config: PathBuf,
    /// Directory for images, records and writable layers.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory for files that do not survive a reboot: namespaces, sockets.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The socket to serve on.
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// The shim's program.
    #[arg(long, value_name = "FILE")]
    shim: Option<PathBuf>,
    /// What to log: error, warn, info, debug, trace, or a filter.
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// Check the configuration and exit.
    #[arg(long)]
    check_config: bool,
    /// Make the running berthd with this process id reload its configuration, wait for that, and
    /// exit.
    #[arg(long, value_name = "PID")]
    reload: Option<i32>,
    /// Print the configuration with all its defaults and exit.
    #[arg(long)]
    print_config: bool,
}

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == worker::WORD) {
        // Nobody but the daemon starts it, and it has nowhere to say why it failed.
        return if worker::run().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let arguments = Arguments::parse();
    if let Some(pid) = arguments.reload {
        return match reload_request::reload(pid) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let mistakes = matches!(error, reload_request::ReloadError::Mistakes(_));
                tell(&format!("berthd: {:#}", anyhow::Error::from(error)));
                if mistakes { ExitCode::from(EXIT_CONFIG) } else { ExitCode::FAILURE }
            }
        };
    }
    let config = match read(&arguments) {
        Ok(config) => config,
        Err(error) => {
            tell(&format!("berthd: {error:#}"));
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    if arguments.print_config {
        return match toml::to_string(&config.written()) {
            Ok(text) => {
                print(&text);
                ExitCode::SUCCESS
            }
            Err(error) => {
                tell(&format!("berthd: {error}"));
                ExitCode::FAILURE
            }
        };
    }
    if arguments.check_config {
        return ExitCode::SUCCESS;
    }
    let kept = berth_sys::process::keep_ended_children().context("set SIGCHLD to its default");
    match kept.and_then(|()| serve(config, arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&format!("berthd: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn read(arguments: &Arguments) -> anyhow::Result<Config> {
    let mut written = Written::default();
    for path in config::files(&arguments.config).context("read the configuration")? {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound
                    && path.as_os_str() == config::DEFAULT_FILE =>
            {
                continue;
            }
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let file = Written::parse(&text).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        written = file.over(written);
    }
    let flags = Written {
        root: arguments.root.clone(),
        state: arguments.state.clone(),
        socket: arguments.socket.clone(),
        shim: arguments.shim.clone(),
        log: arguments.log.clone(),
        ..Written::default()
    };
    Config::check(flags.over(written)).map_err(|mistakes| {
        let lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("the configuration is invalid:\n  {}", lines.join("\n  "))
    })
}

fn serve(config: Config, arguments: Arguments) -> anyhow::Result<()> {
    let lines = Lines::to_stderr();
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(&config.log).context("log")?)
        .with_writer(lines)
        .with_ansi(lines.has_colours())
        .with_filter_reloading();
    let filter_in_force = log.reload_handle();
    log.init();
    berth_sys::process::set_umask(0o077);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("berthd")
        .build()
        .context("start the async runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
        let mut hangup = signal(SignalKind::hangup()).context("wait for SIGHUP")?;
        // One more that waits is enough: the files are read after the change that it is about.
        let (want, wanted) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            while hangup.recv().await.is_some() {
                let _ = want.try_send(());
            }
        });
        let reload = Reload {
            wanted,
            read: Arc::new(move || read(&arguments).map_err(|error| format!("{error:#}"))),
            set_log: Box::new(move |text| {
                // It was checked with the rest of the configuration, and the log exists as long as
                // the daemon.
                if let Ok(filter) = EnvFilter::try_new(text) {
                    let _ = filter_in_force.reload(filter);
                }
            }),
        };
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        berth_runtime::daemon::run(config, stop, reload).await?;
        anyhow::Ok(())
    })?;
    // A pull or a deletion may be in a blocking call; the next daemon can handle what it leaves.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(())
}

#[expect(clippy::print_stderr, reason = "what cannot be logged yet is told where the caller looks")]
fn tell(text: &str) {
    eprintln!("{text}");
}

#[expect(clippy::print_stdout, reason = "--print-config is asked for on standard output")]
fn print(text: &str) {
    print!("{text}");
}
