# Sourced by the programs here that reach an engine by ssh.
# shellcheck shell=bash

# use_ssh_config DIRECTORY: lets the docker command use DIRECTORY/ssh_config. It reads no option of ours for ssh, so a
# program of that name comes first in PATH.
use_ssh_config() {
    mkdir "$1/bin"
    printf '#!/bin/sh\nexec /usr/bin/ssh -F %s "$@"\n' "$1/ssh_config" >"$1/bin/ssh"
    chmod +x "$1/bin/ssh"
    export PATH=$1/bin:$PATH
}
