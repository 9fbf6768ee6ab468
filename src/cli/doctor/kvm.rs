//! KVM's counters in words.

use std::collections::BTreeMap;

/// Most counters that are shown.
const MAX_SHOWN: usize = 8;

/// Describes the counters that grow fastest. `rates` are those of an examination: for each name one number for the VM,
/// or one for each vCPU.
pub(super) fn describe(rates: &BTreeMap<String, Vec<u64>>, vcpus: usize) -> String {
    if rates.is_empty() {
        return "this kernel shows programs no counters of KVM; Linux 5.15 and later do".into();
    }
    let of_vcpus = |values: &[u64]| values.len() == vcpus;
    let mut grew: Vec<(u64, String)> = Vec::new();
    for (name, values) in rates {
        for (index, rate) in values.iter().enumerate().filter(|(_, rate)| **rate > 0) {
            // A single vCPU needs no number.
            let prefix = if of_vcpus(values) && vcpus > 1 { format!("vcpu{index}/") } else { String::new() };
            grew.push((*rate, prefix + name));
        }
    }
    if grew.is_empty() {
        return "no counter of KVM grew".into();
    }
    grew.sort_unstable_by(|(one, name), (other, its)| other.cmp(one).then(name.cmp(its)));
    let shown: Vec<_> = grew.iter().take(MAX_SHOWN).map(|(rate, name)| format!("{name} {rate}")).collect();
    format!("each second: {}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_counters_come_first_and_those_that_stand_still_not_at_all() {
        let rates = |exits: &[u64]| {
            BTreeMap::from([
                ("exits".to_owned(), exits.to_vec()),
                ("irq_injections".to_owned(), vec![0; exits.len()]),
                ("remote_tlb_flush".to_owned(), vec![30]),
            ])
        };
        assert_eq!(describe(&rates(&[20_000]), 1), "each second: exits 20000, remote_tlb_flush 30");
        assert_eq!(
            describe(&rates(&[1000, 20_000]), 2),
            "each second: vcpu1/exits 20000, vcpu0/exits 1000, remote_tlb_flush 30"
        );
        assert_eq!(describe(&BTreeMap::from([("exits".to_owned(), vec![0, 0])]), 2), "no counter of KVM grew");
        assert!(describe(&BTreeMap::new(), 0).contains("5.15"));
    }
}
