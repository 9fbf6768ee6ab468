# The emulated Intel machine: Bochs, whose CPU has VMX and EPT. Sourced by scripts/kvm-host; the functions that it calls
# are named in scripts/lib/instance.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with scripts/kvm-host

# Bochs runs all of its CPUs in one thread: a second one makes the machine slower.
readonly DEFAULT_CPUS=1 DEFAULT_MEMORY=2G
# Seconds from power on to sshd, at most. On a machine that is busy the emulated one is slow.
readonly START_TIMEOUT=600

# The second disk, beside the first: a run directory may be in memory. Its name goes when Bochs has opened it.
share_disk=$BULKHEAD_CACHE/kvm-host/$(digest "$RUN").shares

# build_emulator: prints the directory of Bochs, Debian's own with patches (see its recipe), and its ROMs.
build_emulator() {
    local tar folder
    tar=$(debian_tar kvm-host-bochs "$machine_recipe-bochs")
    folder=$BULKHEAD_CACHE/kvm-host/$(digest "${tar##*/}" "$(declare -f unpack_bochs)").bochs
    if [[ ! -d $folder ]]; then locked kvm-host unpack_bochs "$tar" "$folder"; fi
    echo "$folder"
}

unpack_bochs() {
    local tar=$1 folder=$2
    [[ -d $folder ]] && return 0
    rm -rf "$folder.new"
    mkdir -p "$folder.new"
    tar -xf "$tar" -C "$folder.new" --no-same-owner ./bochs ./bios ./vgabios
    mv -T "$folder.new" "$folder"
    find "${folder%/*}" -maxdepth 1 -name '*.bochs' ! -path "$folder" -mtime +7 -exec rm -rf {} +
}

# emulator_command DISK KERNEL EMULATOR: makes what the machine starts from, and sets `emulator`.
emulator_command() {
    local disk=$1 kernel=$2 bochs=$3 mib
    case $MEMORY in
        1G) mib=1024 ;;
        2G) mib=2048 ;;
        *) die "invalid memory size \`$MEMORY\` for the emulated Intel machine: must be 1G or 2G" ;;
    esac
    make_boot_disc "$kernel"
    make_share_disk
    # A line that parsers of this file look for comes first.
    printf '# slirp config\nhostfwd = tcp:127.0.0.1:%d-:22\n' "$(cat "$RUN/port")" >"$RUN/slirp.conf"
    # skylake_x and later tell Linux another clock rate than `ips`, and an XSAVE size that it rejects. With
    # sync=slowdown an idle machine takes no CPU. Disks in the mode `volatile` keep what is written in an unlinked file.
    cat >"$RUN/bochsrc" <<END
display_library: nogui
config_interface: textconfig
memory: guest=$mib, host=$mib
cpu: model=corei7_haswell_4770, count=$CPUS, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=slowdown, time0=utc
romimage: file="$bochs/bios"
vgaromimage: file="$bochs/vgabios"
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, mode=volatile, path="$disk"
ata0-slave: type=cdrom, path="$RUN/boot.iso", status=inserted
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=disk, mode=volatile, path="$share_disk"
boot: cdrom
com1: enabled=1, mode=file, dev="$RUN/console.log"
pci: enabled=1, chipset=i440fx
e1000: enabled=1, mac=52:54:00:12:34:56, ethmod=slirp, script="$RUN/slirp.conf"
log: -
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
END
    emulator=("$bochs/bochs" -q -f "$RUN/bochsrc")
}

# make_boot_disc KERNEL: makes boot.iso: Bochs loads no kernel by itself.
make_boot_disc() {
    local kernel=$1
    need_packages xorriso isolinux syslinux-common e2fsprogs
    mkdir "$RUN/boot"
    cp "$kernel/bzImage" /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$RUN/boot"
    printf 'DEFAULT linux\nLABEL linux\nKERNEL /bzImage\nAPPEND root=/dev/sda %s\n' "$KERNEL_COMMAND_LINE" \
        >"$RUN/boot/isolinux.cfg"
    xorriso -as mkisofs -quiet -o "$RUN/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
        -boot-info-table "$RUN/boot" >"$RUN/xorriso.log" 2>&1 ||
        die "xorriso could not make the boot disc: $(tail -n 1 "$RUN/xorriso.log")"
    rm -r "${RUN:?}/boot"
}

# make_share_disk: makes the second disk from the control directory and copies of the files that the first command needs.
make_share_disk() {
    local tree=$share_disk.tree
    rm -rf "$tree" "$share_disk"
    mkdir -p "$tree"
    cp -a "$RUN/control" "$tree/control"
    list_files "${command[@]}" >"$RUN/brought"
    pack_files "$RUN/brought" | tar -xf - -C "$tree"
    truncate -s 8G "$share_disk"
    mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=1,root_owner=0:0,nodiscard -m 0 -d "$tree" "$share_disk"
    rm -r "$tree"
}

# list_files CMD…: prints the files that the machine needs for CMD: the checkout's, the host program, the guest image,
# and those that CMD and the variables BULKHEAD_* name, with the directories of the cache among them. A line is
# `TIME SIZE<tab>PATH`.
list_files() {
    local named=("$@" "$target/debug/bulkhead" "$target/release/bulkhead" "$BULKHEAD_CACHE/image/current") word path
    while IFS= read -r word; do named+=("${!word}"); done < <(compgen -e BULKHEAD_)
    {
        git -C "$BULKHEAD_REPO" ls-files -z --cached --others --exclude-standard | sed -z "s|^|$BULKHEAD_REPO/|"
        for word in "${named[@]}"; do
            path=$(realpath -e -- "$word" 2>/dev/null) && visible "$path" || continue
            # A link, besides the file that it leads to.
            [[ ! -L $word ]] || printf '%s\0' "$word"
            if [[ -f $path || $path == "$BULKHEAD_CACHE"/*/* ]]; then find "$path" -type f -print0; fi
        done
    } | sort -zu | { xargs -0r stat --printf='%Y %s\t%n\n' 2>/dev/null || true; }
}

# pack_files LIST: writes a tar with the files of LIST, lines as list_files prints them.
pack_files() { cut -f 2 "$1" | sed 's|^/||' | tar -C / -cf - --no-recursion --verbatim-files-from --files-from=-; }

# bring_files CMD…: copies what is new or has changed since it was last copied into the running machine.
bring_files() {
    rm -f "$share_disk"
    list_files "$@" | LC_ALL=C sort >"$RUN/wanted"
    LC_ALL=C sort -o "$RUN/brought" "$RUN/brought"
    LC_ALL=C comm -23 "$RUN/wanted" "$RUN/brought" >"$RUN/new"
    [[ -s $RUN/new ]] || return 0
    say "kvm-host $NAME: copying $(wc -l <"$RUN/new") files into the machine"
    (instance_connect root)
    pack_files "$RUN/new" | gzip -1 | instance_ssh root tar -xzf - -C / || die "cannot copy files into the machine"
    cat "$RUN/new" >>"$RUN/brought"
}
