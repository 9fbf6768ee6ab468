# mdBook, which makes the book of docs/. Sourced after common.sh.
# shellcheck shell=bash

# The version of mdBook, which is built once into the cache.
readonly MDBOOK=0.5.4
readonly MDBOOK_ROOT=$BULKHEAD_CACHE/tools/mdbook-$MDBOOK

build_mdbook() {
    [[ ! -x $MDBOOK_ROOT/bin/mdbook ]] || return 0
    # Without its server, and without optimisation: the book takes a second, the compiler several minutes.
    with_progress "building mdBook $MDBOOK (a few minutes)" "$BULKHEAD_CACHE/log/mdbook.log" nice cargo install \
        --locked --debug --no-default-features --features search --root "$MDBOOK_ROOT" "mdbook@$MDBOOK"
}

# has_mdbook: builds mdBook unless it is there; fails if it cannot be built.
has_mdbook() { locked mdbook build_mdbook; }

# build_book DIRECTORY: makes the book there, in place of what the directory has; fails if mdBook has a warning.
build_book() {
    local output
    output=$("$MDBOOK_ROOT/bin/mdbook" build --dest-dir "$1" "$BULKHEAD_REPO/docs" 2>&1) ||
        die "mdBook cannot make the book: $output"
    if grep -E 'WARN|ERROR' <<<"$output" >&2; then
        die "mdBook has warnings, see above"
    fi
}
