//! `bulkhead dashboard`: the desktop's page, served to the user's browser.
//!
//! | Subject                                        | File          |
//! |------------------------------------------------|---------------|
//! | the right to ask: token, session, host, origin | `access.rs`   |
//! | connections, limits, the page's own files      | `server.rs`   |
//! | the requests that are passed on, and to whom   | `upstream.rs` |
//! | the page                                       | `page/`       |
//!
//! The page uses the control API and nothing else, apart from two read-only routes of the Docker API for the list of
//! containers. This server adds no power to it: it passes on the requests of one browser, by an allow list.

mod access;
mod server;
mod upstream;

use std::{net::Ipv4Addr, process::Stdio, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    process::Command,
    signal::unix::{SignalKind, signal},
};

use self::{access::Access, server::Site};
use super::{CliError, print};
use crate::settings::Paths;

/// Show the engine, its containers and its settings in a browser.
///
/// Serves a page on a port of 127.0.0.1 and opens it in the browser, if there is one. The printed address works once and
/// for this user only; it gives that browser a session, which ends with this command. Ends with Ctrl-C, or when no page
/// has been open for some time.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead dashboard
  bulkhead --profile ci dashboard --no-browser")]
pub(super) struct Arguments {
    /// Print the address and open no browser.
    #[arg(long)]
    no_browser: bool,
    /// Port of 127.0.0.1 to listen on [default: a free one].
    #[arg(long, default_value_t = 0, value_name = "PORT", hide_default_value = true)]
    port: u16,
    /// End after this many seconds without a page.
    #[arg(long, default_value_t = 900, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    idle_timeout: u64,
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    // Only the loopback address: no other machine reaches the page.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, arguments.port))
        .await
        .map_err(CliError::io("cannot listen on the port of 127.0.0.1"))?;
    let port = listener.local_addr().map_err(CliError::io("cannot find the port"))?.port();
    let access = Access::new(port).map_err(CliError::io("cannot make a token"))?;
    let address = access.address();
    let site = Arc::new(Site { access, paths: paths.clone() });
    // Registered before the address is printed: from then on a signal ends the command in order.
    let cannot = || CliError::io("cannot wait for signals");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot())?;
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot())?;
    print(&address)?;
    if !arguments.no_browser && has_display() {
        open(&address);
    }
    eprintln!("the address works once; Ctrl-C ends the dashboard");
    tokio::select! {
        () = server::serve(listener, site, Duration::from_secs(arguments.idle_timeout)) => {
            eprintln!("no page has been open for {} s", arguments.idle_timeout);
        }
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

/// Returns whether a browser could show anything.
fn has_display() -> bool {
    ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// Opens the address in the user's browser. A desktop without xdg-open has the printed address.
fn open(address: &str) {
    let browser =
        Command::new("xdg-open").arg(address).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    if let Ok(mut browser) = browser {
        tokio::spawn(async move { browser.wait().await });
    }
}
