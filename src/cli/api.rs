//! `bulkhead api`.

use std::process::ExitCode;

use super::{CliError, print};
use crate::backend::api_document::document;

/// Print the OpenAPI document of the control API.
///
/// The API is HTTP on the socket control.sock in the profile's runtime directory; a backend also serves the document
/// itself, at /openapi.json.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead api | jq '.paths | keys'
  curl --unix-socket \"$XDG_RUNTIME_DIR/bulkhead/default/control.sock\" http://bulkhead/v1/status")]
pub(super) struct Arguments {}

pub(super) fn run(_arguments: Arguments) -> Result<ExitCode, CliError> {
    print(document().trim_end())?;
    Ok(ExitCode::SUCCESS)
}
