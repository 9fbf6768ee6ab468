# Shared by all scripts: the cache, Debian packages, progress, locks.
# shellcheck shell=bash
set -euo pipefail
# Without this a shell ignores a failure inside $(...).
shopt -s inherit_errexit

BULKHEAD_REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
BULKHEAD_CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead
export BULKHEAD_REPO BULKHEAD_CACHE

# Exit status of scripts/kvm-host when the machine itself ended; none of our commands uses it.
# shellcheck disable=SC2034 # for the scripts that source this
readonly MACHINE_GONE=254

say() { printf '%s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# need_packages PACKAGE...: installs the Debian packages that are missing if this user may, otherwise prints the one
# command that does.
need_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
    done
    ((${#missing[@]} == 0)) && return 0
    local as_root=()
    if ((EUID != 0)); then
        if sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        else
            die "missing Debian packages; run: sudo apt-get install --no-install-recommends ${missing[*]}"
        fi
    fi
    say "installing Debian packages: ${missing[*]}"
    local log=$BULKHEAD_CACHE/log/apt.log
    mkdir -p "${log%/*}"
    if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
        # The package lists may be missing or old on a fresh machine: refresh them once.
        "${as_root[@]}" apt-get update >>"$log" 2>&1 || true
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1 ||
            die "apt-get could not install ${missing[*]}; see $log"
    fi
}

# with_progress LABEL LOG COMMAND...: runs COMMAND with its output in LOG and shows its progress: a live line on a
# terminal, a line a minute elsewhere.
with_progress() {
    local label=$1 log=$2 started=$SECONDS pid last=$SECONDS
    shift 2
    mkdir -p "${log%/*}"
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        if [[ -t 2 ]]; then
            printf '\r\033[K%s … %ds  %.60s' "$label" $((SECONDS - started)) "$(tail -n1 "$log" | tr -dc '[:print:]')" >&2
        elif ((SECONDS - last >= 60)); then
            last=$SECONDS
            say "$label … $((SECONDS - started)) s"
        fi
    done
    [[ -t 2 ]] && printf '\r\033[K' >&2
    if ! wait "$pid"; then
        tail -n 30 "$log" >&2
        die "$label failed; the whole output is in $log"
    fi
    say "$label: done in $((SECONDS - started)) s"
}

# python_tools DIRECTORY REQUIREMENTS: makes a virtual environment of Python with the packages of a list with digests.
python_tools() {
    python3 -c 'import ensurepip' 2>/dev/null || need_packages python3-venv
    python3 -m venv "$1"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes --requirement "$2"
}

# digest FILE-OR-WORD...: prints one digest over the contents of files and over plain words.
digest() {
    local item
    for item in "$@"; do
        if [[ -f $item ]]; then sha256sum <"$item"; else printf '%s\n' "$item"; fi
    done | sha256sum | cut -c1-16
}

# locked NAME COMMAND...: runs COMMAND while no other process on this machine builds NAME.
locked() {
    local name=$1
    shift
    mkdir -p "$BULKHEAD_CACHE/lock"
    (
        exec 9>"$BULKHEAD_CACHE/lock/$name"
        flock 9
        "$@" 9>&-
    )
}
