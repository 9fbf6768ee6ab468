# The README's checks of a running engine. Sourced after common.sh and target.sh.
# shellcheck shell=bash

# need_docker: installs the docker command unless it is there.
need_docker() {
    command -v docker >/dev/null ||
        need_packages "$(apt-cache show docker-cli >/dev/null 2>&1 && echo docker-cli || echo docker.io)"
}

# connect_docker PROGRAM LOCAL: makes `docker` use the engine that PROGRAM runs on the target, through the socket LOCAL
# where that is an emulated machine.
connect_docker() {
    local socket
    socket=$(on_target "$1" status --format json | jq -r .dockerHost)
    socket=${socket#unix://}
    if [[ $TARGET == emulated ]]; then
        rm -f "$2"
        machine --forward "$2:$socket"
        socket=$2
    fi
    export DOCKER_HOST=unix://$socket
    unset DOCKER_CONTEXT
}

# check COMMAND LINE: shows a command as a user types it and its output, which must be LINE.
check() {
    local output
    printf '$ %s\n' "$1"
    # shellcheck disable=SC2086 # the words of a command without quotes
    output=$($1)
    printf '%s\n' "$output"
    [[ $output == "$2" ]] || die "expected: $2"
}
# refused TEXT CMD…: shows a command that must fail and print TEXT.
refused() {
    local text=$1 output
    shift
    printf '$ %s\n' "$*"
    if output=$("$@" 2>&1); then
        die "this command should have been refused: $*"
    fi
    printf '%s\n' "$output" | grep -v '^See ' | grep -v '^$'
    grep -qF -- "$text" <<<"$output" || die "the refusal lacks the text: $text"
}
# check_runtime NAME: checks the OCI runtime of a new container.
check_runtime() {
    docker rm -f bulkhead-check >/dev/null 2>&1 || true
    docker create --name bulkhead-check alpine true >/dev/null
    check 'docker inspect --format={{.HostConfig.Runtime}} bulkhead-check' "$1"
    docker rm bulkhead-check >/dev/null
}

# check_isolation: the checks with Enhanced Container Isolation on.
check_isolation() {
    check "docker run --rm alpine cat /proc/self/uid_map" '         0     100000      65536'
    check_runtime sysbox-runc
    refused "sysbox containers can't share namespaces [pid] with the host (because they use the linux user-namespace for isolation)" \
        docker run --rm --pid=host alpine true
    refused "docker socket mount denied" docker run --rm -v /var/run/docker.sock:/var/run/docker.sock alpine true
}
