//! Settings of a container that reach beyond it: limits, cgroup, OOM score, annotations, hooks.
