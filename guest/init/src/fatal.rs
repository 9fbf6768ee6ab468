//! The last resort: say why, then power off, so that a broken guest never lingers.

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

static AGENT: OnceLock<Mutex<File>> = OnceLock::new();

/// Lends the agent connection to [`give_up`].
pub(crate) fn set_agent_connection(agent: File) {
    let _ = AGENT.set(Mutex::new(agent));
}

/// Reports `reason` on console, kernel log and agent connection, and powers off.
pub(crate) fn give_up(reason: &str) -> ! {
    log::kernel(&format!("fatal: {reason}; powering off"));
    let failure = GuestMessage::Failed(Failure { stage: Stage::Agent, reason: reason.to_owned() });
    // `try_lock`: a panic may have come from the holder.
    if let (Some(Ok(mut agent)), Ok(line)) = (AGENT.get().map(Mutex::try_lock), encode(&failure)) {
        let _ = agent.write_all(&line);
        wait_until_read(&mut agent);
    }
    power_off()
}

/// The kernel sends from a queue, which a power off would cut; the host closes once it has read all.
fn wait_until_read(agent: &mut File) {
    let _ = setsockopt(&*agent, ReceiveTimeout, &TimeVal::seconds(2));
    let _ = shutdown(agent.as_raw_fd(), Shutdown::Write);
    let mut rest = [0; 512];
    while matches!(agent.read(&mut rest), Ok(1..)) {}
}

/// Syncs and powers off at once.
pub(crate) fn power_off() -> ! {
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
    // Not reached with CAP_SYS_BOOT; ending PID 1 makes the kernel panic, which ends the VM too.
    std::process::exit(1)
}

/// A panic anywhere in PID 1 ends the guest with a message.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| give_up(&format!("internal error: {info}"))));
}
