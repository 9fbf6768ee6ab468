//! `bulkhead version`.

use std::process::ExitCode;

use bulkhead_protocol::PROTOCOL_VERSION;
use schemars::JsonSchema;
use serde::Serialize;

use super::{CliError, Format, print, print_json, table};
use crate::{
    image::Image,
    settings::{Base, Policy},
};

/// Show the versions of the program, the host-guest protocol and the guest image.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Output of `bulkhead version --format json`.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Versions {
    /// The program's version.
    version: &'static str,
    /// Version of the protocol between host and guest.
    protocol: u32,
    /// Version of the guest image that `start` would use; `null` without an image or for one without a manifest.
    image_version: Option<String>,
    #[serde(skip)]
    has_image: bool,
}

pub(super) fn read(base: &Base) -> Versions {
    // The image that `start` would use; a missing one is not an error here.
    let image = Image::find(base, None, None, Policy::system().isolation_lock()).ok();
    Versions {
        version: env!("CARGO_PKG_VERSION"),
        protocol: PROTOCOL_VERSION,
        image_version: image.as_ref().and_then(Image::version).map(ToOwned::to_owned),
        has_image: image.is_some(),
    }
}

pub(super) fn run(base: &Base, arguments: Arguments) -> Result<ExitCode, CliError> {
    let versions = read(base);
    match arguments.format {
        Format::Json => print_json(&versions)?,
        Format::Pretty => {
            let image = match (versions.has_image, versions.image_version) {
                (_, Some(version)) => version,
                // One without a manifest, such as a named kernel and root file system.
                (true, None) => "without a version".into(),
                (false, None) => "none".into(),
            };
            let row = |name: &str, value: String| vec![name.to_owned(), value];
            print(&table(&[
                row("bulkhead", versions.version.into()),
                row("protocol", versions.protocol.to_string()),
                row("image", image),
            ]))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
