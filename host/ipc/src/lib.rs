//! The boundary between the host's processes: control channels, inherited descriptors, error reports and confinement.

pub mod channel;
pub mod inherited;
pub mod report;
pub mod sandbox;
