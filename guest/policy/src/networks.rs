//! Networks: parents, addresses and driver options.
