//! Log drivers and their options.
