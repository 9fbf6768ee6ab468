//! `bulkhead policy`.

use std::{path::PathBuf, process::ExitCode};

use schemars::JsonSchema;
use serde::Serialize;

use super::{CliError, Format, client::Client, colour, print, print_json, settings::show, start, table};
use crate::{
    backend::{image_names, plan::check_program},
    image::Image,
    settings::{
        Paths, Policy, PolicyFacts, Settings,
        policy::{Line, schema, validate},
    },
};
use bulkhead_ipc::report::chain;

/// Show the administrator's policy, or validate a policy file.
///
/// The policy is /etc/bulkhead/admin-settings.json, or else /usr/share/docker-desktop/admin-settings.json. The file and
/// its directory must be owned by root and not writable by other users. The policy is read when a backend starts, so a
/// change takes effect after `bulkhead stop` and `bulkhead start`. If the file cannot be used, Enhanced Container
/// Isolation is on and locked. While it is locked, `start` needs a program and a guest image that only root can change.
#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Show each key of the policy, whether it is in force, and what its enforcement depends on.
    ///
    /// A policy that locks Enhanced Container Isolation depends on the program, the guest image and, if it lists images
    /// by name, the path to registries. Any of these that the user can change is listed with the reason.
    Show {
        /// Output format.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Validate a policy file; exits 1 if it is invalid.
    ///
    /// The file may be anywhere and belong to any user. Unknown keys are valid and cause a warning.
    Validate {
        /// File to validate.
        file: PathBuf,
        /// Output format.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Print the JSON Schema of policy files.
    Schema,
}

pub(super) fn run(paths: &Paths, verb: Verb) -> Result<ExitCode, CliError> {
    match verb {
        Verb::Show { format } => {
            let policy = Policy::system();
            let footing = footing(paths, &policy)?;
            match format {
                Format::Json => print_json(&Shown {
                    policy: policy.facts().cloned(),
                    keys: policy.lines(),
                    unknown: policy.unknown().to_vec(),
                    footing,
                })?,
                Format::Pretty => {
                    print(&pretty(&policy))?;
                    for Support { subject, problem } in &footing {
                        print(&format!("{subject}: {}", problem.as_deref().unwrap_or("OK")))?;
                    }
                }
            }
            return super::wait(warn_of_change(paths));
        }
        Verb::Validate { file, format } => return check(file, format),
        Verb::Schema => print(schema().trim_end())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Output of `bulkhead policy show --format json`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Shown {
    /// The file; `null` without a policy.
    policy: Option<PolicyFacts>,
    /// A line for each key of the file.
    keys: Vec<Line>,
    /// Paths of keys that are ignored.
    unknown: Vec<String>,
    /// The things that enforcement depends on.
    footing: Vec<Support>,
}

/// Checks a file.
fn check(file: PathBuf, format: Format) -> Result<ExitCode, CliError> {
    let result = validate(&file);
    if format == Format::Json {
        let (unknown, problem) = result.map_or_else(|problem| (Vec::new(), Some(problem)), |unknown| (unknown, None));
        let valid = problem.is_none();
        print_json(&Validated { file, valid, unknown, problem })?;
        return Ok(if valid { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let invalid = |problem| CliError::Failed(format!("{}: invalid policy: {problem}", file.display()));
    // Keys of another version, or of Docker Desktop's, are valid. The administrator should know that they do nothing.
    for key in result.map_err(invalid)? {
        colour::warn(format_args!("unknown key {key} is ignored"));
    }
    print(&format!("{}: OK", file.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Output of `bulkhead policy validate --format json`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Validated {
    /// The file.
    file: PathBuf,
    /// The file is a policy, so that the exit status is 0.
    valid: bool,
    /// Paths of keys that are ignored.
    unknown: Vec<String>,
    /// The reason why the file is not a policy; `null` if it is.
    problem: Option<String>,
}

/// A thing that a policy depends on, and the reason why it cannot.
#[derive(Debug, Serialize, JsonSchema)]
struct Support {
    /// The thing.
    subject: &'static str,
    /// The reason why the policy cannot depend on it; `null` if it can.
    problem: Option<String>,
}

/// Returns the state of what a policy that locks isolation depends on, for this user and in this environment.
fn footing(paths: &Paths, policy: &Policy) -> Result<Vec<Support>, CliError> {
    if policy.isolation_lock().is_none() {
        return Ok(Vec::new());
    }
    let refused = |error: String| format!("`start` is refused: {error}");
    let program = check_program(policy).err().map(|error| refused(error.to_string()));
    let options = start::Machine::default().options()?;
    let image =
        Image::find(paths.base(), options.kernel.as_deref(), options.rootfs.as_deref(), policy.isolation_lock());
    let image = image.err().map(|error| refused(chain(&error)));
    let mut footing =
        vec![Support { subject: "program", problem: program }, Support { subject: "guest image", problem: image }];
    let settings = Settings::load(&paths.settings())?.under(policy.clone());
    if let Some(state) = image_names::state(&settings, &options) {
        footing
            .push(Support { subject: "image names", problem: state.err().map(|doubt| image_names::warning(&doubt)) });
    }
    Ok(footing)
}

/// Warns of a running backend that has another policy.
async fn warn_of_change(paths: &Paths) -> Result<(), CliError> {
    if let Some(client) = Client::connect(paths).await?
        && let Some(changed) = start::policy_change(paths, client.status().await?.policy.as_ref())
    {
        colour::warn(changed);
    }
    Ok(())
}

/// The last column of the table.
fn state(line: &Line) -> String {
    match (line.missing, line.overruled) {
        (Some(missing), _) => format!("not enforced yet: {missing}"),
        (None, Some(by)) => format!("without effect: {by}"),
        (None, None) => "in force".to_owned(),
    }
}

fn pretty(policy: &Policy) -> String {
    let Some(facts) = policy.facts() else { return "no policy; the user can change all settings".to_owned() };
    // For a file that cannot be used the table shows the strictest policy, which stands for it.
    let mut text = match facts.warning() {
        Some(warning) => format!("{warning}\n\n"),
        None => format!("policy {}\n\n", facts.file.display()),
    };
    let header = ["KEY", "VALUE", "LOCKED", "STATE"].map(ToOwned::to_owned).to_vec();
    let rows = policy.lines().into_iter().map(|line| {
        let locked = line.locked.map_or("-", |locked| if locked { "yes" } else { "no" });
        // Exceptions and directories are objects; `show` is for the kinds of values that settings have.
        let value =
            if line.value.is_object() || line.value.is_array() { line.value.to_string() } else { show(&line.value) };
        vec![line.key.clone(), value, locked.to_owned(), state(&line)]
    });
    text.push_str(&table(&std::iter::once(header).chain(rows).collect::<Vec<_>>()));
    for key in policy.unknown() {
        text.push_str("\nunknown and ignored: ");
        text.push_str(key);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::PolicySource;

    fn policy(text: &str) -> Policy {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("admin-settings.json");
        std::fs::write(&file, text).unwrap();
        Policy::read(&PolicySource::new(vec![file], nix::unistd::geteuid().as_raw()))
    }

    #[test]
    fn a_key_without_an_effect_is_shown_as_such() {
        let text = pretty(&policy(
            r#"{"enhancedContainerIsolation": {"locked": true, "value": true,
                 "dockerSocketMount": {"imageList": {"images": ["docker:cli"]}}},
                "containersProxy": {"locked": true, "mode": "manual", "http": "http://me:s3cret@proxy:1",
                                    "embeddedPac": "s3cret", "transparentPorts": "80,443"},
                "proxy": {"locked": true, "mode": "manual", "http": "http://me:s3cret@proxy:1", "pac": "http://x"},
                "filesharingAllowedDirectories": [{"path": "$HOME"}],
                "blockDockerLoad": {"locked": true, "value": true},
                "exposeDockerAPIOnTCP2375": {"locked": true, "value": false},
                "portBindingBehavior": {"locked": true, "value": "local-only-port-binding"},
                "linuxVM": {"vpnkitCIDR": {"locked": true, "value": "10.1.0.0/24"},
                            "dockerDaemonOptions": {"locked": true, "value": "{\"debug\": true}"}},
                "analyticsEnabled": {"locked": true, "value": false}}"#,
        ));
        assert!(!text.contains("s3cret"), "{text}");
        for (key, expected) in [
            ("enhancedContainerIsolation ", "in force"),
            ("enhancedContainerIsolation.dockerSocketMount", "in force"),
            ("linuxVM.dockerDaemonOptions", "in force"),
            ("linuxVM.vpnkitCIDR", "in force"),
            ("proxy.mode", "without effect: containersProxy takes precedence"),
            ("proxy.http ", "without effect: containersProxy takes precedence"),
            ("proxy.pac", "not enforced yet: "),
            ("containersProxy.mode", "in force"),
            ("containersProxy.http ", "in force"),
            ("containersProxy.https", "in force"),
            ("containersProxy.exclude", "in force"),
            ("containersProxy.embeddedPac", "not enforced yet: proxy auto-configuration"),
            ("containersProxy.transparentPorts", "not enforced yet: traffic is not redirected"),
            ("filesharingAllowedDirectories", "in force"),
            ("blockDockerLoad", "in force"),
            ("exposeDockerAPIOnTCP2375", "not enforced yet: "),
            ("portBindingBehavior", "in force"),
        ] {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("{key}: {text}"));
            assert!(line.contains(expected), "{line}");
        }
        assert!(text.ends_with("\nunknown and ignored: analyticsEnabled"), "{text}");
    }

    #[test]
    fn the_proxy_without_an_effect_is_shown_as_such() {
        let state = |text: &str, key: &str| {
            let lines = policy(text).lines();
            state(lines.iter().find(|line| line.key == key).unwrap_or_else(|| panic!("{key}: {lines:?}")))
        };
        let manual = r#""proxy": {"locked": true, "mode": "manual", "http": "http://proxy:1"}"#;
        let system = format!(r#"{{{manual}, "containersProxy": {{"locked": true, "http": "http://proxy:2"}}}}"#);
        for (text, key, expected) in [
            (format!("{{{manual}}}"), "proxy.http", "in force"),
            (system.clone(), "proxy.http", "in force"),
            (system.clone(), "containersProxy.mode", "in force"),
            (system, "containersProxy.http", "without effect: the mode is system"),
        ] {
            assert_eq!(state(&text, key), expected, "{text} {key}");
        }
    }

    #[test]
    fn an_unusable_file_is_shown_with_its_problem_and_isolation_locked() {
        let text = pretty(&policy("[]"));
        assert!(text.contains("cannot be used: the file: must be an object;"), "{text}");
        let line = text.lines().last().unwrap().split_whitespace().collect::<Vec<_>>();
        assert_eq!(line, ["enhancedContainerIsolation", "true", "yes", "in", "force"]);
    }
}
