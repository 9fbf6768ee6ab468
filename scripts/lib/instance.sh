# One emulated machine: where its state lives, how it starts, stops and is talked to.
# shellcheck shell=bash

# The run folder of an instance holds
#   control/      shared with the machine: host_key, authorized_keys, shares, cache
#   key           the private key that opens it
#   pid console.log qemu.log ssh forwards

# state_folder WORD...: a folder for what the words stand for, this user's own, that no one else can have prepared.
state_folder() {
    local base=${XDG_RUNTIME_DIR:+$XDG_RUNTIME_DIR/bulkhead}
    base=${base:-/tmp/bulkhead-$UID}
    (umask 077 && mkdir -p "$base")
    [[ -O $base && ! -L $base ]] || die "$base belongs to someone else; set XDG_RUNTIME_DIR to a folder of your own"
    base=$base/kvm-host/$(printf '%s\n' "$@" | sha256sum | cut -c1-8)
    mkdir -p "$base"
    echo "$base"
}

# instance_pid: the process id of the running machine, or failure. A stale pid file does not count.
instance_pid() {
    local pid
    pid=$(cat "$RUN/pid" 2>/dev/null) || return 1
    tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -qxF "file:$RUN/console.log" || return 1
    echo "$pid"
}

# free_port: a TCP port of the loopback that nothing listens on.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

# instance_ssh USER ARGUMENTS...: ssh into the machine over the one connection that each user has.
instance_ssh() {
    local user=$1
    shift
    ssh -F none -S "$RUN/ssh-$user" -o ControlMaster=no -o BatchMode=yes -o LogLevel=ERROR -l "$user" kvm-host "$@"
}

# instance_connect USER: opens that connection unless it is open. Every later command is a session of it.
instance_connect() {
    local user=$1
    instance_ssh "$user" -O check 2>/dev/null && return 0
    # aes128-gcm and curve25519 are the quickest under emulation; nobody listens on the loopback.
    ssh -F none -M -N -f -S "$RUN/ssh-$user" -i "$RUN/key" -l "$user" -p "$(cat "$RUN/port")" \
        -o ControlPersist=yes -o BatchMode=yes -o LogLevel=ERROR -o IdentitiesOnly=yes -o HostKeyAlias=kvm-host \
        -o UserKnownHostsFile="$RUN/known_hosts" -o StrictHostKeyChecking=yes -o ServerAliveInterval=30 \
        -o Ciphers=aes128-gcm@openssh.com -o KexAlgorithms=curve25519-sha256 -o Compression=no \
        -o ExitOnForwardFailure=yes -o StreamLocalBindUnlink=yes \
        127.0.0.1 </dev/null >/dev/null 2>"$RUN/ssh.log" || die "no ssh to the machine: $(tail -n1 "$RUN/ssh.log")"
}
