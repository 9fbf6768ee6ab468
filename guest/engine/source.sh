# Debian's source of the engine and of the libraries that it is made of, and the compiler. Sourced after common.sh and
# debian.sh.
# shellcheck shell=bash

# source_version TAR: the version of the source package that the user land's docker.io is built from. The user land alone
# decides the engine's version: client, containerd and dockerd stay those that Debian tests together.
source_version() {
    tar -xOf "$1" ./var/lib/dpkg/status | awk '
        $1 == "Package:" { package = $2 }
        package != "docker.io" { next }
        # Named only where it is not the same: a package that was built again for new libraries.
        $1 == "Source:" && $3 { version = substr($3, 2, length($3) - 2) }
        $1 == "Version:" && !version { version = $2 }
        END { print version }'
}

# download OUT VERSION: fetches source and libraries into OUT. mmdebstrap installs nothing here: it sets up apt for the
# suite, whose signatures apt checks.
download() {
    local out=$1 archives=() kind recipe=$BULKHEAD_REPO/guest/engine
    [[ -d $out ]] && return 0
    for kind in deb deb-src; do
        archives+=("$kind $DEBIAN_MIRROR $DEBIAN_SUITE main" "$kind $DEBIAN_SECURITY_MIRROR $DEBIAN_SUITE-security main")
    done
    rm -rf "$out.new"
    mkdir -p "$out.new"
    export ENGINE_DOWNLOADS=$out.new ENGINE_VERSION=$2 ENGINE_PACKAGES_LIST=$recipe/packages.list
    # shellcheck disable=SC2016 # mmdebstrap's shell expands it
    mmdebstrap --mode=chrootless --variant=custom --format=null --aptopt='Acquire::Check-Valid-Until "false"' \
        --customize-hook="$recipe/download"' "$1"' "$DEBIAN_SUITE" /dev/null "${archives[@]}"
    mv -T "$out.new" "$out"
}

# unpack DOWNLOADS TREE: TREE/usr/lib/go-* is the compiler, TREE/libraries and TREE/engine are Go paths: what we do not
# change and what we do.
unpack() {
    local downloads=$1 tree=$2 package
    rm -rf "$tree"
    mkdir -p "$tree/engine/src/github.com"/{docker,moby}
    for package in "$downloads"/*.deb; do
        dpkg-deb --extract "$package" "$tree"
    done
    mv "$tree/usr/share/gocode" "$tree/libraries"
    # apt has checked the signature of the index that has the digests of these files.
    dpkg-source --no-check --extract "$downloads"/docker.io_*.dsc "$tree/source"
    # As Debian's own build does: files that come in packages of their own.
    awk '/^Files-Excluded:/ { f = 1; next } /^[^ ]/ { f = 0 } f && $1 ~ /^vendor\// { print $1 }' \
        "$tree/source/debian/copyright" | sed "s,^,$tree/source/engine/," | xargs rm -rf
    mv "$tree/source/engine" "$tree/engine/src/github.com/docker/docker"
    mv "$tree/source/buildkit" "$tree/engine/src/github.com/moby/buildkit"
}

# go_in TREE ARGUMENT...: runs the compiler of an unpacked tree. It is one program without libraries, so it works on this
# machine as it does on Debian's. Nothing but these variables reaches it: the result is the same on every machine.
go_in() {
    local tree=$1 goroot
    goroot=$(echo "$tree"/usr/lib/go-[0-9]*)
    shift
    env -i PATH=/usr/bin:/bin HOME="$tree" GOROOT="$goroot" GOPATH="$tree/engine:$tree/libraries" \
        GOCACHE="$BULKHEAD_CACHE/build/engine-cache" GO111MODULE=off GOPROXY=off GOTOOLCHAIN=local GOENV=off GOAMD64=v1 \
        CGO_ENABLED=0 "$goroot/bin/go" "$@"
}

# source_downloads VERSION: the folder that `download` fills for a version.
source_downloads() {
    local recipe=$BULKHEAD_REPO/guest/engine
    echo "$BULKHEAD_CACHE/engine/source-$(digest "$1" "$DEBIAN_SUITE" "$recipe/packages.list" "$recipe/download")"
}

# in_build_of NAME LABEL FUNCTION: runs FUNCTION in a shell of its own, in which a failing command ends it, with the
# functions here; one build at a time, as they share compiled libraries. What else FUNCTION needs has to be exported.
in_build_of() {
    local name=$1 label=$2 function=$3
    mkdir -p "$BULKHEAD_CACHE/lock"
    export -f "${function?}" download unpack go_in die say
    export DEBIAN_SUITE DEBIAN_MIRROR DEBIAN_SECURITY_MIRROR
    with_progress "$label" "$BULKHEAD_CACHE/log/$name.log" \
        flock "$BULKHEAD_CACHE/lock/engine" bash -euo pipefail -c "$function"
}
