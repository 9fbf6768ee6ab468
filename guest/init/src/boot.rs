//! The start of the guest, in order.

use std::sync::mpsc;

use bulkhead_protocol::{GuestMessage, HostMessage, ShutdownMode, Stage};

use crate::{
    agent::{self, Answer},
    certificates, cgroup,
    clock::Clock,
    error::{Error, chain},
    event,
    fd_store::FdStore,
    host_sockets::HostSockets,
    log, mounts, network, network_volumes, notify,
    ports::Ports,
    shutdown,
    supervisor::Supervisor,
    time_zone, tuning,
};

/// Starts the guest, runs the supervisor until a shutdown, stops the services, and returns the kind of shutdown.
pub(crate) fn run() -> Result<ShutdownMode, Error> {
    // Logging needs /dev, uptimes and error messages need /proc.
    mounts::early()?;
    // The first line of the guest's user space; `scripts/bench` waits for it.
    log::kernel(&format!("started at {}", log::uptime_us()));
    log::open_console();
    // Before any thread exists: each inherits the mask, so the signals stay for the one thread that waits for them.
    event::block_signals()?;
    // Hello goes out first: the backend's answer travels while the rest is set up.
    let (mut agent, mut inbox) = agent::connect_and_greet()?;
    mounts::rest()?;
    cgroup::set_up()?;
    tuning::apply()?;
    network::loopback_up()?;
    let (configuration, from_host) = match inbox.configuration()? {
        Answer::Configure(configuration, from_host) => (configuration, from_host),
        // A shutdown in place of the configuration: nothing runs yet that would have to be stopped.
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
        // Containers that need no network work without it, so this does not fail the start.
        log::info(&chain(&error));
    }
    if !configuration.shares.is_empty()
        && let Err(error) = mounts::shares()
    {
        // As above. The gate refuses to mount what is in them.
        log::info(&chain(&error));
    }
    // Before the services start: Go reads the bundle once for each process.
    certificates::trust(&from_host.certificates)?;
    if let Some(zone) = &from_host.time_zone
        && let Err(error) = time_zone::set(zone)
    {
        // Containers that ask for the files get an error.
        log::info(&chain(&error));
    }
    if configuration.isolation {
        // The last file in it is written. A dockerd that is led to another one cannot change it.
        mounts::make_read_only("/etc")?;
        network_volumes::send_ids_of_containers();
    }
    agent.reached(Stage::Agent);

    // Every source of events is a thread with a sender of the same channel; the supervisor is its only reader. The
    // sockets are opened before the first service can look for them.
    let (events, received) = mpsc::channel();
    event::watch_signals(events.clone())?;
    // Last of what the start needs: the clock is right for now.
    inbox.watch(events.clone(), Clock::start()?)?;
    let store = FdStore::default();
    notify::watch(events.clone(), store.clone())?;
    let ports = Ports::listen(events.clone())?;
    let host_sockets = HostSockets::listen(&configuration.host_sockets, events.clone())?;
    let mut supervisor = Supervisor::new(agent, *configuration, (ports, host_sockets), store, events, received);
    let request = supervisor.run()?;
    let (agent, received, running) = supervisor.into_parts();
    shutdown::stop_services(agent, &received, &running, request.grace);
    Ok(request.mode)
}
