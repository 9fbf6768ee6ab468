//! Volumes: drivers and their options.
