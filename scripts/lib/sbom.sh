# The software bill of materials of the package, in CycloneDX 1.6. Sourced after common.sh, debian.sh and
# guest/engine/source.sh.
# shellcheck shell=bash

# make_sbom VERSION IMAGE: prints the document. Its components are the crates of the program and of the guest's programs,
# the Debian packages of the root file system, the libraries in dockerd, and the guest's kernel.
make_sbom() {
    local version=$1 image=$2 base kernel
    base=$(rootfs_tar)
    kernel=$(grep -aom 1 'Linux version [^ ]*' "$image/vmlinux" | cut -d' ' -f3)
    {
        crates
        tar -xOf "$base" ./var/lib/dpkg/status | debian_packages
        engine_libraries "$(source_version "$base")"
        jq -nc --arg version "$kernel" '{type: "operating-system", name: "linux", version: $version,
            purl: "pkg:generic/linux@\($version)", licenses: [{license: {id: "GPL-2.0-only"}}],
            properties: [{name: "bulkhead:part", value: "vmlinux"}]}'
    } | jq -s --arg version "$version" --arg digest "$(sha256sum "$image/manifest.json" | cut -c1-32)" \
        --argjson time "$SOURCE_DATE_EPOCH" --arg commit "$(git -C "$BULKHEAD_REPO" rev-parse HEAD)" '
        # One component for a crate or package that several parts have.
        (group_by(.purl) | map(.[0] + {"bom-ref": .[0].purl, properties: (map(.properties[]) | unique)}))
        as $components |
        {
            bomFormat: "CycloneDX", specVersion: "1.6", version: 1,
            # Of the commit and the image, where the format wants a random one: two builds are the same.
            serialNumber: (($commit[0:16] + $digest[0:16]) as $d |
                "urn:uuid:\($d[0:8])-\($d[8:12])-8\($d[13:16])-8\($d[17:20])-\($d[20:32])"),
            metadata: {
                timestamp: ($time | todate),
                component: {type: "application", name: "bulkhead", version: $version, "bom-ref": "bulkhead",
                    purl: "pkg:deb/bulkhead@\($version)?arch=amd64",
                    properties: [{name: "bulkhead:commit", value: $commit}]}
            },
            components: $components,
            dependencies: [{ref: "bulkhead", dependsOn: ($components | map(."bom-ref"))}]
        }'
}

# rootfs_tar: prints the path of the Debian user land in the root file system.
rootfs_tar() { debian_tar rootfs "$BULKHEAD_REPO/guest/rootfs"; }

# crates: prints the crates in the program and in the guest's programs, a component a line. Ours are a part of the
# component `bulkhead`.
crates() {
    local part members=() name
    mapfile -t members < <(grep -hm 1 '^name = ' "$BULKHEAD_REPO"/guest/*/Cargo.toml | cut -d'"' -f2)
    for part in bulkhead rootfs.erofs; do
        local packages=(--package bulkhead)
        if [[ $part == rootfs.erofs ]]; then
            packages=()
            for name in "${members[@]}"; do packages+=(--package "$name"); done
        fi
        cargo tree --quiet --locked --edges normal --target x86_64-unknown-linux-gnu --prefix none --no-dedupe \
            --format '{p}|{l}' "${packages[@]}" |
            awk -F '[ |]' -v part="$part" '$0 !~ /\(\// && NF > 1 {
                licence = $0; sub(/^[^|]*\|/, "", licence)
                print part "\t" $1 "\t" substr($2, 2) "\t" licence
            }' | LC_ALL=C sort -u
    done | jq -nRc --rawfile lock "$BULKHEAD_REPO/Cargo.lock" '
        ($lock | [scan("name = \"([^\"]+)\"\nversion = \"([^\"]+)\"\nsource = \"[^\"]+\"\nchecksum = \"([0-9a-f]+)\"")]
            | map({key: "\(.[0])@\(.[1])", value: .[2]}) | from_entries) as $sums |
        inputs | split("\t") as [$part, $name, $version, $licence] |
        {type: "library", name: $name, version: $version, purl: "pkg:cargo/\($name)@\($version | @uri)",
            # An older way to write OR.
            licenses: [{expression: ($licence | gsub(" */ *"; " OR "))}],
            hashes: [{alg: "SHA-256", content: $sums["\($name)@\($version)"]}],
            properties: [{name: "bulkhead:part", value: $part}]}'
}

# debian_packages: prints the packages of a dpkg status file, a component a line.
debian_packages() {
    awk -v RS= -v FS='\n' '{
            split("", field)
            for (i = 1; i <= NF; i++) if (match($i, /^(Package|Version|Architecture): /)) {
                key = $i; sub(/:.*/, "", key); field[key] = substr($i, RLENGTH + 1)
            }
            print field["Package"] "\t" field["Version"] "\t" field["Architecture"]
        }' | jq -Rc --arg suite "$DEBIAN_SUITE" '
        split("\t") as [$name, $version, $arch] |
        {type: "library", name: $name, version: $version,
            purl: "pkg:deb/debian/\($name | @uri)@\($version | @uri)?arch=\($arch)&distro=\($suite)",
            properties: [{name: "bulkhead:part", value: "rootfs.erofs"}]}'
}

# engine_sources VERSION: prints the files of the Debian packages of Go sources from which dockerd of that version is built.
engine_sources() {
    local sources
    sources=$(find "$BULKHEAD_CACHE/engine" -path "*/source-*/docker.io_$1.dsc" -printf '%T@ %h\n' | sort -n | tail -n 1)
    [[ -n $sources ]] ||
        die "the sources of dockerd $1 are not in the cache; remove $BULKHEAD_CACHE/engine and run scripts/image"
    find "${sources#* }" -name '*.deb' | LC_ALL=C sort
}

# engine_libraries VERSION: prints these packages, a component a line.
engine_libraries() {
    engine_sources "$1" | sed 's,.*/,,; s/%3a/:/; s/\.deb$//' |
        jq -Rc --arg suite "$DEBIAN_SUITE" '
        split("_") as [$name, $version, $arch] |
        {type: "library", name: $name, version: $version,
            purl: "pkg:deb/debian/\($name | @uri)@\($version | @uri)?arch=\($arch)&distro=\($suite)",
            properties: [{name: "bulkhead:part", value: "dockerd"}]}'
}

# check_sbom FILE: checks the fields that CycloneDX 1.6 requires, the forms of those with one, and that each part has
# components.
check_sbom() {
    jq -e '
        def licence: (has("expression") and (.expression | length > 0)) or
            (.license | (has("id") != has("name")));
        def component: (.type | IN("application", "library", "operating-system")) and (.name | length > 0) and
            (.version | length > 0) and (.purl | test("^pkg:[a-z]+/.+@.+")) and
            all(.licenses[]?; licence) and
            all(.hashes[]?; .alg == "SHA-256" and (.content | test("^[0-9a-f]{64}$")));
        .bomFormat == "CycloneDX" and .specVersion == "1.6" and .version >= 1 and
        (.serialNumber | test("^urn:uuid:[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$")) and
        (.metadata.timestamp | fromdate > 0) and (.metadata.component | component) and
        all(.components[]; component) and
        ([.metadata.component, .components[]] | map(."bom-ref") | length == (unique | length)) and
        ([.components[]."bom-ref", "bulkhead"] as $known | all(.dependencies[]; .ref, .dependsOn[] | IN($known[]))) and
        ([.components[].properties[].value] | unique == ["bulkhead", "dockerd", "rootfs.erofs", "vmlinux"])
        ' "$1" >/dev/null || die "$1 is not a valid CycloneDX document"
    say "SBOM: $(jq '.components | length' "$1") components"
}
