# Finds a Rust toolchain that is new enough for this workspace. Sourced after common.sh.
# shellcheck shell=bash

# need_rust: makes sure that PATH has a cargo of at least the workspace's rust-version, or prints the command that
# installs one.
need_rust() {
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$BULKHEAD_REPO/Cargo.toml" | head -n 1)
    if ! command -v cargo >/dev/null; then
        # Debian's own is new enough from forky on; older releases need rustup.
        local candidate
        candidate=$(apt-cache policy cargo 2>/dev/null | sed -n 's/^  Candidate: //p')
        if [[ -n $candidate ]] && dpkg --compare-versions "$candidate" ge "$wanted"; then
            need_packages cargo rustc rust-clippy rustfmt gcc
        else
            die "cargo $wanted or newer is needed; see https://rustup.rs, then: rustup toolchain install stable"
        fi
    fi
    have=$(cargo --version | cut -d' ' -f2)
    dpkg --compare-versions "$have" ge "$wanted" ||
        die "cargo $wanted or newer is needed, this is $have; run: rustup toolchain install stable"
    need_packages gcc libc6-dev
}

# remap_options: prints rustc's options that leave no directory of this machine in a program that others get.
remap_options() {
    echo "--remap-path-prefix=$BULKHEAD_REPO=/usr/src/bulkhead --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/usr/share/cargo"
}

# The target of programs for systems that have no libraries, or others.
readonly STATIC_TARGET=x86_64-unknown-linux-gnu

# static_programs: prints the directory in which `cargo_static` builds.
static_programs() { echo "${CARGO_TARGET_DIR:-$BULKHEAD_REPO/target}/$STATIC_TARGET/release"; }

# cargo_static OPTION…: builds statically linked programs, with these options of `cargo build`.
cargo_static() {
    env -u CARGO_ENCODED_RUSTFLAGS RUSTFLAGS="-C target-feature=+crt-static $(remap_options)" \
        cargo build --quiet --release --target "$STATIC_TARGET" "$@"
}

# cargo_tool CRATE VERSION [OPTION…]: builds a program of crates.io, with these options of `cargo install`, into
# BULKHEAD_CACHE/tools/CRATE-VERSION unless it is there; fails if it cannot be built.
cargo_tool() { locked "$1" install_tool "$@"; }

install_tool() {
    local crate=$1 version=$2 root=$BULKHEAD_CACHE/tools/$1-$2
    shift 2
    [[ ! -x $root/bin/$crate ]] || return 0
    with_progress "building $crate $version (a few minutes)" "$BULKHEAD_CACHE/log/$crate.log" \
        nice cargo install --locked "$@" --root "$root" "$crate@$version"
}
