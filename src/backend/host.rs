//! Checks of the host that are made before a VM, and the sizes that follow from it.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
};

use sha2::{Digest, Sha256};
use uuid::Uuid;

const KVM: &str = "/dev/kvm";

/// Most vCPUs of a VM, as the vmm allows.
const MAX_CPUS: u8 = 32;

/// Largest default of a VM's memory in MiB. The guest's kernel touches a share of it at each start, and few need more.
const MAX_DEFAULT_MIB: u64 = 16 * 1024;

/// Environment variable that allows a VM on a KVM without known hardware behind it, whatever its value.
pub const TRY_ANY_KVM: &str = "BULKHEAD_TRY_ANY_KVM";

/// Reason that a VM cannot run on this host.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The device is missing.
    #[error(
        "there is no /dev/kvm: load the module (`sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`), turn on \
         virtualization in the firmware, or, inside a VM or container, have its owner pass virtualization through"
    )]
    NoKvm,
    /// The device is closed to this user; the text is the remedy.
    #[error("/dev/kvm may not be opened by this user: {0}")]
    KvmDenied(String),
    /// The device cannot be opened for another reason.
    #[error("cannot open /dev/kvm")]
    KvmBroken(#[source] io::Error),
    /// KVM runs without hardware behind it.
    #[error(
        "the KVM of this machine cannot run the guest kernel: the CPU offers neither vmx nor svm, so this is a \
         software KVM (such as PVM); use a machine with hardware virtualization, or nested virtualization in a VM"
    )]
    SoftwareKvm,
    /// More memory than the machine has.
    #[error("{asked} MiB of memory requested, but this machine has {present} MiB; try a smaller --memory")]
    Memory {
        /// Requested MiB.
        asked: u64,
        /// MiB of the machine.
        present: u64,
    },
    /// Too little memory for the guest to boot.
    #[error("{asked} MiB of memory is too little for the guest; use --memory with at least {minimum} MiB")]
    TooLittleMemory {
        /// Requested MiB.
        asked: u64,
        /// Required MiB.
        minimum: u64,
    },
    /// The number of vCPUs is out of range.
    #[error("invalid CPU count {0}: must be 1-{MAX_CPUS}")]
    Cpus(u8),
    /// A file of procfs cannot be read.
    #[error("cannot read {0}")]
    Proc(&'static str, #[source] io::Error),
}

/// Returns the id of the VM with this data disk: the same at each start, a different one for each host and profile.
///
/// The host's own id cannot be derived from it, since that is to be kept confidential (machine-id(5)).
pub fn machine_uuid(data_disk: &Path) -> Uuid {
    // A host without the file, such as a container, tells its VMs apart by the disks' paths only.
    let host = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let digest = Sha256::new()
        .chain_update("bulkhead machine\0")
        .chain_update(host.trim())
        .chain_update("\0")
        .chain_update(data_disk.as_os_str().as_bytes())
        .finalize();
    // Version 8 (RFC 9562, 5.8) leaves the bits to the application; versions 3 and 5 would mean MD5 or SHA-1 of a name.
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    Uuid::new_v8(bytes)
}

/// Checks that this user may open /dev/kvm as the VM will.
pub fn check_kvm() -> Result<(), HostError> {
    match OpenOptions::new().read(true).write(true).open(KVM) {
        Ok(_) => Ok(()),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => Err(HostError::NoKvm),
            io::ErrorKind::PermissionDenied => Err(HostError::KvmDenied(remedy())),
            // A device node without a driver: udev or a container made the node, but the module is not loaded.
            _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => Err(HostError::NoKvm),
            _ => Err(HostError::KvmBroken(error)),
        },
    }
}

/// Returns the command that opens /dev/kvm to this user, which depends on its group and mode.
fn remedy() -> String {
    let Ok(metadata) = fs::metadata(KVM) else { return "its owner cannot be read".into() };
    let gid = metadata.gid();
    let group = nix::unistd::Group::from_gid(gid.into()).ok().flatten().map_or(gid.to_string(), |group| group.name);
    let mode = metadata.permissions().mode() & 0o777;
    // Most distributions: root:kvm with 0660. Joining root's group would give far more than KVM.
    if mode & 0o060 == 0o060 && gid != 0 {
        format!("it belongs to the group `{group}`; run `sudo usermod -aG {group} $USER` and log in again")
    } else {
        format!(
            "it belongs to the group `{group}` with mode {mode:04o}, which lets no group in; run `echo \
             'KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\"' | sudo tee /etc/udev/rules.d/65-kvm.rules && sudo udevadm \
             control --reload && sudo udevadm trigger --name-match=kvm`, then `sudo usermod -aG kvm $USER` and log in \
             again"
        )
    }
}

/// Checks that KVM has hardware behind it.
pub fn check_virtualization() -> Result<(), HostError> {
    // A software KVM opens like any other, interprets the guest and gives up on instructions of a Linux kernel's early
    // boot. The user would see a VM that ends for no visible reason.
    if std::env::var_os(TRY_ANY_KVM).is_some() {
        return Ok(());
    }
    let text = read("/proc/cpuinfo")?;
    if has_virtualization(&text) { Ok(()) } else { Err(HostError::SoftwareKvm) }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    // Whole words of `flags` lines: on Intel a line `vmx flags` follows, and a model's name could contain anything.
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

fn read(path: &'static str) -> Result<String, HostError> {
    fs::read_to_string(Path::new(path)).map_err(|error| HostError::Proc(path, error))
}

/// Returns the memory of this machine in MiB.
pub fn memory_mib() -> Result<u64, HostError> {
    let text = read("/proc/meminfo")?;
    mem_total(&text).ok_or_else(|| HostError::Proc("/proc/meminfo", io::ErrorKind::InvalidData.into()))
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}

/// Returns the guest's memory in MiB: the requested size, else a quarter of the machine's, at least 1 GiB and
/// at most 16 GiB.
pub fn choose_memory(asked: Option<u64>, present: u64) -> Result<u64, HostError> {
    const MINIMUM: u64 = 256;
    match asked {
        // Not the free memory: the guest's becomes resident only as it is touched.
        Some(asked) if asked > present => Err(HostError::Memory { asked, present }),
        Some(asked) if asked < MINIMUM => Err(HostError::TooLittleMemory { asked, minimum: MINIMUM }),
        Some(asked) => Ok(asked),
        None => Ok((present / 4).clamp(1024, MAX_DEFAULT_MIB)),
    }
}

/// Returns the number of vCPUs: the requested one, else half of the machine's CPUs.
pub fn choose_cpus(asked: Option<u8>, present: usize) -> Result<u8, HostError> {
    match asked {
        Some(asked) if (1..=MAX_CPUS).contains(&asked) => Ok(asked),
        Some(asked) => Err(HostError::Cpus(asked)),
        None => Ok(u8::try_from((present / 2).clamp(1, MAX_CPUS.into())).unwrap_or(1)),
    }
}

/// Returns whether the host's kernel keeps time by the TSC, which it watched and found steady and equal on all CPUs.
pub fn trusts_tsc() -> bool {
    const CURRENT: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    fs::read_to_string(CURRENT).is_ok_and(|name| name.trim() == "tsc")
}

/// Returns the number of CPUs that this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_with_vmx_or_svm_can_run_a_guest() {
        assert!(has_virtualization("processor : 0\nflags\t\t: fpu svm lm\n"));
        assert!(has_virtualization("flags\t\t: vmx\n"));
        assert!(!has_virtualization("flags\t\t: fpu svm_lock lm\nvmx flags : x\nmodel name: vmx\n"));
    }

    #[test]
    fn a_profiles_machine_keeps_its_id_and_another_has_another() {
        let id = machine_uuid(Path::new("/a/data.img"));
        assert_eq!(machine_uuid(Path::new("/a/data.img")), id);
        assert_ne!(machine_uuid(Path::new("/b/data.img")), id);
        assert_eq!((id.get_version_num(), id.get_variant()), (8, uuid::Variant::RFC4122));
    }

    #[test]
    fn memory_defaults_to_a_quarter_up_to_16_gib_and_never_exceeds_the_machine() {
        assert_eq!(mem_total("MemTotal:       24000000 kB\nMemFree: 1 kB\n"), Some(23437));
        assert_eq!(choose_memory(None, 32768).unwrap(), 8192);
        assert_eq!(choose_memory(None, 2048).unwrap(), 1024);
        assert_eq!(choose_memory(None, 1 << 20).unwrap(), 16384);
        assert_eq!(choose_memory(Some(1 << 19), 1 << 20).unwrap(), 1 << 19);
        assert_eq!(choose_memory(Some(4096), 4096).unwrap(), 4096);
        assert!(matches!(choose_memory(Some(4097), 4096), Err(HostError::Memory { .. })));
        assert!(matches!(choose_memory(Some(1), 4096), Err(HostError::TooLittleMemory { .. })));
    }

    #[test]
    fn cpus_default_to_half_and_stay_within_1_to_32() {
        assert_eq!([1, 2, 7, 200].map(|present| choose_cpus(None, present).unwrap()), [1, 1, 3, 32]);
        assert!(matches!(choose_cpus(Some(33), 64), Err(HostError::Cpus(33))));
        assert!(matches!(choose_cpus(Some(0), 64), Err(HostError::Cpus(0))));
    }
}
