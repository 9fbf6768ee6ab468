# Sourced by the programs here.
# shellcheck shell=bash

# expect WORDS TEXT: fails unless TEXT contains the words.
expect() {
    grep -qF -- "$1" <<<"$2" || { echo "no \`$1\` in: $2" >&2 && exit 1; }
}
