# The machine that the engine runs on: this one, or an emulated machine. Sourced after common.sh.
# shellcheck shell=bash

# The CPU of the emulated machine, as for scripts/kvm-host.
TARGET_CPU=amd

# choose_target PROGRAM: sets TARGET to `here` or `emulated`, as `PROGRAM doctor` finds it, and prints the choice.
choose_target() {
    local report
    report=$("$1" doctor --format json 2>/dev/null || true)
    passes() { jq -e --arg check "$1" 'any(.[]; .check == $check and .pass)' <<<"$report" >/dev/null; }
    why() { jq -r --arg check "$1" '.[] | select(.check == $check) | .message' <<<"$report"; }
    if passes virtualization && passes /dev/kvm; then
        TARGET=here
        say "target: this machine's /dev/kvm"
    elif [[ -e /dev/kvm ]] && passes virtualization; then
        # Hardware is there and only a permission is missing: emulation would hide the one command that helps.
        die "$(why /dev/kvm)"
    else
        TARGET=emulated
        say "target: the emulated AMD-V machine (scripts/kvm-host), about 30 times slower than hardware:" \
            "$(why virtualization | head -n 1)"
    fi
}

# machine VERB…: runs scripts/kvm-host for the emulated machine of the target.
machine() {
    "$BULKHEAD_REPO/scripts/kvm-host" --name "${BULKHEAD_KVM_HOST_NAME:-default}" --cpu "$TARGET_CPU" "$@"
}

# on_target CMD…: runs CMD on the target.
on_target() {
    if [[ $TARGET == here ]]; then "$@"; else machine -- "$@"; fi
}
