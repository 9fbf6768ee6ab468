//! TCP. Each connection of the guest ends here, at smoltcp, and continues as a socket of this process.
//!
//! # Connections
//!
//! A SYN of the guest makes the host's connection first, so that the guest sees a refusal as a refusal. Then a smoltcp
//! socket with an interface of its own plays the far end. Half-close and resets pass both ways; urgent data is passed
//! on as ordinary data.
//!
//! # Data from the guest
//!
//! goes to the host's socket from where the guest has put it (`bulk`), as long as that socket has room: one copy. What is
//! left, and every segment that means more than its data, goes through smoltcp's receive buffer: three copies.
//!
//! # Data to the guest
//!
//! does not go through smoltcp. It stays in the host's socket until the guest has acknowledged it. Each segment is a
//! peek (`MSG_PEEK` at `SO_PEEK_OFF`) that the kernel writes into the guest's buffers, with headers before it: one
//! copy, one system call for up to 64 KiB, and nothing held here. Lost data is peeked at again: at once after duplicate
//! acknowledgements or when a window reopens that had closed over it, else after 1 to 4 s. smoltcp opens and closes the
//! connection and receives; its sequence numbers are shifted on the way.
//!
//! On a host before Linux 6.9 (6.11 for IPv6), over TCP to the name server, and for a guest without segmentation
//! offload, the data goes through smoltcp's buffers instead: three copies.
//!
//! # Files
//!
//! | File         | Contents                                                                                   |
//! |--------------|--------------------------------------------------------------------------------------------|
//! | `flow`       | one connection: both ends, their states, and the moving of data between them               |
//! | `guest`      | the end towards the guest: smoltcp's socket                                                |
//! | `host`       | the end towards the world: a non-blocking socket                                           |
//! | `bulk`       | data from the guest that does not go through smoltcp                                       |
//! | `sender`     | data to the guest: peeks, and sequence numbers between smoltcp and the guest               |
//! | `retransmit` | lost segments: what is sent next, duplicate acknowledgements, timers, repeated FINs        |
//! | `window`     | a window that closes over data in flight, for connections whose data goes through smoltcp  |
//! | `listeners`  | published ports: accepting clients                                                         |
//!
//! # smoltcp's gaps
//!
//! Filled here are three of them: a container that remembers an earlier connection of the same two ends gets another
//! SYN at once (`guest`), a FIN whose acknowledgement is overdue is repeated (`retransmit`), and a window that closes
//! over data in flight is shown as the smallest one (`window`).

pub(crate) mod bulk;
pub(crate) mod flow;
mod guest;
mod host;
pub(crate) mod listeners;
mod retransmit;
pub(crate) mod sender;
mod window;
