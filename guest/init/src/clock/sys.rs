//! KVM's PTP clock (`linux/ptp_clock.h`) and the adjustment of the system's (adjtimex(2)).

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::Path,
    time::Instant,
};

use libc::{ptp_clock_time, timex};
use nix::time::{ClockId, clock_gettime};

use super::correction::{Reading, nanoseconds};

/// Readings of the host's clock in one request.
const SAMPLES: usize = 5;

/// Name of the clock's driver in sysfs.
const DRIVER: &str = "KVM virtual PTP";

/// Time constant of the kernel's clock discipline: 2^5 s, the time between two comparisons.
const TIME_CONSTANT: libc::c_long = 5;

/// The host's clock.
#[derive(Debug)]
pub(super) struct HostClock(File);

impl HostClock {
    /// Opens the clock; `None` when this host has none for its guests.
    pub(super) fn open() -> Option<Self> {
        let clocks = fs::read_dir("/sys/class/ptp").ok()?;
        let kvm = clocks.flatten().find(|clock| {
            let name = fs::read_to_string(clock.path().join("clock_name"));
            name.is_ok_and(|name| name.trim() == DRIVER)
        })?;
        File::open(Path::new("/dev").join(kvm.file_name())).ok().map(Self)
    }

    /// Compares the clocks in the most exact way that the kernel has.
    pub(super) fn read(&self) -> Option<Reading> {
        // The first asks the host for its time and TSC at one moment, which works while the guest's own clock is KVM's.
        // No driver has both of the others.
        self.precise().or_else(|| self.extended()).or_else(|| self.series())
    }

    fn precise(&self) -> Option<Reading> {
        // SAFETY: all-zero bytes are a valid value of this C struct of integers.
        let mut request: libc::ptp_sys_offset_precise = unsafe { std::mem::zeroed() };
        // SAFETY: the request reads and writes one struct of this type, which outlives the call.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::PTP_SYS_OFFSET_PRECISE, &raw mut request) };
        if done < 0 {
            return None;
        }
        let guest = time(request.sys_realtime)?;
        Reading::between(guest, time(request.device)?, guest)
    }

    fn extended(&self) -> Option<Reading> {
        // SAFETY: all-zero bytes are a valid value of this C struct of integers.
        let mut request: libc::ptp_sys_offset_extended = unsafe { std::mem::zeroed() };
        request.n_samples = SAMPLES as libc::c_uint;
        // SAFETY: the request reads and writes one struct of this type, which outlives the call.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::PTP_SYS_OFFSET_EXTENDED, &raw mut request) };
        if done < 0 {
            return None;
        }
        // Each sample is the guest's time, the host's, and the guest's again.
        let samples = request
            .ts
            .iter()
            .take(SAMPLES)
            .filter_map(|[before, host, after]| Reading::between(time(*before)?, time(*host)?, time(*after)?));
        samples.min_by_key(|reading| reading.uncertainty_ns)
    }

    fn series(&self) -> Option<Reading> {
        // SAFETY: all-zero bytes are a valid value of this C struct of integers.
        let mut request: libc::ptp_sys_offset = unsafe { std::mem::zeroed() };
        request.n_samples = SAMPLES as libc::c_uint;
        // SAFETY: the request reads and writes one struct of this type, which outlives the call.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::PTP_SYS_OFFSET, &raw mut request) };
        if done < 0 {
            return None;
        }
        let series: Option<Vec<i64>> = request.ts.iter().take(2 * SAMPLES + 1).map(|part| time(*part)).collect();
        Reading::best_of(&series?)
    }
}

fn time(time: ptp_clock_time) -> Option<i64> {
    nanoseconds(time.sec, time.nsec)
}

/// Compares the guest's clock with the host's time as it was at a moment of the guest.
pub(super) fn compare(unix_ns: u64, received: Instant) -> Option<Reading> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).ok()?;
    let guest = nanoseconds(now.tv_sec(), u32::try_from(now.tv_nsec()).ok()?)?;
    let host = i64::try_from(unix_ns).ok()?.checked_add(i64::try_from(received.elapsed().as_nanos()).ok()?)?;
    let offset_ns = host.checked_sub(guest)?;
    // The message's way is not known. Usually it is short against an offset that is worth a step, and too long for
    // anything finer. A message that was long on its way, as on a busy host, makes the host's clock seem behind, never
    // ahead.
    let uncertainty_ns = if offset_ns < 0 { 1_000_000_000 } else { 1_000_000 };
    Some(Reading { offset_ns, uncertainty_ns })
}

/// Adds an offset to the clock at once.
pub(super) fn step(offset_ns: i64) -> io::Result<()> {
    let mut request = request(libc::ADJ_SETOFFSET | libc::ADJ_NANO);
    // The fraction is never negative. With ADJ_NANO it is in nanoseconds, whatever the field's name.
    request.time.tv_sec = offset_ns.div_euclid(1_000_000_000);
    request.time.tv_usec = offset_ns.rem_euclid(1_000_000_000);
    adjust(&mut request)?;
    // A correction that was under way belonged to the time before the step.
    discipline(0)
}

/// Hands an offset to the kernel's clock discipline, which makes up for it over the next minutes and adapts the clock's
/// rate.
pub(super) fn discipline(offset_ns: i64) -> io::Result<()> {
    let mut request = request(
        libc::ADJ_OFFSET
            | libc::ADJ_NANO
            | libc::ADJ_STATUS
            | libc::ADJ_TIMECONST
            | libc::ADJ_MAXERROR
            | libc::ADJ_ESTERROR,
    );
    request.offset = offset_ns;
    request.status = libc::STA_PLL;
    request.constant = TIME_CONSTANT;
    // In microseconds. The kernel lets the first grow until the next call, and calls the clock unsynchronised in the
    // end.
    request.maxerror = offset_ns.abs() / 1000 + 1;
    request.esterror = offset_ns.abs() / 1000;
    adjust(&mut request)
}

fn request(modes: libc::c_uint) -> timex {
    // SAFETY: all-zero bytes are a valid value of this C struct of integers.
    let mut request: timex = unsafe { std::mem::zeroed() };
    request.modes = modes;
    request
}

fn adjust(request: &mut timex) -> io::Result<()> {
    // SAFETY: the call reads and writes one struct of this type, which outlives it.
    let state = unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, request) };
    if state < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_message_that_waited_is_as_good_as_one_that_did_not() {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap();
        let now = nanoseconds(now.tv_sec(), u32::try_from(now.tv_nsec()).unwrap()).unwrap();
        // The host was an hour ahead ten seconds ago, and is now.
        let told = u64::try_from(now).unwrap() + 3_590_000_000_000;
        let Some(received) = Instant::now().checked_sub(Duration::from_secs(10)) else { return };
        let reading = compare(told, received).unwrap();
        assert!((reading.offset_ns - 3_600_000_000_000).abs() < 1_000_000_000, "{reading:?}");
        assert_eq!(compare(u64::MAX, Instant::now()), None);
    }

    #[test]
    fn a_file_that_is_not_a_clock_gives_no_reading() {
        assert_eq!(HostClock(File::open("/dev/null").unwrap()).read(), None);
    }
}
