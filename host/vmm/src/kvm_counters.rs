//! KVM's own counters of the machine and its vCPUs. Read twice, they tell what a machine does that does not respond: a
//! vCPU that exits without end, or an interrupt that is never injected.
//!
//! They are files of KVM in a binary format (KVM API, `KVM_GET_STATS_FD`; Linux 5.15 and later). The same numbers are
//! in debugfs, for root only.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::FileExt,
    },
};

use kvm_bindings::{
    KVM_CAP_BINARY_STATS_FD, KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_MASK, KVM_STATS_UNIT_MASK, KVM_STATS_UNIT_NONE,
    KVMIO,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::{ioctl::ioctl, ioctl_io_nr};

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Size of the header (`struct kvm_stats_header`), six numbers of 32 bits.
const HEADER: usize = 24;

/// Size of a descriptor (`struct kvm_stats_desc`) before its name.
const DESCRIPTOR: usize = 16;

/// Most descriptors and bytes of a name that are read; Linux has 60 counters with names of up to 48 bytes.
const MAX_DESCRIPTORS: usize = 512;
const MAX_NAME: usize = 256;

/// The counters by their names: one number for those of the machine, one for each vCPU for those of vCPUs.
pub(super) type Counters = BTreeMap<String, Vec<u64>>;

/// The open files of counters.
#[derive(Default)]
pub(super) struct KvmCounters {
    files: Vec<CounterFile>,
}

/// A file of counters and where it has them.
struct CounterFile {
    file: File,
    /// Names and offsets in the file.
    counters: Vec<(String, u64)>,
}

impl KvmCounters {
    /// Opens the counters. A KVM without them has none, which keeps no machine from starting.
    pub(super) fn open(vm: &VmFd, vcpus: &[VcpuFd]) -> Self {
        if vm.check_extension_raw(u64::from(KVM_CAP_BINARY_STATS_FD)) <= 0 {
            return Self::default();
        }
        let of_vm = counter_file(vm);
        let of_vcpus = vcpus.iter().map(counter_file);
        let files = std::iter::once(of_vm).chain(of_vcpus).collect::<io::Result<_>>();
        files.map_or_else(
            |error| {
                tracing::warn!(%error, "KVM's counters cannot be read");
                Self::default()
            },
            |files| Self { files },
        )
    }

    /// Reads all counters; none that cannot be read.
    pub(super) fn read(&self) -> Counters {
        let mut all = Counters::new();
        for one in &self.files {
            for (name, offset) in &one.counters {
                let mut value = [0; 8];
                if one.file.read_exact_at(&mut value, *offset).is_ok() {
                    all.entry(name.clone()).or_default().push(u64::from_ne_bytes(value));
                }
            }
        }
        all
    }
}

/// Opens the counters of a VM or of a vCPU.
fn counter_file(of: &impl AsRawFd) -> io::Result<CounterFile> {
    // SAFETY: the request takes no argument, so the kernel reads and writes none of this process's memory.
    let fd = unsafe { ioctl(of, KVM_GET_STATS_FD()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nothing else has it.
    CounterFile::new(unsafe { File::from_raw_fd(fd) })
}

impl CounterFile {
    /// Reads where a file has its counters.
    fn new(file: File) -> io::Result<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let [_flags, name_size, count, _id, descriptors, data] = words(&header);
        let (name_size, count) = (name_size as usize, count as usize);
        if name_size > MAX_NAME || count > MAX_DESCRIPTORS {
            return Err(io::Error::other("the header of KVM's counters is not understood"));
        }
        let size = DESCRIPTOR + name_size;
        let mut table = vec![0; size * count];
        file.read_exact_at(&mut table, u64::from(descriptors))?;
        let counter = |entry: &[u8]| {
            let (fields, name) = entry.split_at(DESCRIPTOR);
            let [flags, exponent_and_size, offset, _bucket_size] = words(fields);
            // Numbers that only grow, one of each: no histograms, and no times, which would outrun all counts.
            let counts = flags & KVM_STATS_TYPE_MASK == KVM_STATS_TYPE_CUMULATIVE
                && flags & KVM_STATS_UNIT_MASK == KVM_STATS_UNIT_NONE
                && exponent_and_size >> 16 == 1;
            let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            let name = String::from_utf8_lossy(&name[..end]).into_owned();
            counts.then_some((name, u64::from(data) + u64::from(offset)))
        };
        let counters = table.chunks_exact(size).filter_map(counter).collect();
        Ok(Self { file, counters })
    }
}

/// The first bytes as numbers of 32 bits in this machine's order, which is KVM's; zeros beyond their end.
fn words<const WORDS: usize>(bytes: &[u8]) -> [u32; WORDS] {
    let mut chunks = bytes.as_chunks().0.iter();
    std::array::from_fn(|_| chunks.next().map_or(0, |chunk| u32::from_ne_bytes(*chunk)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use kvm_bindings::{KVM_STATS_TYPE_INSTANT, KVM_STATS_UNIT_SECONDS};
    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A file of counters with names of eight bytes: name, flags, values.
    fn counters(of: &[(&str, u32, &[u64])]) -> Vec<u8> {
        let data = HEADER + of.len() * (DESCRIPTOR + 8);
        let header = [0, 8, of.len() as u32, 0, HEADER as u32, data as u32];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut offset = 0_u32;
        for (name, flags, values) in of {
            for word in [*flags, (values.len() as u32) << 16, offset, 0] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(name.bytes().chain(std::iter::repeat(0)).take(8));
            offset += 8 * values.len() as u32;
        }
        bytes.extend(of.iter().flat_map(|(.., values)| *values).flat_map(|value| value.to_ne_bytes()));
        bytes
    }

    #[test]
    fn counts_are_read_and_times_histograms_and_momentary_values_are_not() {
        let bytes = counters(&[
            ("wait_ns", KVM_STATS_UNIT_SECONDS, &[1 << 40]),
            ("exits", 0, &[7]),
            ("hist", 0, &[1, 2, 3]),
            ("blocking", KVM_STATS_TYPE_INSTANT, &[1]),
            ("injected", 0, &[9]),
        ]);
        let files = [&bytes, &bytes].map(|bytes| CounterFile::new(file(bytes)).unwrap());
        let read = KvmCounters { files: files.into() }.read();
        assert_eq!(read, Counters::from([("exits".into(), vec![7, 7]), ("injected".into(), vec![9, 9])]));
    }

    #[test]
    fn a_machine_of_this_hosts_kvm_has_counters_of_itself_and_its_vcpus() {
        // A host without KVM, or with one that has no counters, has nothing to show here.
        let Ok(kvm) = kvm_ioctls::Kvm::new() else { return };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpus = [vm.create_vcpu(0).unwrap(), vm.create_vcpu(1).unwrap()];
        if vm.check_extension_raw(u64::from(KVM_CAP_BINARY_STATS_FD)) <= 0 {
            return;
        }
        let read = KvmCounters::open(&vm, &vcpus).read();
        assert_eq!(read.get("exits"), Some(&vec![0, 0]), "{read:?}");
        assert_eq!(read.get("remote_tlb_flush").map(Vec::len), Some(1), "{read:?}");
    }

    proptest! {
        #[test]
        fn any_file_is_read_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..200), small in any::<bool>()) {
            if small && bytes.len() > 24 {
                bytes[4..12].copy_from_slice(&[8, 0, 0, 0, 2, 0, 0, 0]);
                bytes[16..20].copy_from_slice(&[24, 0, 0, 0]);
            }
            if let Ok(one) = CounterFile::new(file(&bytes)) {
                KvmCounters { files: vec![one] }.read();
            }
        }
    }
}
