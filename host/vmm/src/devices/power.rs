//! ACPI reset register, and the sleep registers of the hardware-reduced form (ACPI 6.5, 4.8.3.6 and 4.8.3.7). The FADT
//! has their addresses.

use crate::{api::ExitReason, bus::BusDevice, exit::ExitSignal};

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const RESET: u16 = 2;
/// Length of the register block in bytes.
pub const LEN: u64 = 3;
/// Value that the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of soft off, which `_S5_` in the DSDT contains.
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The register block.
pub struct Power {
    exit: ExitSignal,
}

impl Power {
    /// Creates registers that end the machine through `exit`.
    pub fn new(exit: ExitSignal) -> Self {
        Self { exit }
    }
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // The sleep status register has one bit, WAK_STS, which is set only after sleep.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        // SLP_EN starts the transition that SLP_TYP selects. Values without it, and other sleep types, change nothing.
        if offset == u64::from(SLEEP_CONTROL)
            && value & SLEEP_ENABLE != 0
            && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_OFF
        {
            self.exit.raise(ExitReason::PowerOff);
        } else if offset == u64::from(RESET) && value == RESET_VALUE {
            self.exit.raise(ExitReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(offset: u16, data: &[u8]) -> Option<ExitReason> {
        let exit = ExitSignal::new().unwrap();
        Power::new(exit.clone()).write(u64::from(offset), data);
        exit.take()
    }

    #[test]
    fn only_soft_off_and_the_reset_value_end_the_machine() {
        assert_eq!(after(SLEEP_CONTROL, &[5 << 2 | 1 << 5]), Some(ExitReason::PowerOff));
        assert_eq!(after(RESET, &[RESET_VALUE]), Some(ExitReason::Reset));
        for (offset, data) in [
            (SLEEP_CONTROL, &[5 << 2][..]),
            (SLEEP_CONTROL, &[3 << 2 | 1 << 5]),
            (RESET, &[0]),
            (RESET, &[1, 1]),
            (SLEEP_STATUS, &[0xff]),
        ] {
            assert_eq!(after(offset, data), None, "{offset} {data:?}");
        }
    }
}
