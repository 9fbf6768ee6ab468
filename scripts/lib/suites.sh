# The kinds of tests and how each of them runs. Sourced by scripts/test after common.sh, rust.sh, target.sh and mdbook.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the lists are for scripts/test

target_dir=${CARGO_TARGET_DIR:-$BULKHEAD_REPO/target}
source "$BULKHEAD_REPO/scripts/lib/ecosystem.sh"

# In this order they run one after the other.
readonly KINDS=(style unit package dashboard bundles kvm linux intel e2e escapes network isolation ecosystem)

# The kinds that boot guests, longest first: two machines that share such a list end at about the same time.
readonly VM_KINDS=(isolation ecosystem e2e network escapes intel linux kvm)

# A kind that takes as long as half of the others is run in parts for that, of the tests whose names begin so.
declare -rA PARTS=([isolation]="rows:: as_with_runc:: cost::")

declare -rA DESCRIPTIONS=(
    [style]="rustfmt, clippy, shellcheck, the words of comments, the documents and the rules for dependencies"
    [unit]="unit and property tests, and the host program as far as it goes without a VM"
    [package]="the Debian package in a clean Debian: its parts, an upgrade, a removal; engines from it"
    [dashboard]="the desktop's page in Chromium, without a VM"
    [bundles]="the isolating runtime with crun on this kernel, as root and without a VM"
    [kvm]="guests of a few instructions on any /dev/kvm"
    [linux]="the guest kernel, without a root file system"
    [intel]="the guest kernel and the README's checks in the emulated Intel machine"
    [e2e]="docker and the whole product"
    [escapes]="attempts to get out of a container, with isolation on and off"
    [network]="the VM's network, published ports, proxies, compose"
    [isolation]="each row of docs/isolation.md, and docker with isolation on and off"
    [ecosystem]="clients in other languages, plugins of docker, docker over SSH, Dev Containers"
)

# The integration test of the package `bulkhead` behind a kind. The kind ecosystem has programs in other languages.
declare -rA TESTS=(
    [kvm]=bare_metal [linux]=linux_guest [intel]=linux_guest [e2e]=e2e [escapes]=escapes [network]=network
    [isolation]=isolation
)

# The images of tests/images that a kind loads.
declare -rA IMAGES=(
    [bundles]="alpine" [intel]="alpine" [e2e]="alpine debian docker" [escapes]="alpine" [network]="alpine debian"
    [isolation]="alpine debian docker dind systemd servers" [ecosystem]="alpine debian docker builder node databases remote"
)

# Debian packages whose programs a kind runs on the target; the emulated machine has all of them.
declare -rA PACKAGES=(
    [e2e]="socat" [network]="docker-registry openssl" [isolation]="docker-registry python3-docker"
    [ecosystem]="curl docker-buildx docker-compose kind openssh-server"
)

# Set by scripts/test: substrings of test names, whether the tests of tests/all-only.list are left out, and whether the
# emulated machines run on.
NAMES=()
CUT=
KEEP=

# is_named TEXT: whether TEXT contains one of NAMES, or NAMES is empty.
is_named() {
    local name
    ((${#NAMES[@]})) || return 0
    for name in "${NAMES[@]}"; do
        [[ $1 == *"$name"* ]] && return 0
    done
    return 1
}

# named TEXT…: prints those that contain one of NAMES, or all, one a line.
named() {
    local text
    for text in "$@"; do
        if is_named "$text"; then echo "$text"; fi
    done
}

# seconds_since MICROSECONDS: the time since then, as `12.3 s`.
seconds_since() {
    local tenths=$(((${EPOCHREALTIME/[.,]/} - $1) / 100000))
    printf '%d.%d s' $((tenths / 10)) $((tenths % 10))
}

# timed: copies libtest's output and adds to the line of each test the time since the one before, which is how long the
# test took: the suites run one test at a time.
timed() {
    local line last=${EPOCHREALTIME/[.,]/}
    while IFS= read -r line || [[ -n $line ]]; do
        if [[ $line =~ ^test\ .*\ \.\.\.\ (ok|FAILED)$ ]]; then
            line+=" ($(seconds_since "$last"))"
            last=${EPOCHREALTIME/[.,]/}
        fi
        printf '%s\n' "$line"
    done
}

# left_out KIND: prints the tests of tests/all-only.list, one a line, if CUT is set.
left_out() { [[ -z $CUT ]] || sed -n "s/^$1 \([^ ]*\).*/\1/p" "$BULKHEAD_REPO/tests/all-only.list"; }

# cut_options KIND: prints the options of libtest that leave out these tests.
cut_options() {
    local skipped
    mapfile -t skipped < <(left_out "$1")
    ((${#skipped[@]} == 0)) || echo "--exact ${skipped[*]/#/--skip=}"
}

# part_of BINARY KIND PART: prints the tests of one of PARTS, one a line.
part_of() { "$1" --list --ignored | sed -n "s/^\($3.*\): test$/\1/p" | { grep -vxFf <(left_out "$2") || true; }; }

# images_of KIND: prints the images that a run of KIND loads.
images_of() {
    # The kernel alone needs no images.
    [[ $1 != intel || $(intel_checks) == *engine* ]] || return 0
    echo "${IMAGES[$1]:-}"
}

# test_binary NAME: builds an integration test and prints its path. The package is not named: with --workspace cargo
# chooses the same features as for the kind unit, and what one kind has built is not built again for another.
test_binary() {
    cargo test --quiet --workspace --test "$1" --no-run --message-format=json |
        jq -r --arg name "$1" 'select(.reason == "compiler-artifact" and .target.name == $name) | .executable // empty'
}

# has_nextest: whether cargo-nextest is installed.
has_nextest() { cargo nextest --version >/dev/null 2>&1; }

# integration_tests [PACKAGE]: the names of the integration tests of the workspace, or of one package.
integration_tests() {
    cargo metadata --no-deps --format-version 1 | jq -r --arg package "${1:-}" \
        '.packages[] | select($package == "" or .name == $package) | .targets[] | select(.kind == ["test"]).name'
}

# --- style --------------------------------------------------------------------------------------------------------

readonly STYLE_CHECKS=(rustfmt words documents book clippy shellcheck dependencies deny)

check_rustfmt() {
    cargo fmt --all --check
    (cd fuzz && cargo fmt --check)
}

check_words() { scripts/lib/words; }

check_documents() { scripts/lib/documents; }

check_book() {
    if ! has_mdbook; then
        say "book: skipped: mdBook $MDBOOK could not be built (see above)"
        return 0
    fi
    build_book "$(realpath -m "$target_dir/book")"
}

check_clippy() {
    cargo clippy --quiet --workspace --all-targets -- -D warnings
    (cd fuzz && cargo clippy --quiet --no-default-features --target-dir "$target_dir" -- -D warnings)
}

check_shellcheck() {
    need_packages shellcheck
    # shellcheck disable=SC2046 # the names of our own scripts have no blanks
    shellcheck --severity=warning $(git ls-files | xargs grep -lE '^#!.*(bash|sh)$') scripts/lib/*.sh
}

check_dependencies() { scripts/lib/dependencies; }

# The version of cargo-deny, which is built once into the cache.
readonly CARGO_DENY=0.20.2

check_deny() {
    local deny
    if ! cargo_tool cargo-deny "$CARGO_DENY"; then
        say "deny: skipped: cargo-deny $CARGO_DENY could not be built (see above)"
        return 0
    fi
    deny=("$BULKHEAD_CACHE/tools/cargo-deny-$CARGO_DENY/bin/cargo-deny" --locked --log-level warn)
    "${deny[@]}" check bans licenses sources
    # The database of advisories is a repository on GitHub, which not every machine reaches.
    if timeout 60 "${deny[@]}" fetch db >/dev/null 2>&1; then
        "${deny[@]}" check advisories
    else
        say "deny: advisories skipped: their database cannot be fetched"
    fi
}

suite_style() {
    local check started
    for check in "${STYLE_CHECKS[@]}"; do
        is_named "$check" || continue
        started=${EPOCHREALTIME/[.,]/}
        "check_$check"
        say "$check: ok ($(seconds_since "$started"))"
    done
}

# --- unit ---------------------------------------------------------------------------------------------------------

suite_unit() {
    if has_nextest; then
        cargo nextest run --no-tests=pass --workspace --filterset 'not binary(bare_metal)' "${NAMES[@]}"
    else
        local targets
        # The guests of bare_metal need KVM; that is the kind `kvm`.
        mapfile -t targets < <(integration_tests | grep -vx bare_metal)
        cargo test --quiet --workspace --lib --bins --examples "${targets[@]/#/--test=}" -- "${NAMES[@]}"
    fi
    # These mount a FUSE tree, which root of a container may not.
    if [[ $EUID == 0 && -w /dev/fuse ]] && unshare --mount true 2>/dev/null; then
        local test binary
        for test in $(integration_tests bulkhead-procfs); do
            binary=$(test_binary "$test")
            (cd guest/procfs && timeout 600 "$binary" --ignored --test-threads=1 "${NAMES[@]}") | timed
        done
        timeout 600 cargo test --quiet --package bulkhead-share --lib -- --ignored "${NAMES[@]}" | timed
    else
        say "the tests that mount a FUSE tree are left out: they need root and /dev/fuse"
    fi
}

# --- package ------------------------------------------------------------------------------------------------------

suite_package() {
    cargo build --quiet --package bulkhead
    scripts/package --check --program "$target_dir/debug/bulkhead"
    # A start of its own.
    [[ -n $CUT ]] || package_engine
}

# package_engine: starts engines from the package that was made, on a machine that runs guests.
package_engine() {
    source "$BULKHEAD_REPO/scripts/lib/debian.sh"
    local base images deb
    base=$(debian_tar package-check "$BULKHEAD_REPO/packaging/check")
    images=$("$BULKHEAD_REPO/tests/images/build" alpine dind)
    choose_target "$target_dir/debug/bulkhead"
    if [[ $TARGET == emulated ]]; then
        export BULKHEAD_KVM_HOST_NAME=${BULKHEAD_KVM_HOST_NAME:-test}-package
        # A suite runs in a shell of its own.
        trap '[[ -n $KEEP ]] || machine --stop' EXIT
    fi
    deb=$(echo "$target_dir"/package/*.deb)
    on_target packaging/check/engine "$base" "$deb" "$images/alpine.tar"
    on_target packaging/check/container "$base" "$deb" "$images/alpine.tar" "$images/dind.tar"
}

# --- dashboard ----------------------------------------------------------------------------------------------------

readonly DASHBOARD_TESTS=$BULKHEAD_REPO/tests/dashboard/dashboard.test.mjs

# has_node: whether npm and a Node.js that Playwright runs on are installed. Debian 12 has an older one.
has_node() { command -v npm >/dev/null && (($(node -p 'parseInt(process.versions.node)' 2>/dev/null || echo 0) >= 20)); }

# npm_packages DIRECTORY: installs the packages of a lock file. Playwright has a browser of its own to offer, which is not
# used.
npm_packages() {
    (cd "$1" && PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 npm ci --ignore-scripts --no-audit --no-fund --silent)
}

suite_dashboard() {
    local patterns=() name
    if [[ -n $CUT && ! -x /usr/bin/chromium ]]; then
        say "the browser's tests are left out: Chromium is not installed (tests/all-only.list)"
        return 0
    fi
    if ! has_node; then
        say "the browser's tests are left out: they need npm and Node.js 20 or later"
        return 0
    fi
    need_packages chromium
    # This builds the host program, too.
    test_binary host >/dev/null
    for name in "${NAMES[@]}"; do patterns+=(--test-name-pattern "$name"); done
    npm_packages "$BULKHEAD_REPO/tests/dashboard"
    (
        cd "$BULKHEAD_REPO/tests/dashboard" || exit
        BULKHEAD_TEST_PROGRAM=$target_dir/debug/bulkhead timeout 900 \
            node --test --test-reporter spec "${patterns[@]}" "$DASHBOARD_TESTS"
    )
}

# --- bundles ------------------------------------------------------------------------------------------------------

# build_static PACKAGE: builds a program for images that have no libraries, and prints its path.
build_static() {
    cargo_static --package "$1"
    echo "$(static_programs)/$1"
}

suite_bundles() {
    source "$BULKHEAD_REPO/scripts/lib/debian.sh"
    ((EUID == 0)) || die "the kind 'bundles' mounts and makes containers on this machine and needs root"
    local binary options
    BULKHEAD_TEST_USERLAND=$(debian_tar rootfs "$BULKHEAD_REPO/guest/rootfs")
    BULKHEAD_TEST_DOCKERD=$("$BULKHEAD_REPO/guest/engine/build" "$BULKHEAD_TEST_USERLAND")/dockerd
    BULKHEAD_TEST_IMAGES=$("$BULKHEAD_REPO/tests/images/build" alpine)
    cargo build --quiet --package bulkhead-procfs --package bulkhead-init
    BULKHEAD_TEST_PROCFS=$target_dir/debug/bulkhead-procfs
    BULKHEAD_TEST_INIT=$target_dir/debug/bulkhead-init
    BULKHEAD_TEST_PROBE=$(build_static escape-probe)
    export BULKHEAD_TEST_USERLAND BULKHEAD_TEST_DOCKERD BULKHEAD_TEST_IMAGES BULKHEAD_TEST_PROCFS BULKHEAD_TEST_INIT
    export BULKHEAD_TEST_PROBE
    binary=$(test_binary bundles)
    read -ra options < <(cut_options bundles && echo)
    (cd guest/runtime && "$binary" --ignored --test-threads=1 --show-output "${options[@]}" "${NAMES[@]}") 2>&1 | timed
}

# --- suites that boot guests --------------------------------------------------------------------------------------

# prepare_guests KIND…: builds what the kinds need, from the host program to the test images, and chooses the target.
prepare_guests() {
    local kind images=()
    # This builds the host program, too.
    for kind in "$@"; do [[ -z ${TESTS[$kind]:-} ]] || test_binary "${TESTS[$kind]}" >/dev/null; done
    [[ " $* " != *" ecosystem "* ]] || cargo build --quiet --package bulkhead
    if [[ " $* " != " kvm " ]]; then
        BULKHEAD_KERNEL=$("$BULKHEAD_REPO/firmware/build" guest)
        export BULKHEAD_KERNEL
    fi
    for kind in "$@"; do
        read -ra images <<<"${images[*]} $(images_of "$kind")"
    done
    if ((${#images[@]})); then
        "$BULKHEAD_REPO/scripts/image"
        BULKHEAD_TEST_IMAGES=$("$BULKHEAD_REPO/tests/images/build" "${images[@]}")
        export BULKHEAD_TEST_IMAGES
    fi
    if [[ " $* " == *" escapes "* ]]; then
        BULKHEAD_TEST_PROBE=$(build_static escape-probe)
        export BULKHEAD_TEST_PROBE
    fi
    if [[ " $* " == *" e2e "* ]]; then
        BULKHEAD_TEST_POSIX=$(build_static posix-table)
        export BULKHEAD_TEST_POSIX
    fi
    if [[ " $* " == *" intel "* ]]; then "$BULKHEAD_REPO/scripts/kvm-host" --cpu intel --build >/dev/null; fi
    if [[ $* == intel ]]; then TARGET=emulated; else choose_target "$target_dir/debug/bulkhead"; fi
    if [[ $TARGET == here ]]; then
        # shellcheck disable=SC2046,SC2086 # lists of names
        need_packages $(for kind in "$@"; do echo ${PACKAGES[$kind]:-}; done)
    fi
}

# test_disk KIND: prints the path of a data disk with the images of KIND, or nothing where they are loaded as quickly: on
# hardware, and if there is only the smallest.
test_disk() {
    local images
    read -ra images <<<"${IMAGES[$1]:-}"
    [[ $TARGET == emulated && $EUID == 0 && ${#images[@]} -gt 1 ]] || return 0
    "$BULKHEAD_REPO/tests/disk/build" "${images[@]}" || say "the suite $1 loads its images itself"
}

# suite_vm KIND [PART]: runs an integration test on the target, or one of its PARTS.
suite_vm() {
    local kind=$1 part=${2:-} binary options=() tests output base run failed attempt status
    if [[ $kind == intel ]]; then suite_intel; return; fi
    if [[ $kind == ecosystem ]]; then suite_ecosystem; return; fi
    binary=$(test_binary "${TESTS[$kind]}")
    # A plain `cargo test` works everywhere, so the tests that need more than any KVM are marked as ignored.
    [[ $kind == kvm ]] || options+=(--ignored)
    # The tables of these are what one wants to see.
    case $kind in escapes | isolation) options+=(--show-output) ;; esac
    # In the target directory, which the emulated machine may write.
    if [[ $kind == isolation ]]; then export BULKHEAD_TEST_REPORT=$target_dir/isolation-report; fi
    if [[ -n $part ]]; then
        mapfile -t tests < <(part_of "$binary" "$kind" "$part")
        # Without a name libtest would run them all.
        ((${#tests[@]})) || return 0
        options+=(--exact "${tests[@]}")
    else
        read -ra options <<<"${options[*]} $(cut_options "$kind")"
    fi
    BULKHEAD_TEST_DISK=$(test_disk "$kind")
    export BULKHEAD_TEST_DISK
    # shellcheck disable=SC2030 # for this suite only
    if [[ $kind == kvm && -w /dev/kvm ]]; then TARGET=here; fi
    output=$(mktemp)
    base=(on_target "$binary" --test-threads=1 "${options[@]}")
    run=("${base[@]}" "${NAMES[@]}")
    # The emulated machine is QEMU's code, not ours. When it ends or hangs by itself, which is rare, the suite has shown
    # nothing about Bulkhead and runs once more in a new one. Its SVM has been seen to lose a guest's state, which ends
    # the VM by a triple fault, or its interrupts, which makes it hang (the tests' report tells that from a guest that
    # hangs by itself): the tests that failed then run once more. Either may happen twice. No other test that fails runs
    # again.
    for attempt in 1 2 3; do
        status=0
        "${run[@]}" 2>&1 | tee "$output" | timed || status=$?
        [[ $TARGET == emulated ]] && ((status && attempt < 3)) || break
        if ((status == MACHINE_GONE)); then
            say "the emulated machine ended or hung by itself (its last output is above); once more in a new one"
        elif grep -qE 'a virtual CPU shut down \(triple fault\)|KVM keeps interrupts from the vCPUs' "$output"; then
            mapfile -t failed < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$output")
            say "the emulated machine lost a VM's state or interrupts (see above); once more: ${failed[*]}"
            # libtest takes the option once.
            [[ " ${base[*]} " == *" --exact "* ]] || base+=(--exact)
            run=("${base[@]}" "${failed[@]}")
        else
            break
        fi
    done
    rm "$output"
    # A run of some of the tests says nothing about the others.
    if [[ $kind == isolation && $status == 0 && -z ${NAMES[*]}$CUT ]]; then isolation_report; fi
    return "$status"
}

# The checks in the emulated Intel machine, which is too slow for the other suites.
readonly INTEL_CHECKS=(kernel engine)

# intel_checks: prints those that NAMES and CUT leave, one a line.
intel_checks() {
    named "${INTEL_CHECKS[@]}" | grep -vxFf <(left_out intel) || true
}

# suite_intel: runs them in a machine of its own, which it stops unless `--keep` was given.
suite_intel() {
    local check started
    # shellcheck disable=SC2030 # for this suite only
    TARGET=emulated TARGET_CPU=intel
    export BULKHEAD_KVM_HOST_NAME=${BULKHEAD_KVM_HOST_NAME:-test}-intel
    # The machine would get copies of all images.
    alpine=${BULKHEAD_TEST_IMAGES:-}/alpine.tar
    unset BULKHEAD_TEST_IMAGES
    scratch=$(mktemp -d)
    # A suite runs in a shell of its own.
    trap 'rm -rf "$scratch"; [[ -n $KEEP ]] || machine --stop' EXIT
    for check in $(intel_checks); do
        started=${EPOCHREALTIME/[.,]/}
        "intel_$check"
        say "$check: ok ($(seconds_since "$started"))"
    done
}

# intel_kernel: boots the guest kernel, in each of its forms.
intel_kernel() { on_target "$(test_binary "${TESTS[intel]}")" --test-threads=1 --ignored | timed; }

# intel_engine: starts the engine on two vCPUs, checks it as the README does, publishes a port and stops it.
intel_engine() {
    local bulkhead=$target_dir/debug/bulkhead port=8080
    # It is for the other check: the engine takes kernel and root file system from the image.
    unset BULKHEAD_KERNEL
    source "$BULKHEAD_REPO/scripts/lib/checks.sh"
    need_docker
    on_target "$bulkhead" start --cpus 2 --timeout 900
    connect_docker "$bulkhead" "$scratch/docker.sock"
    docker load --quiet --input "$alpine" >/dev/null
    check_isolation
    check "docker run --rm alpine nproc" 2
    docker run --detach --publish "127.0.0.1:$port:80" alpine httpd -f -p 80 -h /etc >/dev/null
    on_target curl --silent --fail --retry 30 --retry-connrefused --max-time 60 "http://127.0.0.1:$port/hostname" >/dev/null
    on_target "$bulkhead" stop
}

# isolation_report: puts the tables that the isolation suite wrote together as one page.
isolation_report() {
    local report=$target_dir/isolation-report.md
    {
        printf '# Report of the isolation suite\n\n'
        printf 'The rows of docs/isolation.md, docs/docker-socket.md and docs/policy.md as the suite found them.\n'
        cat "$BULKHEAD_TEST_REPORT"/*.md
    } >"$report"
    say "report: $report"
}

# --- lists --------------------------------------------------------------------------------------------------------

# tests_of KIND: builds the tests of KIND and prints the names of those that NAMES selects, one a line.
tests_of() {
    local kind=$1 binary
    case $kind in
        style) named "${STYLE_CHECKS[@]}" ;;
        unit)
            local targets
            mapfile -t targets < <(integration_tests | grep -vx bare_metal)
            cargo test --quiet --workspace --lib --bins --examples "${targets[@]/#/--test=}" -- --list "${NAMES[@]}" |
                sed -n 's/: test$//p'
            ;;
        package) named package ;;
        dashboard)
            local tests
            mapfile -t tests < <(sed -n 's/^test("\([^"]*\)".*/\1/p' "$DASHBOARD_TESTS")
            named "${tests[@]}"
            ;;
        intel) intel_checks ;;
        bundles)
            binary=$(test_binary bundles)
            "$binary" --list --ignored "${NAMES[@]}" | sed -n 's/: test$//p'
            ;;
        ecosystem) named "${ECOSYSTEM_ROWS[@]}" ;;
        kvm)
            binary=$(test_binary bare_metal)
            "$binary" --list "${NAMES[@]}" | sed -n 's/: test$//p'
            ;;
        *)
            binary=$(test_binary "${TESTS[$kind]}")
            "$binary" --list --ignored "${NAMES[@]}" | sed -n 's/: test$//p'
            ;;
    esac
}
