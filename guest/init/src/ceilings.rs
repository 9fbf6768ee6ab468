//! Ceilings over all containers together, from the size of the VM.
//!
//! A container without a limit of its own may take what it likes, and so may a hundred of them. What they must not take
//! is what the services need to go on: dockerd, containerd and the shims, which are Go programs and end when a thread
//! or a page is refused to them.

/// Memory in bytes and threads of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// `MemTotal` of `/proc/meminfo`.
    pub(crate) memory: u64,
    /// `/proc/sys/kernel/threads-max`, which the kernel derives from its memory.
    pub(crate) threads: u64,
}

/// Limits of the two halves of the cgroup tree, and of a table of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ceilings {
    /// `memory.max` of the containers, in bytes.
    pub(crate) containers_memory: u64,
    /// `pids.max` of the containers; the kernel counts threads.
    pub(crate) containers_threads: u64,
    /// `memory.min` of the services, in bytes, which is not reclaimed for containers.
    pub(crate) services_memory: u64,
    /// `kernel.pty.max`: pseudo-terminals of all containers together.
    pub(crate) terminals: u64,
}

const MIB: u64 = 1 << 20;

/// Memory that a pseudo-terminal may take in the kernel, of which two line disciplines are the most. It is not charged
/// to a cgroup.
const TERMINAL_BYTES: u64 = 32 << 10;

impl Ceilings {
    /// Calculates the ceilings of a machine.
    pub(crate) fn of(machine: Machine) -> Self {
        let Machine { memory, threads } = machine;
        // A sixteenth, which grows with the number of containers and so of shims that fit in the VM. Small machines
        // need the room that dockerd takes with no container at all, but a quarter is the most.
        let services = (memory / 16).clamp(128 * MIB, 1024 * MIB).min(memory / 4);
        // A shim has about a dozen threads, dockerd some tens.
        let services_threads = (threads / 8).clamp(1024, 8192).min(threads / 4);
        Self {
            containers_memory: memory - services,
            containers_threads: threads - services_threads,
            // Half of it: what the services do not use now is page cache that others may need more.
            services_memory: services / 2,
            // At most a sixteenth of the memory in terminals, but never less than the kernel's own default.
            terminals: (memory / 16 / TERMINAL_BYTES).clamp(4096, 65_536),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_of_usual_machines() {
        let of = |mib: u64| Ceilings::of(Machine { memory: mib * MIB, threads: mib * 8 });
        let four_gib = of(4096);
        assert_eq!((four_gib.containers_memory / MIB, four_gib.services_memory / MIB), (3840, 128));
        assert_eq!((four_gib.containers_threads, four_gib.terminals), (28_672, 8192));
        let half_gib = of(480);
        assert_eq!((half_gib.containers_memory / MIB, half_gib.containers_threads), (360, 2880));
        assert_eq!(of(1024).containers_memory / MIB, 896);
        assert_eq!(of(64 * 1024).containers_memory / MIB, 63 * 1024);
    }

    proptest! {
        #[test]
        fn containers_keep_most_and_services_keep_something(memory in any::<u64>(), threads in any::<u64>()) {
            let ceilings = Ceilings::of(Machine { memory, threads });
            prop_assert!(ceilings.containers_memory >= memory / 4 * 3 && ceilings.containers_memory <= memory);
            prop_assert!(ceilings.containers_threads >= threads / 4 * 3 && ceilings.containers_threads <= threads);
            // The floor of the services is outside of what containers may take.
            prop_assert!(ceilings.services_memory <= memory - ceilings.containers_memory);
            prop_assert!((4096..=65_536).contains(&ceilings.terminals));
            if memory >= 8 * MIB && threads >= 8 {
                prop_assert!(ceilings.services_memory > 0 && ceilings.containers_threads < threads);
            }
        }

        #[test]
        fn a_larger_machine_never_gets_less(memory in 0..u64::MAX / 2, more in 0..u64::MAX / 2, threads in any::<u64>()) {
            let small = Ceilings::of(Machine { memory, threads });
            let large = Ceilings::of(Machine { memory: memory + more, threads });
            prop_assert!(large.services_memory >= small.services_memory);
            prop_assert!(large.containers_memory >= small.containers_memory);
            prop_assert!(large.terminals >= small.terminals);
        }
    }
}
