# Where the engine can run: directly on this machine's KVM, or in the emulated AMD-V machine.
# Sourced after common.sh; $bulkhead is the built program.
# shellcheck shell=bash

# choose_place PROGRAM: sets PLACE to `here` or `emulated` and says which in one line.
choose_place() {
    local report
    report=$("$1" doctor --format json 2>/dev/null || true)
    passes() { jq -e --arg check "$1" 'any(.[]; .check == $check and .pass)' <<<"$report" >/dev/null; }
    why() { jq -r --arg check "$1" '.[] | select(.check == $check) | .message' <<<"$report"; }
    if passes virtualization && passes /dev/kvm; then
        PLACE=here
        say "place: this machine's /dev/kvm"
    elif [[ -e /dev/kvm ]] && passes virtualization; then
        die "$(why /dev/kvm)"
    else
        PLACE=emulated
        say "place: the emulated AMD-V machine (scripts/kvm-host), about 30 times slower than hardware:" \
            "$(why virtualization | head -n 1)"
    fi
}

# there CMD…: runs CMD where the engine runs.
there() {
    if [[ $PLACE == here ]]; then "$@"; else "$BULKHEAD_REPO/scripts/kvm-host" --name "${BULKHEAD_KVM_HOST_NAME:-default}" -- "$@"; fi
}
