//! The services' side of the protocol by which init watches them and keeps descriptors for them (sd_notify(3)).
//!
//! A descriptor that is stored under a name outlives the service. init hands all of a service's descriptors to the next
//! process of it, in an environment variable that reads `NAME=FD,…`. Without `NOTIFY_SOCKET` there is nobody to keep
//! anything, and all calls succeed without effect: programs also run by hand and in tests.

use std::{
    collections::BTreeSet,
    io,
    os::{
        fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixDatagram,
    },
};

use rustix::io::{FdFlags, fcntl_setfd};
use sd_notify::NotifyState;

/// Reports that the service is ready (`READY=1`).
///
/// # Errors
/// If init's socket cannot be reached.
pub fn ready() -> io::Result<()> {
    sd_notify::notify(&[NotifyState::Ready])
}

/// Reports at intervals that the service still works (`WATCHDOG=1`).
///
/// Holds its connection: a service that has no descriptor left is not one that hangs, and must not be killed as such.
#[derive(Debug)]
pub struct Heartbeat(Option<UnixDatagram>);

impl Heartbeat {
    /// Connects to the socket that `NOTIFY_SOCKET` names.
    ///
    /// # Errors
    /// If init's socket cannot be reached.
    pub fn connect() -> io::Result<Self> {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(Self(None)) };
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        Ok(Self(Some(socket)))
    }

    /// Sends one beat. A failure means that init is gone, and the whole guest with it.
    pub fn beat(&self) {
        if let Some(socket) = &self.0 {
            let _ = socket.send(NotifyState::Watchdog.to_string().as_bytes());
        }
    }
}

/// Has init keep a copy of a descriptor. One with the same name is replaced; names are ASCII letters and digits.
///
/// # Errors
/// If init's socket cannot be reached, or no descriptor is left for the connection.
pub fn store(name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[descriptor])
}

/// Has init close its copy.
///
/// # Errors
/// If init's socket cannot be reached.
pub fn remove(name: &str) -> io::Result<()> {
    sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
}

/// Takes the descriptors that an earlier process of this service stored, by name, from an environment variable.
///
/// Call it once and before anything else closes or adopts descriptors: a number is all that identifies them.
pub fn inherited(variable: &str) -> Vec<(String, OwnedFd)> {
    let pairs = parse(&std::env::var(variable).unwrap_or_default());
    pairs.into_iter().filter_map(|(name, number)| Some((name, adopt(number)?))).collect()
}

/// Takes a descriptor that was inherited under a number; `None` when it is not open or is a standard stream.
///
/// It is closed at the next execve(2). Each number may be adopted once.
pub fn adopt(number: RawFd) -> Option<OwnedFd> {
    if number <= 2 {
        return None;
    }
    // SAFETY: the number is not -1, and the descriptor is only borrowed for a call that fails if it is not open.
    fcntl_setfd(unsafe { BorrowedFd::borrow_raw(number) }, FdFlags::CLOEXEC).ok()?;
    // SAFETY: it is open, was handed down under this number for the caller alone, and is adopted once.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The pairs of `NAME=FD,…`, without those that are malformed and without repeated numbers, which would be closed
/// twice.
fn parse(text: &str) -> Vec<(String, RawFd)> {
    let mut seen = BTreeSet::new();
    let pair = |text: &str| {
        let (name, number) = text.split_once('=')?;
        Some((name.to_owned(), number.parse().ok()?))
    };
    text.split(',').filter_map(pair).filter(|(_, number)| seen.insert(*number)).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{IoSliceMut, stdin},
        mem::MaybeUninit,
        os::fd::{AsFd, AsRawFd, IntoRawFd},
        process::{Command, Stdio},
        time::Duration,
    };

    use proptest::prelude::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    #[test]
    fn pairs_are_read_and_the_malformed_left_out() {
        assert_eq!(parse(""), []);
        assert_eq!(parse("a=7,b1x2=12"), [("a".to_owned(), 7), ("b1x2".to_owned(), 12)]);
        assert_eq!(parse("a,b=,c=x,d=3,e=3,=4,"), [("d".to_owned(), 3), (String::new(), 4)]);
    }

    #[test]
    fn an_open_descriptor_is_adopted_and_closed_for_programs() {
        let number = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let adopted = adopt(number).unwrap();
        assert_eq!(adopted.as_raw_fd(), number);
        assert_eq!(rustix::io::fcntl_getfd(&adopted).unwrap(), FdFlags::CLOEXEC);
    }

    #[test]
    fn standard_streams_and_what_is_not_open_are_not_adopted() {
        for number in [-2, -1, 0, 1, 2, 1 << 20] {
            assert!(adopt(number).is_none(), "{number}");
        }
    }

    /// Runs in a process of its own, whose `NOTIFY_SOCKET` is that of the other test.
    #[test]
    #[ignore = "a part of the other test"]
    fn service() {
        let heartbeat = Heartbeat::connect().unwrap();
        store("a1", stdin().as_fd()).unwrap();
        ready().unwrap();
        heartbeat.beat();
        remove("a1").unwrap();
    }

    /// One datagram and the descriptors that came with it.
    fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [0; 256];
        let parts = &mut [IoSliceMut::new(&mut buffer)];
        let length = recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
        let descriptors = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        });
        let descriptors = descriptors.collect();
        (String::from_utf8(buffer[..length].to_vec()).unwrap(), descriptors)
    }

    #[test]
    fn init_receives_states_and_descriptors_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut service = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "notify::tests::service"])
            .env("NOTIFY_SOCKET", &path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        for (text, descriptors) in
            [("FDSTORE=1\nFDNAME=a1\n", 1), ("READY=1\n", 0), ("WATCHDOG=1", 0), ("FDSTOREREMOVE=1\nFDNAME=a1\n", 0)]
        {
            let received = receive(&socket);
            assert_eq!((received.0.as_str(), received.1.len()), (text, descriptors));
        }
        assert!(service.wait().unwrap().success());
    }

    #[test]
    fn without_init_nothing_is_sent_and_nothing_fails() {
        // Another test of this process may not set the variable, so this one need not remove it.
        assert!(std::env::var_os("NOTIFY_SOCKET").is_none(), "run under a service manager");
        ready().unwrap();
        store("a1", stdin().as_fd()).unwrap();
        Heartbeat::connect().unwrap().beat();
    }

    proptest! {
        #[test]
        fn no_text_panics_and_no_number_comes_twice(text in "([a-z]{0,3}|=|,|[0-9]{1,2}|-){0,20}") {
            let numbers: Vec<_> = parse(&text).into_iter().map(|(_, number)| number).collect();
            prop_assert_eq!(numbers.iter().collect::<BTreeSet<_>>().len(), numbers.len());
        }
    }
}
