//! Judges writes to sysctls, and their effect beyond the container: none, or raising the VM's value up to a ceiling.
//!
//! Each container's root may write, so a text is anything. It never reaches the kernel: the VM's value is written as a
//! number that was parsed here.

/// Maximum length of a value's text in bytes.
pub(crate) const MAX_TEXT: usize = 256;

/// The form of a value: whole numbers on one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Numbers {
    /// Maximum number of numbers.
    pub(crate) count: usize,
    pub(crate) low: i64,
    pub(crate) high: i64,
}

/// The rule for writes to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// The value stays in the container.
    PerContainer(Numbers),
    /// The value stays in the container, and raises the VM's when that is lower.
    Raise {
        low: i64,
        /// Highest value that the VM gets; the container may read a higher one.
        ceiling: Ceiling,
    },
}

/// The highest value to which a container raises one of the VM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ceiling {
    Fixed(i64),
    /// A number of objects whose memory the kernel charges to no container: as many as fit into a part of the VM's
    /// memory, and never more than `most`.
    ByMemory {
        /// Memory of one object, in bytes.
        each: u64,
        most: i64,
    },
}

/// The part of the VM's memory that the objects of one table may take: one in this many bytes.
const SHARE: u64 = 16;

impl Ceiling {
    /// Returns the value in a VM with so many bytes of memory.
    pub(crate) fn value(self, memory: u64) -> i64 {
        match self {
            Self::Fixed(value) => value,
            Self::ByMemory { each, most } => i64::try_from(memory / SHARE / each.max(1)).unwrap_or(most).min(most),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// The container's new value, without the final newline.
    pub(crate) text: String,
    /// Value that the VM must have at least.
    pub(crate) raise: Option<i64>,
}

impl Rule {
    /// Judges a write in a VM with `memory` bytes; `None` is the kernel's `EINVAL`. `current` is the container's
    /// present value.
    pub(crate) fn judge(self, data: &[u8], current: &str, memory: u64) -> Option<Written> {
        // One byte more than the maximum shows that a text is too long.
        let text = std::str::from_utf8(data.get(..data.len().min(MAX_TEXT + 1))?).ok()?;
        // Some programs write the final zero of their string, and `echo` a newline.
        let text = text.trim_end_matches('\0').trim_matches([' ', '\t', '\n']);
        if text.len() > MAX_TEXT || text.is_empty() || text.contains(['\n', '\0']) {
            return None;
        }
        match self {
            Self::PerContainer(shape) => {
                Some(Written { text: join(&numbers(text, shape)?, current, shape.count), raise: None })
            }
            Self::Raise { low, ceiling } => {
                // A value beyond the ceiling is accepted, as the kernel would; the program reads it back, and the VM
                // stays within its memory.
                let number = numbers(text, Numbers { count: 1, low, high: i64::MAX })?[0];
                Some(Written { text: number.to_string(), raise: Some(number.min(ceiling.value(memory))) })
            }
        }
    }
}

fn numbers(text: &str, shape: Numbers) -> Option<Vec<i64>> {
    let numbers: Vec<_> = text.split_ascii_whitespace().map(number).collect::<Option<_>>()?;
    let fits = (1..=shape.count).contains(&numbers.len());
    (fits && numbers.iter().all(|number| (shape.low..=shape.high).contains(number))).then_some(numbers)
}

/// Parses a number as the kernel does (`proc_get_long`): decimal, hexadecimal after `0x`, or octal after a zero.
fn number(text: &str) -> Option<i64> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let magnitude = if let Some(hexadecimal) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        digits_in(hexadecimal, 16)?
    } else if digits.len() > 1 && digits.starts_with('0') {
        digits_in(digits, 8)?
    } else {
        digits_in(digits, 10)?
    };
    if negative { 0_i64.checked_sub_unsigned(magnitude) } else { i64::try_from(magnitude).ok() }
}

/// Parses digits only; the standard library would accept a sign.
fn digits_in(text: &str, radix: u32) -> Option<u64> {
    text.chars().all(|digit| digit.is_digit(radix)).then(|| u64::from_str_radix(text, radix).ok())?
}

/// The numbers in the form in which they are read. Those that the write left out keep their value.
fn join(numbers: &[i64], current: &str, max: usize) -> String {
    let mut words: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    let left_out = current.split_ascii_whitespace().take(max).skip(words.len());
    words.extend(left_out.map(ToOwned::to_owned));
    words.join("\t")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLAG: Rule = Rule::PerContainer(Numbers { count: 1, low: 0, high: 1 });
    const FOUR: Rule = Rule::PerContainer(Numbers { count: 4, low: 0, high: 100 });

    fn text(rule: Rule, data: &str) -> Option<String> {
        rule.judge(data.as_bytes(), "7\t4\t1\t7", 0).map(|written| written.text)
    }

    #[test]
    fn numbers_are_read_as_the_kernel_reads_them() {
        for (given, number) in [("1\n", 1), ("0x1f", 31), ("017", 15), ("-5", -5), ("0", 0), (" 7 \0", 7)] {
            let any = Rule::PerContainer(Numbers { count: 1, low: i64::MIN, high: i64::MAX });
            assert_eq!(any.judge(given.as_bytes(), "0", 0).unwrap().text, number.to_string(), "{given:?}");
        }
        for wrong in ["", "\n", "x", "1x", "--1", "+1", "0x", "1 2", "99999999999999999999", "1\n2", "08"] {
            assert_eq!(text(FLAG, wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        assert_eq!(text(FLAG, "2"), None);
        assert_eq!(text(FLAG, "-1"), None);
    }

    #[test]
    fn numbers_that_a_write_leaves_out_stay() {
        assert_eq!(text(FOUR, "3").unwrap(), "3\t4\t1\t7");
        assert_eq!(text(FOUR, "3 3 3 3").unwrap(), "3\t3\t3\t3");
        assert_eq!(text(FOUR, "3 3 3 3 3"), None);
    }

    #[test]
    fn the_vm_is_raised_to_the_ceiling_at_most() {
        let rule = Rule::Raise { low: 0, ceiling: Ceiling::Fixed(1000) };
        assert_eq!(rule.judge(b"500", "10", 0), Some(Written { text: "500".into(), raise: Some(500) }));
        assert_eq!(rule.judge(b"5000", "10", 0), Some(Written { text: "5000".into(), raise: Some(1000) }));
    }

    #[test]
    fn what_no_container_is_charged_for_is_bounded_by_the_vms_memory() {
        let entries = Ceiling::ByMemory { each: 512, most: 1 << 22 };
        let gib = 1_u64 << 30;
        assert_eq!([1, 4, 16, 1024].map(|memory| entries.value(memory * gib)), [1 << 17, 1 << 19, 1 << 21, 1 << 22]);
        assert_eq!((entries.value(0), entries.value(u64::MAX)), (0, 1 << 22));
        let rule = Rule::Raise { low: 0, ceiling: entries };
        let written = rule.judge(b"4194304", "65536", 4 * gib);
        assert_eq!(written, Some(Written { text: "4194304".into(), raise: Some(1 << 19) }));
    }

    proptest! {
        #[test]
        fn objects_take_their_share_of_any_memory_at_most(memory: u64, each in 0..1_u64 << 20, most in 0..i64::MAX) {
            let number = Ceiling::ByMemory { each, most }.value(memory);
            prop_assert!((0..=most).contains(&number));
            prop_assert!(u128::from(number.unsigned_abs()) * u128::from(each) <= u128::from(memory / SHARE));
        }

        #[test]
        fn no_write_panics_and_what_is_accepted_is_short_and_accepted_again(data in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..400),
            "[0-9 \\t\\n-]{0,30}".prop_map(String::into_bytes),
        ], current in "[0-9\\t]{0,20}") {
            for rule in [FLAG, FOUR, Rule::Raise { low: 0, ceiling: Ceiling::Fixed(9) }] {
                if let Some(written) = rule.judge(&data, &current, 0) {
                    prop_assert!(written.text.len() <= 2 * MAX_TEXT && !written.text.contains('\n'));
                    prop_assert!(written.raise.is_none_or(|raise| (0..=9).contains(&raise)));
                    if rule != FOUR {
                        prop_assert_eq!(rule.judge(written.text.as_bytes(), &current, 0).unwrap().text, written.text);
                    }
                }
            }
        }
    }
}
