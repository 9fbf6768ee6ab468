//! `/sys/devices/virtual/dmi/id/product_uuid`.

/// Number of characters kept of the VM's UUID.
const KEPT: usize = 24;

/// The VM's UUID with the last group replaced by the start of the container's id.
pub(super) fn uuid(machine: &str, id: &str) -> String {
    let machine = machine.trim();
    // ASCII only, so that the slice below is at a character boundary.
    let is_uuid = machine.len() == 36 && machine.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    let kept = if is_uuid { &machine[..KEPT] } else { "00000000-0000-0000-0000-" };
    let plain = id.len() >= 12 && id.bytes().take(12).all(|byte| byte.is_ascii_hexdigit());
    if plain { format!("{kept}{}\n", &id[..12]) } else { format!("{kept}{:012x}\n", digest(id)) }
}

/// 48 bits of FNV-1a, for ids that are not hexadecimal (`docker run` makes hexadecimal ones, BuildKit others).
fn digest(id: &str) -> u64 {
    let all = id
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    all & 0xffff_ffff_ffff
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_group_is_the_containers() {
        let machine = "11111111-2222-3333-4444-555555555555\n";
        assert_eq!(uuid(machine, "0123456789abcdef"), "11111111-2222-3333-4444-0123456789ab\n");
        assert_eq!(uuid("", "0123456789abcdef"), "00000000-0000-0000-0000-0123456789ab\n");
    }

    proptest! {
        #[test]
        fn it_is_always_a_uuid(machine in "\\PC{0,40}", id in "\\PC{0,40}") {
            let text = uuid(&machine, &id);
            prop_assert_eq!(text.len(), 37);
            prop_assert_eq!(text.trim().split('-').map(str::len).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        }
    }
}
