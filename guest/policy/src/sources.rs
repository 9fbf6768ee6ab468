//! Sources of bind mounts.
