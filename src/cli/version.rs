//! `bulkhead version`.

use std::process::ExitCode;

use bulkhead_protocol::PROTOCOL_VERSION;
use serde_json::json;

use super::{CliError, Format, print, table};
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

pub(super) fn run(base: &Base, arguments: Arguments) -> Result<ExitCode, CliError> {
    let version = env!("CARGO_PKG_VERSION");
    // The image that `start` would use; a missing one is not an error here.
    let image = Image::find(base, None, None, Policy::system().isolation_lock()).ok();
    let image_version = image.as_ref().and_then(Image::version);
    match arguments.format {
        Format::Json => print(&format!(
            "{:#}",
            json!({ "version": version, "protocol": PROTOCOL_VERSION, "imageVersion": image_version })
        ))?,
        Format::Pretty => {
            let image = match (&image, image_version) {
                (_, Some(version)) => version.to_owned(),
                // One without a manifest, such as a named kernel and root file system.
                (Some(_), None) => "without a version".into(),
                (None, _) => "none".into(),
            };
            let row = |name: &str, value: String| vec![name.to_owned(), value];
            print(&table(&[
                row("bulkhead", version.into()),
                row("protocol", PROTOCOL_VERSION.to_string()),
                row("image", image),
            ]))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
