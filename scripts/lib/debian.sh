# Debian user lands: a recipe folder becomes a cached tar of a root file system.
# shellcheck shell=bash

# A recipe folder holds
#   packages.list   the packages to install, one a line
#   variant         mmdebstrap's variant: what comes besides those packages
#   paths.list      dpkg path filters, one a line: `-/usr/share/man/*` leaves out, `+/usr/share/x` keeps
#   customise       optional: run at the end with the root file system's folder as its argument
#   patches/        optional: patches that customise applies

DEBIAN_SUITE=trixie
DEBIAN_MIRROR=${BULKHEAD_DEBIAN_MIRROR:-http://deb.debian.org/debian}
# Fixes that Debian's security team has released since the last point release.
DEBIAN_SECURITY_MIRROR=${BULKHEAD_DEBIAN_SECURITY_MIRROR:-http://deb.debian.org/debian-security}

# The packages that a container's safety depends on. A new version of one of them makes a cached user land stale.
readonly ENGINE_PACKAGES='docker.io containerd crun runc'

# list FILE: the lines of FILE that are not blank and no comment.
list() { grep -vE '^[[:space:]]*(#|$)' "$1"; }

# debian_key RECIPE: the digest of all that a recipe says, and of the versions of the engine's packages that it
# installs.
debian_key() {
    local package known='' versions=() patches
    for package in $ENGINE_PACKAGES; do
        list "$1/packages.list" | grep -qx "$package" || continue
        known=${known:-$(engine_versions)}
        versions+=("$(grep "^$package " <<<"$known")")
    done
    mapfile -t patches < <(find "$1" -path "$1/patches/*" -type f | sort)
    digest "$DEBIAN_SUITE" "$1"/packages.list "$1"/variant "$1"/paths.list "$1"/customise "${patches[@]}" \
        "$(declare -f debian_build)" "${versions[@]}"
}

# engine_versions: prints the versions of ENGINE_PACKAGES that the archive offers, a package and its versions a line.
#
# The archive is asked once a day. Where it cannot be reached the last answer holds, so that a machine without a network
# goes on with what it has built.
engine_versions() {
    local answers=$BULKHEAD_CACHE/debian/versions today last
    today=$answers/$(date -u +%F)
    if [[ ! -f $today ]]; then
        need_packages curl ca-certificates xz-utils
        mkdir -p "$answers"
        locked debian-versions ask_archive "$today"
    fi
    last=$(find "$answers" -type f -name '[0-9]*' ! -name '*.new' | sort | tail -n 1)
    if [[ -n $last ]]; then cat "$last"; else printf '%s unknown\n' $ENGINE_PACKAGES; fi
}

# ask_archive OUT: writes the versions to OUT, unless the archive cannot be reached.
ask_archive() {
    local out=$1 index
    [[ -f $out ]] && return 0
    if for index in "$DEBIAN_MIRROR/dists/$DEBIAN_SUITE" "$DEBIAN_SECURITY_MIRROR/dists/$DEBIAN_SUITE-security"; do
        curl -fsS --retry 2 --max-time 120 "$index/main/binary-amd64/Packages.xz" | xz -dc || exit 1
    done | awk -v wanted=" $ENGINE_PACKAGES " '
        /^Package: / { package = $2 }
        /^Version: / && index(wanted, " " package " ") { versions[package] = versions[package] " " $2 }
        END { for (package in versions) print package versions[package] }' | sort >"$out.new" && [[ -s $out.new ]]; then
        mv -T "$out.new" "$out"
        find "${out%/*}" -type f ! -path "$out" -delete
    else
        say "Debian's archive cannot be reached; using the versions that were known last"
    fi
}

# debian_tar NAME RECIPE: builds the recipe unless it is cached; prints the path of the tar.
debian_tar() {
    local name=$1 recipe=$2 key tar
    key=$(debian_key "$recipe")
    tar=$BULKHEAD_CACHE/debian/$name-$key.tar
    if [[ ! -f $tar ]]; then
        need_packages mmdebstrap debian-archive-keyring
        locked "debian-$name" debian_build "$name" "$recipe" "$tar"
    fi
    echo "$tar"
}

debian_build() {
    local name=$1 recipe=$2 tar=$3 packages
    [[ -f $tar ]] && return 0
    mkdir -p "${tar%/*}"
    packages=$(list "$recipe/packages.list" | paste -sd,)
    local options=(
        --variant="$(list "$recipe/variant")"
        --include="$packages"
        --components=main
        --aptopt='APT::Install-Recommends "false"'
        # An old snapshot of the archive stays usable; signatures are still checked.
        --aptopt='Acquire::Check-Valid-Until "false"'
    )
    # shellcheck disable=SC2016 # mmdebstrap's shell expands it
    [[ -x $recipe/customise ]] && options+=(--customize-hook="$recipe/customise"' "$1"')
    local filter
    while IFS= read -r filter; do
        case $filter in
            -*) options+=(--dpkgopt="path-exclude=${filter#-}") ;;
            +*) options+=(--dpkgopt="path-include=${filter#+}") ;;
        esac
    done < <(list "$recipe/paths.list")
    # Fixed times make the tar, and all that is made of it, depend on the packages alone.
    SOURCE_DATE_EPOCH=0 with_progress "building the $name user land from Debian $DEBIAN_SUITE (about a minute)" \
        "$BULKHEAD_CACHE/log/debian-$name.log" \
        mmdebstrap "${options[@]}" "$DEBIAN_SUITE" "$tar.new.tar" "deb $DEBIAN_MIRROR $DEBIAN_SUITE main" \
        "deb $DEBIAN_SECURITY_MIRROR $DEBIAN_SUITE-security main"
    mv -T "$tar.new.tar" "$tar"
    # Older recipes' results are of no more use to this checkout; another checkout builds its own again.
    find "${tar%/*}" -name "$name-*.tar" ! -path "$tar" -mtime +7 -delete
}

# in_root_tree FUNCTION ARGUMENT...: runs FUNCTION with root's view of file ownership, so that trees unpack and pack as
# they are. It gets a shell of its own, in which a failing command ends it, and sees none of this shell's variables.
in_root_tree() {
    local function=$1 as_root=()
    shift
    if ((EUID != 0)); then
        need_packages fakeroot
        as_root=(fakeroot --)
    fi
    "${as_root[@]}" bash -euo pipefail -c "$(declare -f "$function"); $function \"\$@\"" "$function" "$@"
}
