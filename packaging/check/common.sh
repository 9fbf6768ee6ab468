# Sourced by the programs here, which are root in a clean Debian.
# shellcheck shell=bash

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The ordinary user.
user=1000

# make_user: makes the directories of this user, with a session.
make_user() { install -d -o "$user" -g "$user" -m 0700 /home/user "/run/user/$user"; }

# as_user COMMAND…: runs a command as this user, who may use KVM where there is one.
as_user() {
    local groups=(--clear-groups)
    [[ ! -e /dev/kvm ]] || groups=(--groups "$(stat -c %g /dev/kvm)")
    setpriv --reuid="$user" --regid="$user" "${groups[@]}" env -i PATH=/usr/bin:/bin HOME=/home/user \
        XDG_RUNTIME_DIR="/run/user/$user" TERM=dumb MANPAGER=cat LC_ALL=C.UTF-8 "$@"
}

# expect TEXT COMMAND…: runs a command, whatever its status, and fails unless its output has TEXT.
expect() {
    local text=$1 output
    shift
    output=$("$@" 2>&1) || true
    has "$text" "$output" "$@"
}

# succeed TEXT COMMAND…: the same for a command that must not fail.
succeed() {
    local text=$1 output
    shift
    output=$("$@" 2>&1) || fail "$* failed:"$'\n'"$output"
    has "$text" "$output" "$@"
}

# has TEXT OUTPUT COMMAND…: fails unless a command's output has TEXT.
has() {
    local text=$1 output=$2 command="${*:3}"
    [[ $output == *"$text"* ]] || fail "no \`$text\` in the output of $command:"$'\n'"$output"
    printf 'ok: %s: %s\n' "${command%%$'\n'*}" "$text"
}
