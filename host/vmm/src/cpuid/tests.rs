//! The leaves of real processors, as KVM lists them there, and those that a guest sees.

use super::*;

/// Leaf, sub-leaf, EAX, EBX, ECX, EDX.
type Row = (u32, u32, [u32; 4]);

/// A 12th-generation Core with a hybrid topology, and Xeons alike: counters in leaf 0xa, a third level shared by 64
/// IDs.
const INTEL: &[Row] = &[
    (0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
    (1, 0, [0x0009_0672, 0x0680_0800, 0x7ffa_fbbf, 0xbfeb_fbff]),
    (4, 0, [0xfc00_4121, 0x02c0_003f, 0x0000_003f, 0]),
    (4, 1, [0xfc00_4122, 0x01c0_003f, 0x0000_003f, 0]),
    (4, 2, [0xfc01_c143, 0x0240_003f, 0x0000_07ff, 0]),
    (4, 3, [0xfc1f_c163, 0x0240_003f, 0x0000_9fff, 4]),
    (4, 4, [0; 4]),
    (0xa, 0, [0x0730_0605, 0, 7, 0x8603]),
    (0xb, 0, [1, 2, 0x100, 6]),
    (0x1f, 0, [1, 2, 0x100, 6]),
    (0x23, 0, [0xf, 0, 0, 0]),
    (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
    (0x8000_0008, 0, [0x0000_302e, 0, 0, 0]),
];

/// A Zen 4 desktop processor: two complexes of eight cores with two threads, 16 IDs share a third level.
const AMD: &[Row] = &[
    (0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
    (1, 0, [0x00a6_0f12, 0x0620_0800, 0x7ef8_320b, 0x178b_fbff]),
    (0xb, 0, [1, 2, 0x100, 6]),
    (0x8000_0000, 0, [0x8000_0028, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
    (0x8000_0001, 0, [0x00a6_0f12, 0, 0x75c2_37ff, 0x2fd3_fbff]),
    (0x8000_0008, 0, [0x0000_3030, 0x791e_f257, 0x0000_501f, 0x0001_0000]),
    (0x8000_001d, 0, [0x0000_4121, 0x01c0_003f, 0x3f, 0]),
    (0x8000_001d, 1, [0x0000_4122, 0x01c0_003f, 0x3f, 0]),
    (0x8000_001d, 2, [0x0000_4143, 0x01c0_003f, 0x7ff, 2]),
    (0x8000_001d, 3, [0x0003_c163, 0x03c0_003f, 0x7fff, 9]),
    (0x8000_001d, 4, [0; 4]),
    (0x8000_001e, 0, [6, 0x103, 0, 0]),
    (0x8000_0022, 0, [7, 0x1006, 0, 0]),
    (0x8000_0026, 0, [1, 2, 0x100, 6]),
];

/// Leaves of a processor that calls itself `Test`.
const NAME: &[Row] = &[(0x8000_0002, 0, [0x7473_6554, 0, 0, 0]), (0x8000_0003, 0, [0; 4]), (0x8000_0004, 0, [0; 4])];

fn entries(rows: &[Row]) -> Vec<kvm_cpuid_entry2> {
    let entry = |(function, index, [eax, ebx, ecx, edx]): &Row| kvm_cpuid_entry2 {
        function: *function,
        index: *index,
        eax: *eax,
        ebx: *ebx,
        ecx: *ecx,
        edx: *edx,
        ..Default::default()
    };
    rows.iter().map(entry).collect()
}

fn guest(host: &[Row], id: u8, cpus: u8) -> impl Fn(u32, u32) -> [u32; 4] {
    let shared = common(&entries(host), true, &entries(NAME)).unwrap();
    let cpuid = for_vcpu(&shared, id, cpus).unwrap();
    move |function, index| {
        let mut found = cpuid.as_slice().iter().filter(|e| (e.function, e.index) == (function, index));
        let leaf = found.next().map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
        assert!(found.next().is_none(), "{function:#x} is there twice");
        leaf
    }
}

#[test]
fn each_vcpu_has_its_own_apic_id_and_all_agree_on_the_topology() {
    for host in [INTEL, AMD] {
        for cpus in 1..=32 {
            for id in 0..cpus {
                let leaf = guest(host, id, cpus);
                assert_eq!(leaf(1, 0)[1] >> 24, u32::from(id));
                assert_eq!((leaf(0xb, 0)[3], leaf(0xb, 1)[3]), (u32::from(id), u32::from(id)));
                assert_eq!((leaf(0xb, 0)[..2].to_vec(), leaf(0xb, 1)[1]), (vec![0, 1], u32::from(cpus)));
                assert!(u32::from(cpus) <= 1 << leaf(0xb, 1)[0]);
                assert_eq!((leaf(0x1f, 0), leaf(0x8000_0026, 0)), ([0; 4], [0; 4]));
            }
        }
    }
}

#[test]
fn an_intel_guest_shares_the_last_level_among_all_vcpus_and_no_other() {
    let caches = |cpus| [0, 1, 2, 3, 4].map(|index| guest(INTEL, 0, cpus)(4, index)[0]);
    assert_eq!(caches(1), [0x121, 0x122, 0x143, 0x163, 0]);
    assert_eq!(caches(4), [0x0c00_0121, 0x0c00_0122, 0x0c00_0143, 0x0c00_c163, 0]);
    assert_eq!(caches(6), [0x1c00_0121, 0x1c00_0122, 0x1c00_0143, 0x1c01_c163, 0]);
    assert_eq!(caches(32), [0x7c00_0121, 0x7c00_0122, 0x7c00_0143, 0x7c07_c163, 0]);
}

#[test]
fn an_amd_guest_shares_the_last_level_among_all_vcpus_and_no_other() {
    let caches = |cpus| [0, 1, 2, 3, 4].map(|index| guest(AMD, 0, cpus)(0x8000_001d, index)[0]);
    assert_eq!(caches(1), [0x121, 0x122, 0x143, 0x163, 0]);
    assert_eq!(caches(4), [0x121, 0x122, 0x143, 0xc163, 0]);
    assert_eq!(caches(6), [0x121, 0x122, 0x143, 0x1c163, 0]);
    assert_eq!(caches(32), [0x121, 0x122, 0x143, 0x7c163, 0]);
}

#[test]
fn cores_are_counted_where_each_vendor_looks_for_them_and_reserved_bits_stay_clear() {
    let amd = guest(AMD, 5, 6);
    assert_eq!(amd(0x8000_0008, 0), [0x3030, 0x791e_f257, 0x3005, 0x0001_0000]);
    assert_eq!(amd(0x8000_001e, 0), [5, 5, 0, 0]);
    assert_eq!((amd(0x8000_0001, 0)[2] & 2, guest(AMD, 0, 1)(0x8000_0001, 0)[2] & 2), (2, 0));
    let intel = guest(INTEL, 5, 6);
    assert_eq!(intel(0x8000_0008, 0), [0x302e, 0, 0, 0]);
    assert_eq!((intel(1, 0)[1], intel(1, 0)[3] >> 28 & 1), (0x0508_0800, 1));
    assert_eq!(guest(INTEL, 0, 1)(1, 0)[3] >> 28 & 1, 0);
}

#[test]
fn a_guest_sees_no_performance_counters_and_no_nested_virtualization() {
    let intel = guest(INTEL, 0, 1);
    assert_eq!((intel(0xa, 0), intel(0x23, 0)), ([0; 4], [0; 4]));
    assert_eq!(intel(1, 0)[2] & (1 << 5 | 1 << 15), 0);
    let amd = guest(AMD, 0, 1);
    assert_eq!(amd(0x8000_0022, 0), [0; 4]);
    assert_eq!(amd(0x8000_0001, 0)[2] & (1 << 2 | 1 << 23 | 1 << 24 | 1 << 28), 0);
}

#[test]
fn a_guest_sees_the_name_of_the_hosts_processor() {
    for host in [INTEL, AMD] {
        let leaf = guest(host, 0, 1);
        assert_eq!(leaf(0x8000_0002, 0)[0].to_le_bytes(), *b"Test");
        assert!(leaf(0x8000_0000, 0)[0] >= 0x8000_0004);
    }
}

#[test]
fn an_unknown_vendor_keeps_its_own_leaves() {
    let rows: Vec<Row> = INTEL[1..].iter().copied().chain([(0, 0, [0x20, 1, 2, 3])]).collect();
    assert_eq!(guest(&rows, 0, 4)(4, 3)[0], 0xfc1f_c163);
}
