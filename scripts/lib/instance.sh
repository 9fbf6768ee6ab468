# One emulated machine: its run directory, its process, the connection to it.
# shellcheck shell=bash

# The run directory of an instance holds
#   control/      shared with the machine: host_key, authorized_keys, shares, cache
#   key           the private key that opens it
#   cpu pid port console.log emulator.log ssh forwards

# A kind of CPU is a file machine-CPU.sh with
#   DEFAULT_CPUS DEFAULT_MEMORY START_TIMEOUT
#   build_emulator                           builds the emulator unless it is cached and prints its directory
#   emulator_command DISK KERNEL EMULATOR    sets `emulator`, the command that runs the machine from DISK and KERNEL with
#                                            the directories of control/shares; it has a file below $RUN as an argument
#   bring_files CMD...                       makes the running machine see the files that CMD needs as they are now

# state_directory WORD...: prints a directory for the things that the words identify, which only this user can have
# made.
state_directory() {
    local base=${XDG_RUNTIME_DIR:+$XDG_RUNTIME_DIR/bulkhead}
    base=${base:-/tmp/bulkhead-$UID}
    (umask 077 && mkdir -p "$base")
    [[ -O $base && ! -L $base ]] || die "$base belongs to another user; set XDG_RUNTIME_DIR to a directory of your own"
    base=$base/kvm-host/$(printf '%s\n' "$@" | sha256sum | cut -c1-8)
    mkdir -p "$base"
    echo "$base"
}

# instance_pid: prints the process ID of the running machine, or fails. A stale pid file does not count.
instance_pid() {
    local pid
    pid=$(cat "$RUN/pid" 2>/dev/null) || return 1
    tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$RUN/" || return 1
    echo "$pid"
}

# free_port: prints a TCP port of the loopback on which nothing listens.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

# instance_ssh USER ARGUMENTS...: runs ssh over the one connection that each user has to the machine.
instance_ssh() {
    local user=$1
    shift
    ssh -F none -S "$RUN/ssh-$user" -o ControlMaster=no -o BatchMode=yes -o LogLevel=ERROR -l "$user" kvm-host "$@"
}

# instance_host USER: prints the way to the machine as lines of ssh_config(5).
instance_host() {
    printf '%s\n' "HostName 127.0.0.1" "Port $(cat "$RUN/port")" "User $1" "IdentityFile $RUN/key" "IdentitiesOnly yes" \
        "HostKeyAlias kvm-host" "UserKnownHostsFile $RUN/known_hosts" "StrictHostKeyChecking yes"
}

# instance_connect USER: opens that connection unless it is open. All later commands are sessions of it.
instance_connect() {
    local user=$1 line host=()
    instance_ssh "$user" -O check 2>/dev/null && return 0
    while IFS= read -r line; do host+=(-o "$line"); done < <(instance_host "$user")
    # aes128-gcm and curve25519 are the quickest under emulation, and the traffic stays on the loopback.
    ssh -F none "${host[@]}" -M -N -f -S "$RUN/ssh-$user" \
        -o ControlPersist=yes -o BatchMode=yes -o LogLevel=ERROR -o ServerAliveInterval=30 -o ConnectTimeout=120 \
        -o Ciphers=aes128-gcm@openssh.com -o KexAlgorithms=curve25519-sha256 -o Compression=no \
        -o ExitOnForwardFailure=yes -o StreamLocalBindUnlink=yes \
        kvm-host </dev/null >/dev/null 2>"$RUN/ssh.log" || die "cannot connect to the machine: $(tail -n1 "$RUN/ssh.log")"
}
