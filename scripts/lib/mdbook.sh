# mdBook, which makes the book of docs/. Sourced after common.sh and rust.sh.
# shellcheck shell=bash

# The version of mdBook, which is built once into the cache.
readonly MDBOOK=0.5.4

# has_mdbook: builds mdBook unless it is there; fails if it cannot be built. Without its server, and without optimisation:
# the book takes a second, the compiler several minutes.
has_mdbook() { cargo_tool mdbook "$MDBOOK" --debug --no-default-features --features search; }

# build_book DIRECTORY: makes the book there, in place of what the directory has; fails if mdBook has a warning.
build_book() {
    local output
    output=$("$BULKHEAD_CACHE/tools/mdbook-$MDBOOK/bin/mdbook" build --dest-dir "$1" "$BULKHEAD_REPO/docs" 2>&1) ||
        die "mdBook cannot make the book: $output"
    if grep -E 'WARN|ERROR' <<<"$output" >&2; then
        die "mdBook has warnings, see above"
    fi
}
