//! Tests of the device, one file for each of its parts.

mod connection;
mod credit;
mod device;
mod driver;
mod echo;
mod exchange;
mod hybrid;
mod machine;
mod model;
mod muxer;
mod packet;
mod segments;
mod wakeups;
