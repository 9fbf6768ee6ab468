//! Names of drivers: volumes, networks, address management, logs.
