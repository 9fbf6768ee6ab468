//! Options of dockerd that a user may set.
