//! KVM's own counters of a VM, from debugfs, which most hosts show to root only. Read twice, they tell what a VM does
//! that does not respond: a vCPU that exits without end, or an interrupt that is never injected.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::Path,
    time::Duration,
};

use tokio::time::{Instant, sleep};

/// Directory with one for each VM, `PID-DESCRIPTOR`.
const KVM: &str = "/sys/kernel/debug/kvm";

/// Time between two readings.
const MOMENT: Duration = Duration::from_secs(1);

/// Most counters that are shown.
const MAX_SHOWN: usize = 8;

/// Most counters and vCPUs that are read; KVM has some 60 of the first.
const MAX_ENTRIES: usize = 256;

/// The counters of a VM by their names; those of its vCPUs begin with `vcpuN/`.
type Counters = BTreeMap<String, u64>;

/// Returns the fastest counters of the VM of a vmm process, after a moment.
pub(super) async fn statistics(vmm: u32) -> Result<String, String> {
    statistics_in(Path::new(KVM), vmm, MOMENT).await
}

async fn statistics_in(kvm: &Path, vmm: u32, moment: Duration) -> Result<String, String> {
    let before = read(kvm, vmm)?;
    let start = Instant::now();
    sleep(moment).await;
    let after = read(kvm, vmm)?;
    Ok(rates(&before, &after, start.elapsed()))
}

fn read(kvm: &Path, vmm: u32) -> Result<Counters, String> {
    let prefix = format!("{vmm}-");
    let machines = fs::read_dir(kvm).map_err(|error| {
        format!(
            "cannot read {} ({error}); run doctor as root, with debugfs mounted, to see KVM's counters",
            kvm.display()
        )
    })?;
    let mut names = machines.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let name = names.find(|name| name.starts_with(&prefix)).ok_or("KVM has no counters for this VM")?;
    let mut counters = Counters::new();
    collect(&kvm.join(name), "", &mut counters);
    Ok(counters)
}

/// Reads the files of a directory, and of the vCPUs' directories in it.
fn collect(directory: &Path, prefix: &str, counters: &mut Counters) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten().take(MAX_ENTRIES) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if prefix.is_empty() && name.starts_with("vcpu") {
                collect(&entry.path(), &format!("{name}/"), counters);
            }
            continue;
        }
        let mut text = String::new();
        // Some files are tables and not numbers.
        let read = File::open(entry.path()).and_then(|file| file.take(64).read_to_string(&mut text));
        if let (Ok(_), Ok(value)) = (read, text.trim().parse()) {
            counters.insert(format!("{prefix}{name}"), value);
        }
    }
}

/// Describes how fast the counters grew.
fn rates(before: &Counters, after: &Counters, passed: Duration) -> String {
    let grew = after.iter().filter_map(|(name, value)| {
        let growth = value.checked_sub(*before.get(name)?)?;
        // Times are in nanoseconds and would outrun all counts.
        Some((growth, name)).filter(|(growth, name)| *growth > 0 && !name.ends_with("_ns"))
    });
    let mut grew: Vec<_> = grew.collect();
    if grew.is_empty() {
        return "no counter of KVM grew within a second".into();
    }
    grew.sort_unstable_by(|(one, name), (other, its)| other.cmp(one).then(name.cmp(its)));
    let second = |growth: u64| (growth as f64 / passed.as_secs_f64().max(0.001)).round();
    let shown: Vec<_> =
        grew.iter().take(MAX_SHOWN).map(|(growth, name)| format!("{name} {}", second(*growth))).collect();
    format!("each second: {}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(pairs: &[(&str, u64)]) -> Counters {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    #[test]
    fn the_fastest_counters_come_first_and_those_that_stand_still_not_at_all() {
        let before = counters(&[("exits", 100), ("irq_injections", 5), ("halt_wait_ns", 0), ("vcpu0/pf_guest", 10)]);
        let after = counters(&[
            ("exits", 2100),
            ("irq_injections", 5),
            ("halt_wait_ns", 1 << 40),
            ("vcpu0/pf_guest", 40_010),
            ("new", 9),
        ]);
        assert_eq!(rates(&before, &after, Duration::from_secs(2)), "each second: vcpu0/pf_guest 20000, exits 1000");
        assert_eq!(rates(&after, &after, Duration::from_secs(1)), "no counter of KVM grew within a second");
        // A VM that was started again has lower counters.
        assert!(rates(&after, &before, Duration::ZERO).starts_with("no counter"));
    }

    #[tokio::test]
    async fn the_counters_of_this_vm_and_its_vcpus_are_read_and_those_of_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        for (machine, exits) in [("17-12", "x"), ("7-12", "40\n"), ("77-12", "9\n")] {
            let vcpu = directory.path().join(machine).join("vcpu0");
            fs::create_dir_all(&vcpu).unwrap();
            fs::write(vcpu.join("exits"), exits).unwrap();
            fs::write(vcpu.join("lapic_timer_advance_table"), "a table\nof lines\n").unwrap();
            fs::write(directory.path().join(machine).join("pages_4k"), "12").unwrap();
        }
        assert_eq!(read(directory.path(), 7).unwrap(), counters(&[("pages_4k", 12), ("vcpu0/exits", 40)]));
        let told = statistics_in(directory.path(), 7, Duration::from_millis(1)).await.unwrap();
        assert_eq!(told, "no counter of KVM grew within a second");
        assert_eq!(read(directory.path(), 8).unwrap_err(), "KVM has no counters for this VM");
        assert!(read(Path::new("/nowhere"), 7).unwrap_err().contains("as root"));
    }
}
