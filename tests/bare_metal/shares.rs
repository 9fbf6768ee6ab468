//! The file system device, with the real server behind it.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Child, Command as Process},
};

use bulkhead_share::api;
use bulkhead_vmm::api::{Command, ExitReason};
use support::{
    control,
    guest::{SPIN, kernel, machine, out},
    program,
    vmm::Vmm,
};

use super::{OFF, POWER, SOON, sequence};

/// Starts a server of `directory`; also returns the vmm's end of its stream, and its control socket, with which it
/// ends.
fn server(directory: &std::path::Path) -> (Child, OwnedFd, OwnedFd) {
    let (ours, theirs) = control::pair().unwrap();
    let (frontend, backend) = UnixStream::pair().unwrap();
    let child = control::spawn(Process::new(program()).arg("share-server"), Some(&theirs)).unwrap();
    let send = |command: &api::Command, beside: OwnedFd| {
        control::send(&ours, &serde_json::to_vec(command).unwrap(), Some(&beside)).unwrap();
    };
    send(&api::Command::State, api::new_state().unwrap().into());
    let shares = vec![api::Share { path: directory.into(), read_only: false }];
    send(&api::Command::Setup { shares, hidden: Vec::new(), locks: false }, backend.into());
    (child, frontend.into(), ours)
}

/// `mov eax, [address]; cmp eax, value; jne` to itself
fn expect(address: u32, value: u32) -> Vec<u8> {
    [&[0xa1][..], &address.to_le_bytes(), &[0x3d], &value.to_le_bytes(), &[0x75, 0xfe]].concat()
}

/// Boots a guest of this code, with the device if there is a stream to a server.
fn run(code: &[u8], stream: Option<&OwnedFd>) -> ExitReason {
    let dir = tempfile::tempdir().unwrap();
    let vmm = Vmm::spawn();
    if stream.is_some() {
        vmm.send(&Command::Shares, stream);
    }
    vmm.send(&Command::Boot(Box::new(machine(kernel(dir.path(), code)))), None);
    vmm.exit(SOON)
}

/// The configuration space of the third device, after those for entropy and the console.
const SLOT: u32 = 0xe000_0000 + (3 << 15);

/// The device's own configuration in the third BAR.
const CONFIG: u32 = 0xc000_0000 + 2 * 0x8000 + 0x2000;

#[test]
fn the_guest_finds_the_servers_tag_and_queues_in_a_virtio_fs_device() {
    let shared = tempfile::tempdir().unwrap();
    let (mut child, stream, control) = server(shared.path());
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    let code = sequence(&[
        &expect(SLOT, 0x105a_1af4),
        &expect(CONFIG, word(b"bulk")),
        &expect(CONFIG + 4, word(b"head")),
        &expect(CONFIG + 8, 0),
        // After 36 bytes of tag.
        &expect(CONFIG + 36, 4),
        &out(POWER, OFF),
        &SPIN,
    ]);
    assert_eq!(run(&code, Some(&stream)), ExitReason::PowerOff);
    drop((stream, control));
    assert!(support::vmm::ended(&mut child, SOON), "the server outlives both of its sockets");
}

#[test]
fn without_a_server_there_is_no_device_and_a_dead_one_stops_no_guest() {
    let code = sequence(&[&expect(SLOT, 0xffff_ffff), &out(POWER, OFF), &SPIN]);
    assert_eq!(run(&code, None), ExitReason::PowerOff);
    let (dead, other) = UnixStream::pair().unwrap();
    drop(other);
    assert_eq!(run(&code, Some(&dead.into())), ExitReason::PowerOff);
}
