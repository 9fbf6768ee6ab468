//! User namespaces belong to their own first ids: the kernel counts for each container by itself, and knows its range.

use std::{fs::File, os::fd::AsRawFd};

use crate::guest_root::{GuestRoot, RUNTIME};

/// `NS_GET_OWNER_UID` (ioctl_ns(2)).
const OWNER_UID: libc::Ioctl = 0xb704;

/// Prints the line that [`GuestRoot::range`] waits for.
const STAY: &str = "cat /proc/self/uid_map; exec sleep 1000";

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_containers_user_namespace_belongs_to_its_first_id() {
    GuestRoot::with(|root| {
        root.bundle("a", &["sh", "-c", STAY]);
        root.copy_bundle("a", "b");
        for name in ["a", "b"] {
            root.start(RUNTIME, name);
            let namespace = File::open(format!("/proc/{}/ns/user", GuestRoot::pid(name))).unwrap();
            let mut owner = 0_u32;
            // SAFETY: the kernel writes one id to the place that the pointer names.
            let result = unsafe { libc::ioctl(namespace.as_raw_fd(), OWNER_UID, &raw mut owner) };
            assert_eq!((result, owner), (0, root.range(name)), "{name}");
        }
        root.end(RUNTIME, "a");
        root.end(RUNTIME, "b");
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_container_that_takes_all_message_queues_leaves_another_its_own() {
    GuestRoot::with(|root| {
        // Each new file there is a queue of the default size. The line comes when the limit is reached.
        let hog = format!("i=0; while touch /dev/mqueue/$i 2>/dev/null; do i=$((i+1)); done; test $i -gt 1 && {STAY}");
        root.bundle("hog", &["sh", "-c", &hog]);
        root.start(RUNTIME, "hog");
        root.range("hog");
        root.bundle(
            "other",
            &["sh", "-c", "i=0; while touch /dev/mqueue/$i 2>/dev/null; do i=$((i+1)); done; echo $i"],
        );
        let queues: u32 = root.run(RUNTIME, "other").trim().parse().unwrap();
        assert!(queues > 1, "{queues} queues");
        root.remove("other");
        root.end(RUNTIME, "hog");
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn the_range_of_a_living_container_is_not_given_away_when_the_table_is_lost() {
    GuestRoot::with(|root| {
        root.bundle("a", &["sh", "-c", STAY]);
        root.copy_bundle("a", "b");
        root.copy_bundle("a", "c");
        root.start(RUNTIME, "a");
        assert_eq!(root.range("a"), 100_000);
        root.lose_table();
        root.start(RUNTIME, "b");
        assert_eq!(root.range("b"), 165_536);
        root.end(RUNTIME, "a");
        root.start(RUNTIME, "c");
        assert_eq!(root.range("c"), 100_000, "the range of the dead is free again");
        root.end(RUNTIME, "b");
        root.end(RUNTIME, "c");
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_container_may_have_as_many_processes_as_the_runtime_whatever_its_own_limit() {
    GuestRoot::with(|root| {
        // The child that makes the namespace asks the kernel with a limit of none, which must not stay.
        root.bundle("a", &["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; wait; echo all"]);
        assert_eq!(root.run(RUNTIME, "a"), "all\n");
        root.remove("a");
    });
}
