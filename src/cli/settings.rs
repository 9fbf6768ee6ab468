//! `bulkhead settings`.

use std::process::ExitCode;

use serde_json::{Map, Value, json};

use super::{CliError, Format, print, table};
use crate::settings::{Base, DEFINITIONS, Definition, Kind, ProfileName, Settings};

/// Show and change settings; a change takes effect at the next `start` or `restart`.
#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Show all settings.
    List {
        /// Text for people or JSON for programs.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Print one value, a proxy's with its password, which `list` does not show.
    Get {
        /// Name of the setting.
        key: String,
    },
    /// Set one value: `bulkhead settings set enhancedContainerIsolation false`.
    Set {
        /// Name of the setting.
        key: String,
        /// Its value.
        value: String,
    },
    /// Go back to the default.
    Unset {
        /// Name of the setting.
        key: String,
    },
}

pub(super) fn run(base: &Base, name: &ProfileName, verb: Verb) -> Result<ExitCode, CliError> {
    match verb {
        Verb::List { format } => {
            let settings = Settings::load(&base.known_profile(name)?.settings())?;
            print(&list(&settings, format))?;
        }
        Verb::Get { key } => {
            let definition = Definition::find(&key)?;
            let settings = Settings::load(&base.known_profile(name)?.settings())?;
            print(&show(&settings.get(definition)))?;
        }
        Verb::Set { key, value } => {
            let definition = Definition::find(&key)?;
            Settings::update(&base.profile(name)?, definition, Some(definition.parse(&value)?))?;
        }
        Verb::Unset { key } => Settings::update(&base.known_profile(name)?, Definition::find(&key)?, None)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => "auto".into(),
        Value::String(word) => word.clone(),
        Value::Array(words) => words.iter().map(show).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn list(settings: &Settings, format: Format) -> String {
    match format {
        Format::Json => {
            let value = |definition: &Definition| definition.concealed(&settings.get(definition));
            let values = DEFINITIONS.iter().map(|definition| (definition.key.to_owned(), value(definition)));
            format!("{:#}", json!(values.collect::<Map<_, _>>()))
        }
        Format::Pretty => {
            let header = ["SETTING", "VALUE", "SET", "MEANING"].map(ToOwned::to_owned).to_vec();
            let rows = DEFINITIONS.iter().map(|definition| {
                let range = match definition.kind {
                    Kind::Choice { values } => format!(" [{}]", values.join(", ")),
                    Kind::Integer { min, max, .. } => format!(" [{min} to {max}]"),
                    Kind::Bool { .. } | Kind::Text { .. } | Kind::List { .. } => String::new(),
                };
                vec![
                    definition.key.to_owned(),
                    show(&definition.concealed(&settings.get(definition))),
                    if settings.is_set(definition) { "yes".into() } else { "no".into() },
                    format!("{}{range}", definition.description),
                ]
            });
            table(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
        }
    }
}
