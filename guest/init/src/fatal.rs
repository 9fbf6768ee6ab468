//! The last resort: reports the reason and powers off, so that a broken guest never lingers.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    sync::{Mutex, OnceLock},
};

use bulkhead_protocol::{Failure, GuestMessage, Stage, encode};
use nix::sys::{
    reboot::{RebootMode, reboot},
    socket::{Shutdown, setsockopt, shutdown, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike},
};

use crate::log;

/// A copy of the agent connection.
static AGENT: OnceLock<Mutex<File>> = OnceLock::new();

/// Keeps a copy of the agent connection for [`give_up`].
pub(crate) fn set_agent_connection(agent: File) {
    let _ = AGENT.set(Mutex::new(agent));
}

/// Reports `reason` on console, kernel log and agent connection, and powers off.
pub(crate) fn give_up(reason: &str) -> ! {
    log::kernel(&format!("fatal: {reason}; powering off"));
    let failure = GuestMessage::Failed(Failure { stage: Stage::Agent, reason: reason.to_owned() });
    // Stage `agent` stands for everything before the services. Without a connection only the kernel log has the reason.
    // `try_lock`, because the thread that panicked may hold the lock: a deadlock here would leave the guest hanging.
    if let (Some(Ok(mut agent)), Ok(line)) = (AGENT.get().map(Mutex::try_lock), encode(&failure)) {
        let _ = agent.write_all(&line);
        wait_until_read(&mut agent);
    }
    power_off()
}

/// Waits until the backend has read everything. The kernel sends from a queue, which a power-off would cut off; the
/// backend closes the connection once it has read our end of it.
fn wait_until_read(agent: &mut File) {
    let _ = setsockopt(&*agent, ReceiveTimeout, &TimeVal::seconds(2));
    let _ = shutdown(agent.as_raw_fd(), Shutdown::Write);
    // Reads until the backend's end of the stream, or until the timeout. What it sends meanwhile is of no use any more.
    let mut rest = [0; 512];
    while matches!(agent.read(&mut rest), Ok(1..)) {}
}

/// Syncs and powers off without stopping anything.
pub(crate) fn power_off() -> ! {
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
    // Not reached with CAP_SYS_BOOT. The end of PID 1 makes the kernel panic, and `panic=-1` resets the VM at once.
    std::process::exit(1)
}

/// Makes a panic in any thread end the guest with a message.
pub(crate) fn install_panic_hook() {
    // A helper thread that dies silently would leave an event source without events, and the guest waiting for them.
    std::panic::set_hook(Box::new(|info| give_up(&format!("internal error: {info}"))));
}
