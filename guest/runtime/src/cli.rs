//! The command line of an OCI runtime, as runc defines it and containerd's shim uses it.
//!
//! Only `create`, `run` and `exec` are parsed. Their arguments are rebuilt from the parsed options, so that an option
//! which this program does not know (crun's `--config`, say) cannot pass. The parser is written by hand
//! because it has to accept all that Go's flag package does, and no crate mirrors that.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Component, Path, PathBuf},
};

use crate::log::{Format, Log};

/// crun's state directory without `--root`.
const DEFAULT_STATE_ROOT: &str = "/run/crun";

/// The reason why a command line is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CliError {
    /// No command was given.
    #[error("no command given; try 'sysbox-runc --help'")]
    NoCommand,
    /// The command does not exist, or would start a container past the checks.
    #[error("sysbox-runc does not support the command '{0}'")]
    Command(String),
    /// The option does not exist, or would undo a check.
    #[error("sysbox-runc does not support the option '{0}' here")]
    Option(String),
    /// The option is the last word and lacks its value.
    #[error("option '{0}' needs a value")]
    Value(String),
    /// No container id was given, or more than one.
    #[error("expected exactly one container id")]
    Id,
    /// The id could name a file outside the state directories, or be taken for an option.
    #[error("invalid container id '{0}'; use 1 to 128 of A-Z a-z 0-9 _ + - . and do not start with - or .")]
    InvalidId(String),
}

/// The options before the command.
#[derive(Clone, Debug, Default)]
pub(crate) struct GlobalOptions {
    /// `--root`, as given.
    pub(crate) root: Option<PathBuf>,
    /// `--log` and `--log-format`.
    pub(crate) log: Log,
    /// The other options for crun, normalised to `--name=value`.
    others: Vec<OsString>,
}

impl GlobalOptions {
    /// crun's state directory.
    pub(crate) fn state_root(&self) -> &Path {
        self.root.as_deref().unwrap_or(Path::new(DEFAULT_STATE_ROOT))
    }

    /// The options for crun.
    pub(crate) fn for_crun(&self) -> Vec<OsString> {
        let root = self.root.as_ref().map(|root| joined("--root", root.as_os_str()));
        root.into_iter().chain(self.others.iter().cloned()).collect()
    }

    /// Has crun keep its state below `directory`, by the path that was given or is the default: ids of different state
    /// directories may be equal.
    pub(crate) fn keep_state_in(&mut self, directory: &Path) -> Result<(), CliError> {
        let refused = || CliError::Option("--root".to_owned());
        let given = self.state_root().strip_prefix("/").map_err(|_| refused())?;
        // `..` would lead out again.
        if !given.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(refused());
        }
        self.root = Some(directory.iter().chain(given.iter()).collect());
        Ok(())
    }
}

/// The arguments of `create` or `run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CreateRequest {
    /// `create` or `run`.
    pub(crate) verb: &'static str,
    /// `--bundle`, the working directory by default.
    pub(crate) bundle: PathBuf,
    /// The container's id, safe as a file name.
    pub(crate) id: String,
    /// The options for crun except `--bundle` and `--config`.
    pub(crate) options: Vec<OsString>,
}

/// The arguments of `exec`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExecRequest {
    /// The container's id.
    pub(crate) id: String,
    /// `--process`: the file that describes the process, as engines give it.
    pub(crate) process: Option<PathBuf>,
    /// The options for crun except `--process`.
    pub(crate) options: Vec<OsString>,
    /// The command and its arguments; used without `--process`.
    pub(crate) command: Vec<OsString>,
}

impl ExecRequest {
    /// The arguments for crun, with `process` as the file that describes the process.
    pub(crate) fn for_crun(self, process: Option<OsString>) -> Vec<OsString> {
        let process = process.map(|path| joined("--process", &path));
        // crun reads options up to the id, which does not begin like one.
        std::iter::once("exec".into())
            .chain(self.options)
            .chain(process)
            .chain([self.id.into()])
            .chain(self.command)
            .collect()
    }
}

/// The command that was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// `create` or `run`: see [`crate::create`].
    Create(CreateRequest),
    /// `exec`.
    Exec(ExecRequest),
    /// Any other command of a runtime, passed to crun as it is.
    PassThrough(Vec<OsString>),
    /// `--version`.
    Version,
    /// `--help` or `help`.
    Help,
}

/// Commands that need no check, because they act on containers that were checked when they were created.
const PASSED_THROUGH: &[&str] =
    &["delete", "features", "kill", "list", "pause", "ps", "resume", "spec", "start", "state", "update"];

const CREATE_VALUES: &[&str] = &["--bundle", "--console-socket", "--pid-file", "--preserve-fds"];
const CREATE_FLAGS: &[&str] = &["--detach", "--keep", "--no-new-keyring", "--no-pivot", "--no-subreaper"];
const EXEC_VALUES: &[&str] =
    &["--cap", "--console-socket", "--cwd", "--env", "--pid-file", "--preserve-fds", "--process", "--user"];
const EXEC_FLAGS: &[&str] = &["--detach", "--no-new-privs", "--tty"];

/// The short options of `exec` and their long forms.
const EXEC_SHORT: &[(&str, &str)] =
    &[("-c", "--cap"), ("-d", "--detach"), ("-e", "--env"), ("-p", "--process"), ("-t", "--tty"), ("-u", "--user")];

/// Parses the options before the command; the arguments after it are for [`command`].
///
/// The options come back even when one of them is refused, so that the refusal reaches the log.
pub(crate) fn globals(args: &mut std::vec::IntoIter<OsString>) -> (GlobalOptions, Result<OsString, CliError>) {
    let mut globals = GlobalOptions::default();
    let first = loop {
        let Some(arg) = args.next() else { break Err(CliError::NoCommand) };
        if !arg.as_bytes().starts_with(b"-") || matches!(arg.as_bytes(), b"--version" | b"-v" | b"--help" | b"-h") {
            break Ok(arg);
        }
        if let Err(error) = global(&mut globals, &arg, args) {
            break Err(error);
        }
    };
    (globals, first)
}

fn global(globals: &mut GlobalOptions, arg: &OsStr, args: &mut dyn Iterator<Item = OsString>) -> Result<(), CliError> {
    let (name, value) = split(arg);
    let keep = match name.as_str() {
        "--debug" | "--systemd-cgroup" => {
            // Go's flag package accepts `--debug=false`, crun the bare form only.
            if value.as_deref().is_none_or(|v| v != "false") {
                globals.others.push(name.into());
            }
            return Ok(());
        }
        "--root" | "--log" | "--log-format" | "--rootless" | "--criu" => name,
        _ => return Err(CliError::Option(name)),
    };
    let value = value.or_else(|| args.next()).ok_or_else(|| CliError::Value(keep.clone()))?;
    match keep.as_str() {
        "--root" => {
            globals.root = Some(value.into());
            return Ok(());
        }
        "--log" => globals.log.file = Some(value.clone().into()),
        "--log-format" if value == "json" => globals.log.format = Format::Json,
        // Of use for checkpoints only, which are not supported.
        "--criu" => return Ok(()),
        _ => {}
    }
    globals.others.push(joined(&keep, &value));
    Ok(())
}

/// Parses the command and its arguments.
pub(crate) fn command(name: &OsStr, rest: Vec<OsString>) -> Result<Command, CliError> {
    match name.to_str().unwrap_or_default() {
        "--version" | "-v" => Ok(Command::Version),
        "--help" | "-h" | "help" => Ok(Command::Help),
        "create" => create("create", rest).map(Command::Create),
        "run" => create("run", rest).map(Command::Create),
        "exec" => exec(rest).map(Command::Exec),
        verb if PASSED_THROUGH.contains(&verb) => Ok(Command::PassThrough(with_name(verb, rest))),
        // `restore` and the like would bring back a container whose bundle nobody checked.
        _ => Err(CliError::Command(name.to_string_lossy().into_owned())),
    }
}

fn with_name(name: &str, rest: Vec<OsString>) -> Vec<OsString> {
    std::iter::once(name.into()).chain(rest).collect()
}

fn create(verb: &'static str, rest: Vec<OsString>) -> Result<CreateRequest, CliError> {
    let mut bundle = PathBuf::from(".");
    let mut options = Vec::new();
    let mut ids = Vec::new();
    let mut args = rest.into_iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            ids.extend(args.by_ref());
            break;
        }
        if !arg.as_bytes().starts_with(b"-") {
            ids.push(arg);
            continue;
        }
        let (name, value) = split(&arg);
        // One spelling for crun, and for the lists below.
        let name = match name.as_str() {
            "-b" => "--bundle".to_owned(),
            "-d" => "--detach".to_owned(),
            _ => name,
        };
        if CREATE_FLAGS.contains(&name.as_str()) {
            options.push(name.into());
        } else if CREATE_VALUES.contains(&name.as_str()) {
            let value = value.or_else(|| args.next()).ok_or_else(|| CliError::Value(name.clone()))?;
            if name == "--bundle" {
                bundle = value.into();
            } else {
                options.push(joined(&name, &value));
            }
        } else {
            return Err(CliError::Option(name));
        }
    }
    let [id] = <[OsString; 1]>::try_from(ids).map_err(|_| CliError::Id)?;
    Ok(CreateRequest { verb, bundle, id: checked_id(&id)?, options })
}

/// Checks that a container id is safe as a file name.
fn checked_id(id: &OsStr) -> Result<String, CliError> {
    let text = id.to_string_lossy().into_owned();
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    // It names a file in the state directories, and must not be taken for an option on crun's command line.
    let fits = (1..=128).contains(&text.len()) && !text.starts_with(['-', '.']) && text.chars().all(allowed);
    if fits { Ok(text) } else { Err(CliError::InvalidId(text)) }
}

fn exec(rest: Vec<OsString>) -> Result<ExecRequest, CliError> {
    let mut process = None;
    let mut options = Vec::new();
    let mut args = rest.into_iter();
    while let Some(arg) = args.next() {
        if !arg.as_bytes().starts_with(b"-") {
            // All that follows the id is the command's.
            return Ok(ExecRequest { id: checked_id(&arg)?, process, options, command: args.collect() });
        }
        let (name, value) = split(&arg);
        let name = EXEC_SHORT.iter().find(|(short, _)| *short == name).map_or(name, |(_, long)| (*long).to_owned());
        if EXEC_FLAGS.contains(&name.as_str()) {
            options.push(value.map_or_else(|| name.clone().into(), |value| joined(&name, &value)));
        } else if EXEC_VALUES.contains(&name.as_str()) {
            let value = value.or_else(|| args.next()).ok_or_else(|| CliError::Value(name.clone()))?;
            if name == "--process" {
                process = Some(value.into());
            } else {
                options.push(joined(&name, &value));
            }
        } else {
            return Err(CliError::Option(name));
        }
    }
    Err(CliError::Id)
}

/// Splits `--name=value` into its two parts; Go's long form with one dash gets a second one.
fn split(arg: &OsStr) -> (String, Option<OsString>) {
    let bytes = arg.as_bytes();
    let at = bytes.iter().position(|b| *b == b'=').unwrap_or(bytes.len());
    // A name that is not UTF-8 becomes one that no option has.
    let mut name = String::from_utf8_lossy(&bytes[..at]).into_owned();
    if name.len() > 2 && !name.starts_with("--") {
        name.insert(0, '-');
    }
    (name, bytes.get(at + 1..).map(|v| OsString::from_vec(v.to_vec())))
}

fn joined(name: &str, value: &OsStr) -> OsString {
    let mut out = OsString::from(name);
    out.push("=");
    out.push(value);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &[&str]) -> (GlobalOptions, Result<Command, CliError>) {
        let mut args = line.iter().map(OsString::from).collect::<Vec<_>>().into_iter();
        let (globals, first) = globals(&mut args);
        (globals, first.and_then(|name| command(&name, args.collect())))
    }

    #[test]
    fn the_shims_create_is_understood() {
        let (globals, command) = parse(&[
            "--root",
            "/run/r",
            "--log",
            "/b/log.json",
            "--log-format",
            "json",
            "--systemd-cgroup",
            "create",
            "--bundle",
            "/b",
            "--pid-file",
            "/b/init.pid",
            "abc",
        ]);
        assert_eq!(globals.state_root(), Path::new("/run/r"));
        assert_eq!(globals.log.format, Format::Json);
        assert_eq!(globals.for_crun(), ["--root=/run/r", "--log=/b/log.json", "--log-format=json", "--systemd-cgroup"]);
        let expected = CreateRequest {
            verb: "create",
            bundle: "/b".into(),
            id: "abc".into(),
            options: vec!["--pid-file=/b/init.pid".into()],
        };
        assert_eq!(command, Ok(Command::Create(expected)));
    }

    #[test]
    fn state_is_kept_in_the_given_directory_whatever_root_the_engine_names() {
        for (given, expected) in [
            (None, "/state/run/crun"),
            (Some("/run/docker/runtime-runc/moby"), "/state/run/docker/runtime-runc/moby"),
            (Some("/"), "/state"),
            (Some("//run/./x"), "/state/run/x"),
        ] {
            let others = vec!["--debug".into()];
            let mut globals = GlobalOptions { root: given.map(PathBuf::from), others, ..GlobalOptions::default() };
            assert_eq!(globals.keep_state_in(Path::new("/state")), Ok(()));
            assert_eq!(globals.state_root(), Path::new(expected));
            assert_eq!(globals.for_crun(), [OsString::from(format!("--root={expected}")), "--debug".into()]);
        }
        for given in ["run/x", "", "/run/../../x", "/.."] {
            let mut globals = GlobalOptions { root: Some(given.into()), ..GlobalOptions::default() };
            assert!(globals.keep_state_in(Path::new("/state")).is_err(), "{given}");
        }
    }

    #[test]
    fn options_that_would_bypass_the_checks_are_refused() {
        for option in ["--config=/x", "-f", "--conf=/x", "--cgroup-manager=disabled"] {
            assert!(matches!(parse(&["create", option, "id"]).1, Err(CliError::Option(_))), "{option}");
        }
        for verb in ["restore", "checkpoint", "mounts", "init", "events"] {
            assert_eq!(parse(&[verb, "id"]).1, Err(CliError::Command(verb.into())));
        }
    }

    #[test]
    fn ids_that_leave_the_state_directory_are_refused() {
        for id in ["..", ".", "a/b", "", "-x", "a\0", &"x".repeat(129)] {
            assert!(parse(&["create", "--", id]).1.is_err(), "{id:?}");
        }
    }

    #[test]
    fn the_shims_exec_is_understood_and_gets_another_process_file() {
        let (_, command) = parse(&["exec", "--process", "/p", "--console-socket", "/s", "-d", "--pid-file=/x", "cid"]);
        let Ok(Command::Exec(request)) = command else { panic!("{command:?}") };
        assert_eq!(request.process.as_deref(), Some(Path::new("/p")));
        assert_eq!(
            request.for_crun(Some("/proc/self/fd/5".into())),
            ["exec", "--console-socket=/s", "--detach", "--pid-file=/x", "--process=/proc/self/fd/5", "cid"]
        );
    }

    #[test]
    fn options_behind_the_id_of_exec_belong_to_the_command() {
        let (_, command) = parse(&["exec", "-e", "A=b", "cid", "sh", "--process", "/p"]);
        let Ok(Command::Exec(request)) = command else { panic!("{command:?}") };
        assert_eq!(request.process, None);
        assert_eq!(request.for_crun(None), ["exec", "--env=A=b", "cid", "sh", "--process", "/p"]);
    }

    #[test]
    fn exec_takes_no_option_that_is_not_known() {
        // crun would take the first for `--process`, past the look into the file, and the second leads out of the
        // cgroup.
        for line in [["exec", "--proc=/p", "cid"], ["exec", "--cgroup=../..", "cid"], ["exec", "-d", "--x"]] {
            assert!(matches!(parse(&line).1, Err(CliError::Option(_))), "{line:?}");
        }
        assert_eq!(parse(&["exec", "--process"]).1, Err(CliError::Value("--process".into())));
        assert_eq!(parse(&["exec", "-d"]).1, Err(CliError::Id));
    }

    #[test]
    fn everything_else_is_passed_on_unchanged() {
        let (globals, command) = parse(&["--criu=/x", "--debug=false", "kill", "--all", "id", "9"]);
        assert!(globals.for_crun().is_empty());
        assert_eq!(command, Ok(Command::PassThrough(["kill", "--all", "id", "9"].map(OsString::from).to_vec())));
    }

    proptest! {
        #[test]
        fn no_command_line_passes_a_process_file_to_crun(words in proptest::collection::vec("(-|--|=|process|proc|-p|p|d|e|/x|c){0,3}", 0..6)) {
            let mut line = vec!["exec"];
            line.extend(words.iter().map(String::as_str));
            if let (_, Ok(Command::Exec(request))) = parse(&line) {
                for option in &request.options {
                    let (name, _) = split(option);
                    prop_assert!(name != "--process" && (EXEC_VALUES.contains(&name.as_str()) || EXEC_FLAGS.contains(&name.as_str())));
                }
            }
        }

        #[test]
        fn no_command_line_panics_or_passes_an_unknown_option_to_create(words in proptest::collection::vec(".{0,12}", 0..8)) {
            let mut line = vec!["create"];
            line.extend(words.iter().map(String::as_str));
            if let (_, Ok(Command::Create(create))) = parse(&line) {
                for option in &create.options {
                    let (name, _) = split(option);
                    prop_assert!(CREATE_VALUES.contains(&name.as_str()) || CREATE_FLAGS.contains(&name.as_str()));
                }
            }
        }
    }
}
