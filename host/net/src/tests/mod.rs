//! Tests of several files together, from one queue up to the whole process with this machine's kernel as the guest.

mod driver;
mod event_loop;
mod frontend;
mod kernel;
mod ring;
mod sender;
mod stack;
mod window;
