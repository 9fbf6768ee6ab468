# The emulated AMD machine: QEMU, whose CPU has SVM and nested paging. Sourced by scripts/kvm-host; the functions that it
# calls are named in scripts/lib/instance.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with scripts/kvm-host

readonly DEFAULT_CPUS=2 DEFAULT_MEMORY=6G
# Seconds from power on to sshd, at most.
readonly START_TIMEOUT=120

# build_emulator: prints the directory of the QEMU that emulates the machine: Debian's own with patches (see its recipe),
# and the libraries and ROMs of the machine's user land.
build_emulator() {
    local tar program folder
    tar=$(debian_tar kvm-host "$machine_recipe")
    program=$(debian_tar kvm-host-qemu "$machine_recipe-qemu")
    folder=$BULKHEAD_CACHE/kvm-host/$(digest "${tar##*/}" "${program##*/}" "$(declare -f unpack_qemu)").qemu
    if [[ ! -d $folder ]]; then locked kvm-host unpack_qemu "$tar" "$program" "$folder"; fi
    echo "$folder"
}

unpack_qemu() {
    local tar=$1 program=$2 folder=$3
    [[ -d $folder ]] && return 0
    rm -rf "$folder.new"
    mkdir -p "$folder.new"
    tar -xf "$tar" -C "$folder.new" --no-same-owner ./usr/lib/x86_64-linux-gnu ./usr/share/qemu ./usr/share/seabios
    tar -xf "$program" -C "$folder.new" --no-same-owner ./qemu-system-x86_64
    mv -T "$folder.new" "$folder"
    find "${folder%/*}" -maxdepth 1 -name '*.qemu' ! -path "$folder" -mtime +7 -exec rm -rf {} +
}

# emulator_command DISK KERNEL EMULATOR: sets `emulator`.
emulator_command() {
    local disk=$1 kernel=$2 qemu=$3 tag mode path
    # Without XSAVE: QEMU does not let a hypervisor intercept XSETBV, so its guests find their FPU state inconsistent.
    local libraries=$qemu/usr/lib/x86_64-linux-gnu
    # shellcheck disable=SC2054 # the commas are QEMU's
    emulator=(
        "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$qemu/qemu-system-x86_64"
        -L "$qemu/usr/share/qemu" -L "$qemu/usr/share/seabios"
        -name "bulkhead-kvm-host,process=kvm-host-$NAME"
        -nodefaults -no-user-config -no-reboot -display none
        -machine q35 -accel tcg,thread=multi -cpu 'EPYC-Milan,+svm,+npt,+nrip-save,-xsave,-avx,-avx2,-f16c,-fma,-pku'
        -smp "$CPUS" -m "$MEMORY"
        -kernel "$kernel/bzImage" -append "root=/dev/vda $KERNEL_COMMAND_LINE"
        -serial "file:$RUN/console.log"
        -drive "if=none,id=disk,file=$disk,format=raw,snapshot=on,cache=unsafe,discard=unmap"
        -device virtio-blk-pci,drive=disk
        -netdev "user,id=net,hostfwd=tcp:127.0.0.1:$(cat "$RUN/port")-:22" -device virtio-net-pci,netdev=net,romfile=
        -device virtio-rng-pci
        -fsdev "local,id=control,path=$RUN/control,security_model=none,readonly=on,multidevs=remap"
        -device virtio-9p-pci,fsdev=control,mount_tag=control
    )
    while read -r tag mode path; do
        local readonly=
        [[ $mode == ro ]] && readonly=,readonly=on
        emulator+=(
            -fsdev "local,id=$tag,path=$path,security_model=none,multidevs=remap$readonly"
            -device "virtio-9p-pci,fsdev=$tag,mount_tag=$tag"
        )
    done <"$RUN/control/shares"
}

# bring_files CMD…: nothing to do: the machine mounts the directories themselves.
bring_files() { :; }
