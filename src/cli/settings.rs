//! `bulkhead settings`.

use std::process::ExitCode;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{CliError, Format, print, print_json, runtime, table, unisolated};
use crate::settings::{Base, DEFINITIONS, Definition, Kind, Origin, Policy, ProfileName, Settings};

/// Show and change settings.
///
/// A change takes effect at the next `bulkhead start` or `bulkhead restart`. Settings that the administrator's policy
/// locks cannot be changed.
#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// List all settings with their values and meanings.
    ///
    /// Passwords are not shown.
    List {
        /// Output format.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Print the value of a setting.
    ///
    /// A proxy is printed with its password, which `bulkhead settings list` does not show.
    Get {
        /// Name of the setting.
        key: String,
        /// Output format.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Set a setting.
    #[command(after_help = "\
Examples:
  bulkhead settings set enhancedContainerIsolation false
  bulkhead settings set overrideProxyExclude .example.org,10.0.0.0/8")]
    Set {
        /// Name of the setting.
        key: String,
        /// New value.
        value: String,
    },
    /// Reset a setting to its default.
    Unset {
        /// Name of the setting.
        key: String,
    },
}

/// Runs the verb under `policy`, this machine's.
pub(super) fn run(base: &Base, name: &ProfileName, policy: Policy, verb: Verb) -> Result<ExitCode, CliError> {
    let load = || Ok::<_, CliError>(Settings::load(&base.known_profile(name)?.settings())?.under(policy.clone()));
    match verb {
        Verb::List { format } => {
            let settings = load()?;
            match format {
                Format::Json => print_json(&Values::of(&settings))?,
                Format::Pretty => print(&pretty(&settings))?,
            }
        }
        Verb::Get { key, format } => {
            let value = load()?.get(Definition::find(&key)?);
            match format {
                Format::Json => print_json(&SettingValue { key, value })?,
                Format::Pretty => print(&show(&value))?,
            }
        }
        Verb::Set { key, value } => {
            let definition = Definition::find(&key)?;
            let paths = base.profile(name)?;
            // The profile need not exist yet, so a failed load means only that nothing was on.
            let was_on = load().is_ok_and(|settings| settings.isolation());
            Settings::update(&paths, &policy, definition, Some(definition.parse(&value)?))?;
            // Now is the moment to name containers that were created without isolation: the user may prefer to create
            // them again.
            let turned_on = !was_on && load()?.isolation();
            if turned_on && let Some(line) = runtime()?.block_on(unisolated::note_for_setting(&paths)) {
                eprintln!("note: {line}");
            }
        }
        Verb::Unset { key } => {
            // Unlike `set`, this cannot create a profile, so a mistyped name is an error.
            Settings::update(&base.known_profile(name)?, &policy, Definition::find(&key)?, None)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The column SET: the origin of the value in effect.
fn origin(settings: &Settings, definition: &Definition) -> &'static str {
    match settings.origin(definition) {
        Origin::Locked => "locked",
        Origin::User => "yes",
        Origin::Policy => "policy",
        Origin::Default => "no",
    }
}

/// A value as `get` prints it, in the form that `set` accepts.
pub(super) fn show(value: &Value) -> String {
    match value {
        // A default that follows the host.
        Value::Null => "auto".into(),
        Value::String(word) => word.clone(),
        // Commas are between words only.
        Value::Array(items) if items.iter().any(Value::is_object) => value.to_string(),
        Value::Array(words) => words.iter().map(show).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Output of `bulkhead settings list --format json`: an object like the settings file, with the value in effect of each
/// setting, so that programs need to know neither defaults nor policy. `null` follows the host. Passwords are replaced.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Values(Map<String, Value>);

impl Values {
    fn of(settings: &Settings) -> Self {
        let value = |definition: &Definition| definition.concealed(&settings.get(definition));
        Self(DEFINITIONS.iter().map(|definition| (definition.key.to_owned(), value(definition))).collect())
    }
}

/// Output of `bulkhead settings get --format json`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct SettingValue {
    /// Name of the setting.
    key: String,
    /// The value in effect; `null` follows the host.
    value: Value,
}

fn pretty(settings: &Settings) -> String {
    let header = ["SETTING", "VALUE", "SET", "MEANING"].map(ToOwned::to_owned).to_vec();
    let rows = DEFINITIONS.iter().map(|definition| {
        let range = match definition.kind {
            Kind::Choice { values } => format!(" [{}]", values.join(", ")),
            Kind::Integer { min, max, .. } => format!(" [{min} to {max}]"),
            // The meaning says it in words.
            Kind::Bool { .. } | Kind::Text { .. } | Kind::List { .. } | Kind::Json { .. } => String::new(),
        };
        vec![
            definition.key.to_owned(),
            show(&definition.concealed(&settings.get(definition))),
            origin(settings, definition).into(),
            format!("{}{range}", definition.description),
        ]
    });
    let text = table(&std::iter::once(header).chain(rows).collect::<Vec<_>>());
    let Some(facts) = settings.policy().facts() else { return text };
    let warning = facts.warning().map(|warning| format!("\n{warning}")).unwrap_or_default();
    format!("{text}\n\nlocked, policy: set by {}{warning}", facts.file.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::PolicySource;

    fn under(text: &str) -> (tempfile::TempDir, Settings) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("admin-settings.json");
        std::fs::write(&file, text).unwrap();
        let owner = nix::unistd::geteuid().as_raw();
        (folder, Settings::default().under(Policy::read(&PolicySource::new(vec![file], owner))))
    }

    #[test]
    fn the_list_says_what_is_locked_and_by_which_file() {
        let (_folder, settings) = under(
            r#"{"enhancedContainerIsolation": {"locked": true, "value": true},
                "linuxVM": {"vpnkitCIDR": {"locked": false, "value": "10.1.0.0/24"}}}"#,
        );
        let text = pretty(&settings);
        let words = |key: &str| {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().take(3).map(ToOwned::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(words("enhancedContainerIsolation"), ["enhancedContainerIsolation", "true", "locked"]);
        assert_eq!(words("vpnkitCIDR"), ["vpnkitCIDR", "10.1.0.0/24", "policy"]);
        assert_eq!(words("hostLoopback"), ["hostLoopback", "true", "no"]);
        assert!(text.lines().last().unwrap().ends_with("admin-settings.json"), "{text}");
    }

    #[test]
    fn the_list_says_that_a_policy_cannot_be_used() {
        let (_folder, settings) = under("{");
        let text = pretty(&settings);
        assert!(text.contains("cannot be used") && text.contains("line 1 column 1"), "{text}");
    }
}
