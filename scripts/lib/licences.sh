# The licences of the libraries that are compiled into the package's programs. Sourced after sbom.sh.
# shellcheck shell=bash

# make_licences WORK SBOM: prints each text once, below the components that it is of: the crates of the SBOM, and the Go
# libraries of dockerd. WORK is a directory for the texts.
make_licences() {
    local work=$1 sbom=$2 text of rule
    rule=$(printf '=%.0s' {1..80})
    mkdir -p "$work/libraries"
    crate_licences "$sbom" >"$work/list"
    library_licences "$work/libraries" "$(source_version "$(rootfs_tar)")" >>"$work/list"
    cat <<'END'
Licences of the libraries in Bulkhead's programs and in dockerd

The SBOM beside the package has the licence of each crate as an SPDX expression. A crate without a text of its own is
named at the end with it. Debian's own programs have theirs in the image, at /usr/share/doc/PACKAGE/copyright.
END
    while IFS=$'\t' read -r of text; do
        printf '\n%s\n%s\n%s\n\n' "$rule" "$of" "$rule"
        cat "$text"
    done < <(by_text <"$work/list")
    printf '\n%s\n' "$rule"
    awk -F '\t' '$2 == "" { print $1 ": " $3 }' "$work/list" | LC_ALL=C sort -u
}

# by_text: groups lines `COMPONENT DIGEST FILE` by digest and prints the components and one file of each, in the order of their
# first components.
by_text() {
    awk -F '\t' '$2 != ""' | LC_ALL=C sort -u | awk -F '\t' -v OFS='\t' '
        !($2 in of) { order[++count] = $2; file[$2] = $3 }
        { of[$2] = of[$2] (of[$2] == "" ? "" : ", ") $1 }
        END { for (i = 1; i <= count; i++) print of[order[i]], file[order[i]] }'
}

# crate_licences SBOM: prints `CRATE VERSION`, digest and path of each text of each crate; for one without a text, an empty
# digest and the SPDX expression.
crate_licences() {
    local name version expression manifest text texts
    join -t $'\t' \
        <(jq -r '.components[] | select(.purl | startswith("pkg:cargo/")) |
            "\(.name)@\(.version)\t\(.licenses[0].expression)"' "$1" | LC_ALL=C sort) \
        <(cargo metadata --quiet --locked --format-version 1 |
            jq -r '.packages[] | select(.source) | "\(.name)@\(.version)\t\(.manifest_path)"' | LC_ALL=C sort -u) |
        while IFS=$'\t' read -r name expression manifest; do
            version=${name##*@} name=${name%@*}
            mapfile -t texts < <(texts_in "${manifest%/*}")
            if ((${#texts[@]} == 0)); then printf '%s %s\t\t%s\n' "$name" "$version" "$expression"; fi
            for text in "${texts[@]}"; do
                printf '%s %s\t%s\t%s\n' "$name" "$version" "$(sha256sum "$text" | cut -c1-64)" "$text"
            done
        done
}

# texts_in DIRECTORY: prints the paths of the licences in a crate.
texts_in() {
    find "$1" -maxdepth 1 -type f -regextype posix-extended \
        -iregex '.*/(licen[cs]e|copying|copyright|notice|unlicense)[^/]*' | LC_ALL=C sort
    if [[ -d $1/LICENSES ]]; then find "$1/LICENSES" -type f | LC_ALL=C sort; fi
}

# library_licences OUT VERSION: extracts the texts of dockerd's libraries into OUT, and prints the same for them.
library_licences() {
    local out=$1 package name text
    while read -r package; do
        name=${package##*/} text=$out/${package##*/}
        # The file can be a link to that of another package of the same source.
        dpkg-deb --fsys-tarfile "$package" | tar -xO --wildcards './usr/share/doc/*/copyright' >"$text" 2>/dev/null || true
        [[ -s $text ]] || continue
        name=${name%_*}
        printf '%s\t%s\t%s\n' "${name//_/ }" "$(sha256sum "$text" | cut -c1-64)" "$text"
    done < <(engine_sources "$2")
}
