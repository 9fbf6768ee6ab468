//! The order of the start.

use std::sync::mpsc;

use bulkhead_protocol::{GuestMessage, HostMessage, ShutdownMode, Stage};

use crate::{
    agent::{self, Answer},
    certificates, cgroup,
    error::{Error, chain},
    event,
    fd_store::FdStore,
    log, mounts, network, notify,
    ports::Ports,
    shutdown,
    supervisor::Supervisor,
    tuning,
};

/// Starts the guest, serves until it shall end, stops the services, and returns how it shall end.
pub(crate) fn run() -> Result<ShutdownMode, Error> {
    mounts::early()?;
    log::kernel(&format!("started at {}", log::uptime_us()));
    log::open_console();
    event::block_signals()?;
    // Hello goes out first: the host's answer travels while the rest is set up.
    let (mut agent, mut inbox) = agent::connect_and_greet()?;
    mounts::rest()?;
    cgroup::set_up()?;
    tuning::apply()?;
    network::loopback_up()?;
    let (configuration, certificates) = match inbox.configuration()? {
        Answer::Configure(configuration, certificates) => (configuration, certificates),
        Answer::Other(HostMessage::Shutdown { mode, grace_ms: _ }) => {
            agent.send(&GuestMessage::Goodbye);
            return Ok(mode);
        }
        Answer::Other(_) => return Err(Error::BackendClosed),
    };
    network::set_host_name(&configuration.hostname)?;
    if let Some(network) = &configuration.network
        && let Err(error) = network::configure(network)
    {
        // The engine is worth having without it.
        log::info(&chain(&error));
    }
    certificates::trust(&certificates)?;
    agent.reached(Stage::Agent);

    let (events, received) = mpsc::channel();
    event::watch_signals(events.clone())?;
    inbox.watch(events.clone())?;
    let store = FdStore::default();
    notify::watch(events.clone(), store.clone())?;
    let ports = Ports::listen(events.clone())?;
    let mut supervisor = Supervisor::new(agent, *configuration, ports, store, events, received);
    let request = supervisor.run()?;
    let (agent, received, running) = supervisor.into_parts();
    shutdown::stop_services(agent, &received, &running, request.grace);
    Ok(request.mode)
}
