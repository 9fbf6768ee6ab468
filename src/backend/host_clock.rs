//! Notices when the host's clock jumps, so that the guest's follows at once.
//!
//! A timer on the host's wall clock that is cancelled when the clock is set (timerfd_create(2),
//! `TFD_TIMER_CANCEL_ON_SET`) reports it, also at the end of a sleep, when the kernel sets the clock itself. [`Jump`]
//! tells the two apart for the log: in a sleep `CLOCK_BOOTTIME` goes on and `CLOCK_MONOTONIC` does not. A period
//! besides covers a host without such a timer, and a guest that cannot read the host's clock.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    sys::{
        time::TimeSpec,
        timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    time::{ClockId, clock_gettime},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

/// Longest time between two messages to the guest.
const PERIOD: Duration = Duration::from_secs(300);

/// A smaller difference between two clocks comes from reading them one after the other, and from a clock that is
/// adjusted slowly.
const NOTABLE: Duration = Duration::from_millis(50);

/// Time in seconds since the epoch at which the timer would expire: in the year 2514.
const NEVER: i64 = 1 << 34;

/// The host's clocks at one moment.
#[derive(Clone, Copy, Debug)]
struct Moment {
    /// Since the epoch.
    real: Duration,
    /// Since the start of the host, with the time that it slept.
    boot: Duration,
    /// The same without that time.
    monotonic: Duration,
}

/// The timer, in a form that tokio takes.
#[derive(Debug)]
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A difference between the passing of two clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Jump {
    /// Nothing notable.
    None,
    /// The host slept for so long.
    Slept(Duration),
    /// The clock was set forward by so much.
    Forward(Duration),
    /// The clock was set back by so much.
    Back(Duration),
}

/// The host's clock, as the connection to one guest watches it.
#[derive(Debug)]
pub(super) struct HostClock {
    timer: Option<AsyncFd<Timer>>,
    last: Option<Moment>,
    /// Time of the next message in any case.
    due: Instant,
}

impl HostClock {
    /// Watches the clock from now on.
    pub(super) fn watch() -> Self {
        let timer = timer().inspect_err(|error| warn!("steps of the host's clock reach the guest late: {error}"));
        Self { timer: timer.ok(), last: Moment::now(), due: Instant::now() + PERIOD }
    }

    /// Waits until the guest should compare its clock, and returns the time in nanoseconds since the Unix epoch. A call
    /// that is dropped misses nothing.
    pub(super) async fn changed(&mut self) -> u64 {
        tokio::select! {
            () = cancelled(&mut self.timer) => {}
            () = sleep_until(self.due) => {}
        }
        self.due = Instant::now() + PERIOD;
        let now = Moment::now();
        if let (Some(last), Some(now)) = (self.last, now) {
            match Jump::between(last, now) {
                Jump::None => {}
                jump => info!(?jump, "the host's clock jumped"),
            }
        }
        self.last = now;
        unix_ns()
    }
}

impl Moment {
    fn now() -> Option<Self> {
        let read = |clock| clock_gettime(clock).ok().map(Duration::from);
        Some(Self {
            real: read(ClockId::CLOCK_REALTIME)?,
            boot: read(ClockId::CLOCK_BOOTTIME)?,
            monotonic: read(ClockId::CLOCK_MONOTONIC)?,
        })
    }
}

impl Jump {
    fn between(last: Moment, now: Moment) -> Self {
        let passed = |clock: fn(&Moment) -> Duration| clock(&now).saturating_sub(clock(&last));
        let slept = passed(|moment| moment.boot).saturating_sub(passed(|moment| moment.monotonic));
        if slept >= NOTABLE {
            return Self::Slept(slept);
        }
        let expected = last.real.saturating_add(passed(|moment| moment.boot));
        match (now.real.saturating_sub(expected), expected.saturating_sub(now.real)) {
            (forward, _) if forward >= NOTABLE => Self::Forward(forward),
            (_, back) if back >= NOTABLE => Self::Back(back),
            _ => Self::None,
        }
    }
}

/// Returns the time in nanoseconds since the Unix epoch.
pub(super) fn unix_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn timer() -> io::Result<AsyncFd<Timer>> {
    let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
    let timer = Timer(TimerFd::new(TimerClock::CLOCK_REALTIME, flags)?);
    arm(&timer)?;
    // SAFETY: `Timer` owns its descriptor, returns the same one each time and closes it with itself.
    Ok(unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }?)
}

fn arm(timer: &Timer) -> nix::Result<()> {
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    match timer.0.set(Expiration::OneShot(TimeSpec::new(NEVER, 0)), flags) {
        // The timer is armed all the same; the clock was set again since its last reading.
        Err(Errno::ECANCELED) => Ok(()),
        result => result,
    }
}

/// Waits until the clock is set; forever without a timer.
async fn cancelled(timer: &mut Option<AsyncFd<Timer>>) {
    let Some(descriptor) = timer else { return std::future::pending().await };
    let set = loop {
        let Ok(mut ready) = descriptor.readable().await else { break false };
        // The end of the wait is ECANCELED, or an expiry if somebody sets the clock to after `NEVER`.
        match ready.try_io(|timer| Ok(timer.get_ref().0.wait()?)) {
            Ok(Ok(())) => break arm(descriptor.get_ref()).is_ok(),
            Ok(Err(_)) => break false,
            Err(_not_yet) => {}
        }
    };
    if !set {
        // It would be ready forever.
        *timer = None;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn moment(real: u64, boot: u64, monotonic: u64) -> Moment {
        let [real, boot, monotonic] = [real, boot, monotonic].map(Duration::from_millis);
        Moment { real, boot, monotonic }
    }

    #[test]
    fn a_sleep_a_step_and_the_passing_of_time_are_told_apart() {
        let last = moment(1_000_000, 5000, 4000);
        assert_eq!(Jump::between(last, moment(1_007_000, 12_000, 11_000)), Jump::None);
        assert_eq!(Jump::between(last, moment(1_600_000, 605_000, 5000)), Jump::Slept(Duration::from_secs(599)));
        assert_eq!(Jump::between(last, moment(1_601_000, 6000, 5000)), Jump::Forward(Duration::from_secs(600)));
        assert_eq!(Jump::between(last, moment(401_000, 6000, 5000)), Jump::Back(Duration::from_secs(600)));
        // A clock that is slewed is not set.
        assert_eq!(Jump::between(last, moment(1_060_020, 65_000, 64_000)), Jump::None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_guest_compares_its_clock_now_and_then_in_any_case() {
        let mut clock = HostClock::watch();
        // Dropped and asked again, as in a loop with other sources.
        let _ = tokio::time::timeout(PERIOD / 2, clock.changed()).await;
        let start = Instant::now();
        let told = clock.changed().await;
        assert!(start.elapsed() <= PERIOD / 2 + Duration::from_secs(1));
        assert!(unix_ns().abs_diff(told) < 10_000_000_000);
    }

    #[tokio::test]
    async fn a_clock_that_is_set_is_reported_at_once() {
        let shift = |ns: i64| {
            // SAFETY: all-zero bytes are a valid value of this C struct of integers.
            let mut request: libc::timex = unsafe { std::mem::zeroed() };
            request.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
            (request.time.tv_sec, request.time.tv_usec) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
            // SAFETY: the call reads and writes one struct of this type, which outlives it.
            unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, &raw mut request) }
        };
        let mut clock = HostClock::watch();
        // A microsecond is enough for the kernel and harms nobody. Only root may do it.
        if shift(1000) < 0 {
            return;
        }
        let told = tokio::time::timeout(Duration::from_secs(1), clock.changed()).await;
        assert!(shift(-1000) >= 0);
        told.expect("a step of the clock is not noticed");
        // It is armed again.
        tokio::time::timeout(Duration::from_secs(1), clock.changed()).await.expect("a second step is not noticed");
    }

    proptest! {
        #[test]
        fn no_moments_panic(last in any::<[u64; 3]>(), now in any::<[u64; 3]>()) {
            Jump::between(moment(last[0], last[1], last[2]), moment(now[0], now[1], now[2]));
        }
    }
}
