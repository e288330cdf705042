//! The command line and its help.
//!
//! Values are checked as they are parsed, so that mistakes are reported before anything is done.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use berth_api::DEFAULT_SOCKET;
use berth_cri::v1::KeyValue;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::copy::place::Place;
use crate::detach_keys::DetachKeys;
use crate::mount_spec::MountSpec;
use crate::port_spec::PortSpec;
use crate::run_plan::DEFAULT_CONTAINER;
use crate::user_spec::UserSpec;
use crate::{detach_keys, env_spec, pod_name, quantity};

/// Manage pods and containers on this machine through berthd.
#[derive(Debug, Parser)]
#[command(name = "berth", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// Socket of the daemon.
    #[arg(long, global = true, env = "BERTH_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    /// The subcommand.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// A subcommand.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a program in a new pod and show its output.
    ///
    /// The exit code is the program's, 125 if Berth itself failed, 126 if the program cannot be
    /// run, or 127 if it is not found. Ctrl-C stops the container as `berth stop` does; pressed
    /// again, it kills the container. A kubelet that uses the same daemon removes pods it did not
    /// create, including these.
    #[command(override_usage = "berth run [OPTIONS] IMAGE [CMD]...")]
    Run(Box<RunArgs>),
    /// Pull an image from its registry.
    Pull(PullArgs),
    /// List containers.
    Ps(PsArgs),
    /// List pods.
    Pods(PodsArgs),
    /// Show the output of a container.
    Logs(LogsArgs),
    /// Run a program in a running container.
    ///
    /// The exit code is the program's, 125 if Berth itself failed, 126 if the program cannot be
    /// run, or 127 if it is not found. The program ends with this command: when it is interrupted,
    /// or its terminal or the reader of its output goes away. It has the container's environment,
    /// working directory and user.
    #[command(override_usage = "berth exec [OPTIONS] CONTAINER CMD...")]
    Exec(ExecArgs),
    /// Attach to the input, output and terminal of a running container.
    ///
    /// Shows output from now on; `berth logs` has earlier output. Ctrl-C on the container's
    /// terminal goes to the program; detaching, or ending this command in any other way, leaves it
    /// running. When the container exits, this command exits with its exit code.
    Attach(AttachArgs),
    /// Copy files from or to a running container.
    ///
    /// If TO is an existing directory, FROM is copied into it; otherwise TO is the new name. DIR/.
    /// means the contents of DIR. With - a tar archive is read or written. Files copied out are
    /// owned by the caller, files copied in by the container's user. Devices are skipped. The
    /// container's tar is used if there is one, but none is needed.
    #[command(override_usage = "berth cp CONTAINER:PATH PATH|-\n       berth cp PATH|- CONTAINER:PATH")]
    Cp(CpArgs),
    /// Forward ports of this machine's loopback addresses to a pod.
    ///
    /// Listens on 127.0.0.1 and ::1 until interrupted, and prints a line for each address. Ports
    /// need not be published, and servers on the pod's loopback can be reached as well.
    PortForward(PortForwardArgs),
    /// Stop containers, or all containers in pods.
    Stop(StopArgs),
    /// Remove pods or containers, and the logs of pods made by `berth run`.
    Rm(RmArgs),
    /// List images.
    Images,
    /// Remove images with all their names.
    Rmi(RmiArgs),
    /// Import images from an archive or directory (OCI layout or docker-archive).
    Import(ImportArgs),
    /// Show resource usage of containers and of Berth itself.
    Stats(StatsArgs),
    /// Show everything known about pods, containers or images, as JSON.
    Inspect(InspectArgs),
    /// Show the versions of this command and the daemon.
    Version,
    /// Print the completion script of a shell.
    ///
    /// For bash: `berth completion bash >/etc/bash_completion.d/berth`, and open a new shell.
    Completion(CompletionArgs),
    /// Show the daemon's settings and state.
    Info,
    /// Check this node for problems that keep pods from running.
    ///
    /// Prints a line for each finding: ok, note or BROKEN, with what to do. The exit code is 1 if
    /// something is broken.
    Doctor,
}

/// Arguments of `berth run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Name and hostname of the pod [default: from the image].
    #[arg(long, value_parser = pod_name::check)]
    pub(crate) name: Option<String>,
    /// Run in this existing pod instead of a new one.
    #[arg(long, value_name = "POD", conflicts_with_all = ["name", "host_network", "log_dir", "log_bytes"])]
    pub(crate) pod: Option<String>,
    /// Name of the container in its pod.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_CONTAINER, value_parser = pod_name::check)]
    pub(crate) container: String,
    /// Set an environment variable; NAME alone takes the value from this environment.
    #[arg(short, long = "env", value_name = "NAME[=VALUE]", value_parser = parse_env)]
    pub(crate) envs: Vec<KeyValue>,
    /// Mount a path of the host in the container; options: ro, rw, rprivate, rslave, rshared.
    #[arg(short = 'v', long = "mount", value_name = "SOURCE:TARGET[:OPTIONS]")]
    pub(crate) mounts: Vec<MountSpec>,
    /// Memory limit, such as 64Mi.
    #[arg(short, long = "memory", value_name = "BYTES", value_parser = quantity::parse_memory)]
    pub(crate) memory_limit_bytes: Option<i64>,
    /// CPU limit, in CPUs, such as 0.5.
    #[arg(long = "cpus", value_name = "N", value_parser = quantity::parse_cpu_quota_us)]
    pub(crate) cpu_quota_us: Option<i64>,
    /// Use the host's network and hostname.
    #[arg(long)]
    pub(crate) host_network: bool,
    /// User to run as, by name or id [default: from the image].
    #[arg(short, long, value_name = "USER[:GID]")]
    pub(crate) user: Option<UserSpec>,
    /// Directory in which the pod's log directory is created.
    #[arg(long, value_name = "PATH", default_value = "/var/log/berth")]
    pub(crate) log_dir: PathBuf,
    /// Size at which a log of the pod is rotated, such as 10Mi; four older files are kept. 0 for
    /// never. A log that this command shows is not rotated.
    #[arg(long = "log-size", value_name = "BYTES", default_value = "10Mi", value_parser = parse_log_size)]
    pub(crate) log_bytes: i64,
    /// Remove the pod (or container) and its logs when it exits; this is the default.
    #[arg(long, conflicts_with_all = ["keep", "detach"])]
    pub(crate) rm: bool,
    /// Keep the pod (or container) and its logs after it exits, until `berth rm`.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Run in the background and print the container id.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Pass on standard input to the program; without this, `berth attach` cannot either.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Allocate a terminal for the program.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Keys that detach from the program when typed on its terminal, such as ctrl-p,ctrl-q or
    /// ctrl-@,x; empty for none.
    #[arg(long, value_name = "KEYS", default_value = detach_keys::DEFAULT)]
    pub(crate) detach_keys: DetachKeys,
    /// The image, pulled if missing, and arguments for its entry point (or the program, if it has
    /// none) that replace the image's own.
    // One argument, not two: everything after the image belongs to the program, even what looks
    // like an option.
    #[arg(trailing_var_arg = true, required = true, value_name = "IMAGE [CMD]")]
    image_and_command: Vec<String>,
}

impl RunArgs {
    /// The image, and the arguments for it.
    pub(crate) fn image_and_command(&self) -> (&str, &[String]) {
        // There is at least one value, or the command line is refused.
        self.image_and_command.split_first().map_or(("", &[]), |(image, command)| (image, command))
    }
}

/// Arguments of `berth pull`.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// The image.
    pub(crate) image: String,
    /// User name for the registry.
    #[arg(long, requires = "password_stdin", value_name = "NAME")]
    pub(crate) username: Option<String>,
    /// Read the password from the first line of standard input.
    #[arg(long, requires = "username")]
    pub(crate) password_stdin: bool,
    /// Print only the image id.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Arguments of `berth ps`.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Include exited containers, and pods without containers.
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Print only full container ids.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Arguments of `berth pods`.
#[derive(Debug, Args)]
pub(crate) struct PodsArgs {
    /// Print only full ids.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Arguments of `berth logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Follow the output until the container exits.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Show only the last N lines.
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) tail: Option<u64>,
    /// Print the time before each line.
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// The container: an id or unique prefix, the name of its pod, or POD/CONTAINER.
    pub(crate) container: String,
}

/// Arguments of `berth exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Pass on standard input to the program.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Allocate a terminal for the program.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Keys that detach from the program, which keeps running, when typed on its terminal, such as
    /// ctrl-p,ctrl-q or ctrl-@,x; empty for none.
    #[arg(long, value_name = "KEYS", default_value = detach_keys::DEFAULT)]
    pub(crate) detach_keys: DetachKeys,
    /// Kill the program after this many seconds [default: never].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) timeout: Option<u32>,
    /// The container: an id or unique prefix, the name of its pod, or POD/CONTAINER.
    pub(crate) container: String,
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// Arguments of `berth attach`.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Do not pass on standard input.
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Keys that detach, such as ctrl-p,ctrl-q or ctrl-@,x; empty for none.
    #[arg(long, value_name = "KEYS", default_value = detach_keys::DEFAULT)]
    pub(crate) detach_keys: DetachKeys,
    /// The container: an id or unique prefix, the name of its pod, or POD/CONTAINER.
    pub(crate) container: String,
}

/// Arguments of `berth cp`.
#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// What to copy.
    #[arg(value_name = "FROM", value_parser = OsStringValueParser::new().try_map(Place::of))]
    pub(crate) from: Place,
    /// Where to.
    #[arg(value_name = "TO", value_parser = OsStringValueParser::new().try_map(Place::of))]
    pub(crate) to: Place,
}

/// Arguments of `berth port-forward`.
#[derive(Debug, Args)]
pub(crate) struct PortForwardArgs {
    /// The pod, or one of its containers.
    pub(crate) pod: String,
    /// Local port and port in the pod; REMOTE alone uses the same local port, :REMOTE any free one.
    #[arg(required = true, value_name = "[LOCAL:]REMOTE")]
    pub(crate) ports: Vec<PortSpec>,
}

/// Arguments of `berth stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Seconds to wait after the stop signal before killing.
    #[arg(short = 't', long = "time", value_name = "SECONDS", default_value_t = 10)]
    pub(crate) grace_seconds: u32,
    /// Containers or pods.
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// Arguments of `berth rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Kill running containers. Takes whole names and ids, or at least four characters of an id.
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Containers or pods.
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// Arguments of `berth rmi`.
#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Also remove images that containers use; the containers keep running, and keep the layers.
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Images, by name or id.
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

/// Arguments of `berth import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Name for the image, instead of those in the archive.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Upload the archive, for a daemon that cannot read this file system.
    #[arg(long)]
    pub(crate) upload: bool,
    /// An archive, a directory with an OCI layout, or - for an archive on standard input.
    #[arg(value_name = "FILE|DIR|-")]
    pub(crate) source: PathBuf,
}

/// Arguments of `berth stats`.
#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Containers or pods [default: all].
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// Arguments of `berth inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Containers, pods or images.
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

fn parse_log_size(text: &str) -> Result<i64, quantity::QuantityError> {
    if text == "0" { Ok(0) } else { quantity::parse_memory(text) }
}

fn parse_env(text: &str) -> Result<KeyValue, env_spec::EnvSpecError> {
    env_spec::parse(text, |name| std::env::var_os(name))
}

/// Whether the exit code of the command line is another program's, so that a mistake in it needs a
/// code that programs do not use. For command lines that cannot be parsed.
pub(crate) fn runs_a_program(arguments: impl Iterator<Item = OsString>) -> bool {
    let mut arguments = arguments.skip(1);
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--socket") => drop(arguments.next()),
            Some(option) if option.starts_with('-') => {}
            command => return matches!(command, Some("run" | "exec" | "attach")),
        }
    }
    false
}

/// The path of an argument that stands for standard input.
pub(crate) fn is_standard_input(path: &OsStr) -> bool {
    path == "-"
}

/// Arguments of `berth completion`.
#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell.
    #[arg(value_name = "SHELL")]
    pub(crate) shell: Shell,
}

/// A shell that completes command lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    /// bash(1).
    Bash,
    /// zsh(1).
    Zsh,
    /// fish(1).
    Fish,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    fn run(line: &str) -> Box<RunArgs> {
        match parse(line).unwrap().command {
            Command::Run(args) => args,
            other => panic!("not run: {other:?}"),
        }
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_behind_the_image_are_the_programs() {
        let args = run("berth run --name web -e A=b image --name x -d -- --socket y");
        assert_eq!(args.name.as_deref(), Some("web"));
        let command = ["--name", "x", "-d", "--", "--socket", "y"].map(str::to_owned);
        assert_eq!(args.image_and_command(), ("image", &command[..]));
        assert!(!args.detach);
    }

    #[test]
    fn a_program_with_a_dash_is_taken_by_exec() {
        let Command::Exec(args) = parse("berth exec web sh -c ls").unwrap().command else {
            panic!("not exec")
        };
        assert_eq!((args.container.as_str(), args.command.join(" ")), ("web", "sh -c ls".into()));
    }

    #[test]
    fn short_options_are_those_that_people_know() {
        let Command::Stop(args) = parse("berth stop -t 3 web").unwrap().command else { panic!("not stop") };
        assert_eq!((args.grace_seconds, args.names), (3, vec!["web".to_owned()]));
        let Command::Logs(args) = parse("berth logs -fn 5 web").unwrap().command else { panic!("not logs") };
        assert_eq!((args.follow, args.tail), (true, Some(5)));
        let Command::Exec(args) = parse("berth exec -it web sh").unwrap().command else { panic!("not exec") };
        assert!(args.interactive && args.tty);
        let args = run("berth run -it image");
        assert!(args.interactive && args.tty);
        let args = run("berth run -d -e A=b -m 1Mi -u 5 -v /a:/b image");
        assert!(args.detach && args.envs.len() == 1 && args.user.is_some() && args.mounts.len() == 1);
    }

    #[test]
    fn limits_are_read_into_numbers() {
        let args = run("berth run -m 64Mi --cpus 0.5 image");
        assert_eq!((args.memory_limit_bytes, args.cpu_quota_us), (Some(64 << 20), Some(50_000)));
    }

    #[test]
    fn contradictions_and_mistakes_are_refused() {
        for (line, kind) in [
            ("berth run --rm --keep image", ErrorKind::ArgumentConflict),
            ("berth run --rm -d image", ErrorKind::ArgumentConflict),
            ("berth run --pod web --name x image", ErrorKind::ArgumentConflict),
            ("berth run --pod web --host-network image", ErrorKind::ArgumentConflict),
            ("berth run --container ../x image", ErrorKind::ValueValidation),
            ("berth run", ErrorKind::MissingRequiredArgument),
            ("berth run --nme web image", ErrorKind::UnknownArgument),
            ("berth run --memory lots image", ErrorKind::ValueValidation),
            ("berth run --name No image", ErrorKind::ValueValidation),
            ("berth run --mount here image", ErrorKind::ValueValidation),
            ("berth run -e =x image", ErrorKind::ValueValidation),
            ("berth exec web", ErrorKind::MissingRequiredArgument),
            ("berth stop -t soon web", ErrorKind::ValueValidation),
            ("berth pull --username me image", ErrorKind::MissingRequiredArgument),
            ("berth sing", ErrorKind::InvalidSubcommand),
        ] {
            assert_eq!(parse(line).unwrap_err().kind(), kind, "{line}");
        }
    }

    #[test]
    fn commands_that_run_a_program_are_known_by_their_first_word() {
        let says = |line: &str| runs_a_program(line.split_whitespace().map(OsString::from));
        for line in
            ["berth run", "berth exec x", "berth --socket /s run", "berth --socket=/s exec", "berth attach"]
        {
            assert!(says(line), "{line}");
        }
        for line in ["berth", "berth ps run", "berth --socket run ps", "berth --socket", "berth rm exec"] {
            assert!(!says(line), "{line}");
        }
    }
}
