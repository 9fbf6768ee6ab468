//! The checks of `doctor` for properties of the host that a VM does without, at a price.

use std::{fs, io};

use super::Check;

/// The kernel's choice of huge pages for shared memory, of which guest memory is made.
const SHARED_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The version of Landlock (its ABI) with all that the VM's processes use.
const WANTED_LANDLOCK: i64 = 6;

/// The things that each version of Landlock denies besides those before it (landlock(7)), as far as they matter here.
const LANDLOCK: [(i64, &str); 3] =
    [(1, "files"), (4, "TCP ports"), (6, "signals to other processes and abstract unix sockets")];

pub(super) fn checks() -> [Check; 2] {
    let huge = fs::read_to_string(SHARED_HUGE_PAGES);
    [
        Check { name: "huge pages", result: Ok(huge_pages(huge.as_deref().unwrap_or_default())) },
        Check { name: "confinement", result: Ok(confinement(landlock_version())) },
    ]
}

/// Describes the choice, which the kernel marks by brackets.
fn huge_pages(choices: &str) -> String {
    let chosen = choices.split_ascii_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    match chosen {
        Some("always" | "advise" | "within_size" | "force") => "on for the VM's memory".into(),
        Some(other) => format!(
            "off for the VM's memory ({other}); `echo advise | sudo tee {SHARED_HUGE_PAGES}` makes the next start's VM \
             faster"
        ),
        None => "this kernel does not support huge pages for the VM's memory".into(),
    }
}

/// Returns the kernel's version of Landlock.
fn landlock_version() -> io::Result<i64> {
    const CREATE_RULESET_VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call reads no memory: the address is null and the size 0, as it demands.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

/// Describes what Landlock takes from the VM's processes.
fn confinement(version: io::Result<i64>) -> String {
    let version = match version {
        Ok(version) => version,
        Err(error) => {
            let cause = match error.raw_os_error() {
                Some(libc::EOPNOTSUPP) => "turned off; add `landlock` to the kernel's `lsm=` option",
                _ => "not in this kernel (Linux 5.13 or later has it)",
            };
            return format!("the VM's processes are confined by seccomp only; Landlock is {cause}");
        }
    };
    let (denied, open): (Vec<_>, Vec<_>) = LANDLOCK.iter().partition(|(since, _)| *since <= version);
    let list = |parts: Vec<&(i64, &str)>| parts.iter().map(|(_, what)| *what).collect::<Vec<_>>().join(", ");
    let denied = list(denied);
    if version >= WANTED_LANDLOCK {
        return format!("the VM's processes are confined by seccomp and Landlock {version}: {denied}");
    }
    format!(
        "the VM's processes are confined by seccomp and Landlock {version}: {denied}; a later kernel adds {}",
        list(open)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_that_are_off_come_with_the_command_that_turns_them_on() {
        let off = huge_pages("always within_size advise [never] deny force\n");
        assert!(off.starts_with("off") && off.contains("echo advise"), "{off}");
        assert_eq!(huge_pages("always within_size [advise] never deny force\n"), "on for the VM's memory");
        assert_eq!(huge_pages(""), "this kernel does not support huge pages for the VM's memory");
    }

    #[test]
    fn what_landlock_lacks_is_named() {
        assert_eq!(
            confinement(Ok(4)),
            "the VM's processes are confined by seccomp and Landlock 4: files, TCP ports; a later kernel adds signals to \
             other processes and abstract unix sockets"
        );
        assert!(!confinement(Ok(7)).contains("later kernel"));
        let missing = confinement(Err(io::Error::from_raw_os_error(libc::ENOSYS)));
        assert!(missing.contains("seccomp only") && missing.contains("5.13"), "{missing}");
        let off = confinement(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)));
        assert!(off.contains("lsm="), "{off}");
    }

    #[test]
    fn this_kernels_version_is_a_number_or_a_reason() {
        match landlock_version() {
            Ok(version) => assert!(version > 0),
            Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)), "{error}"),
        }
    }
}
