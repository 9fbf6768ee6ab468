//! A guest image's manifest, kernel and root file system.
#![no_main]

use std::{fs::File, sync::LazyLock};

use bulkhead::image::fuzzing::{formats, manifest};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};

static IMAGE: LazyLock<File> =
    LazyLock::new(|| File::from(memfd_create(c"image", MFdFlags::MFD_CLOEXEC).expect("a file in memory")));

fuzz_target!(|contents: &[u8]| {
    manifest(contents);
    formats(&mut IMAGE.try_clone().expect("a descriptor"), contents).expect("a file in memory can be read");
});
