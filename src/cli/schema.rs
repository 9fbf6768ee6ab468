//! `bulkhead schema`: the outputs for programs, by their types.

use std::process::ExitCode;

use clap::ValueEnum;
use schemars::{JsonSchema, generate::SchemaSettings};

use super::{CliError, delete, doctor, list, policy, print, settings, share, support, version};
use crate::backend::api::{Ports, Status};

/// Print the JSON Schema of the output of a verb with `--format json`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Example:
  bulkhead schema status | jq '.properties | keys'")]
pub(super) struct Arguments {
    /// Verb whose output is described.
    #[arg(value_enum, value_name = "VERB")]
    output: Output,
}

/// A verb with JSON output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Delete,
    Doctor,
    List,
    PolicyShow,
    PolicyValidate,
    Ports,
    SettingsGet,
    SettingsList,
    ShareList,
    Status,
    Support,
    Version,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode, CliError> {
    print(schema(arguments.output).trim_end())?;
    Ok(ExitCode::SUCCESS)
}

/// The schema (draft 2020-12) in the form of the files in `docs/json`, with a newline at its end.
fn schema(output: Output) -> String {
    match output {
        Output::Delete => of::<delete::Deleted>(),
        Output::Doctor => of::<Vec<doctor::Outcome>>(),
        Output::List => of::<list::Profiles>(),
        Output::PolicyShow => of::<policy::Shown>(),
        Output::PolicyValidate => of::<policy::Validated>(),
        Output::Ports => of::<Ports>(),
        Output::SettingsGet => of::<settings::SettingValue>(),
        Output::SettingsList => of::<settings::Values>(),
        Output::ShareList => of::<Vec<share::Entry>>(),
        Output::Status => of::<Status>(),
        Output::Support => of::<support::Bundle>(),
        Output::Version => of::<version::Versions>(),
    }
}

fn of<T: JsonSchema>() -> String {
    // As it is written: a key that is always there is required, also where a reader could do without it.
    let generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
    format!("{:#}\n", generator.into_root_schema_for::<T>().to_value())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn name(output: Output) -> String {
        output.to_possible_value().unwrap().get_name().to_owned()
    }

    #[test]
    fn the_schemas_in_docs_are_current() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/json");
        for output in Output::value_variants() {
            let name = name(*output);
            assert!(
                fs::read_to_string(directory.join(format!("{name}.schema.json"))).unwrap_or_default()
                    == schema(*output),
                "write it again: bulkhead schema {name} > docs/json/{name}.schema.json"
            );
        }
        assert_eq!(fs::read_dir(directory).unwrap().count(), Output::value_variants().len());
    }

    #[test]
    fn a_key_that_is_always_written_is_required_and_others_are_not() {
        let status: serde_json::Value = serde_json::from_str(&schema(Output::Status)).unwrap();
        let required: Vec<_> = status["required"].as_array().unwrap().iter().filter_map(|key| key.as_str()).collect();
        for key in ["profile", "state", "boot", "stages", "dockerHost"] {
            assert!(required.contains(&key), "{key}: {required:?}");
        }
        for key in ["reason", "vm", "context"] {
            assert!(!required.contains(&key) && status["properties"][key].is_object(), "{key}: {required:?}");
        }
    }
}
