//! Finds and checks the guest image: the kernel and the root file system.
//!
//! Where the policy locks isolation on, this is also where an image of the user's own is refused: another root file
//! system could leave the isolation out.

mod format;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{
    hex::hex,
    root_owned::{self, NotRoots},
    settings::Base,
};

/// The command that builds an image.
const BUILD: &str = "build it with `scripts/image`";

const KERNEL: &str = "vmlinux";
const ROOTFS: &str = "rootfs.erofs";
const MANIFEST: &str = "manifest.json";

/// An image that cannot be found or used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No directory has an image.
    #[error("no guest image found (looked in {}); {BUILD}{remedy}", list(.directories))]
    Missing {
        /// The directories that could have one.
        directories: Vec<PathBuf>,
        /// Another remedy than building one.
        remedy: &'static str,
    },
    /// A named image under a policy that locks isolation on.
    #[error(
        "enhancedContainerIsolation is locked by {0}, so no other guest image can be named; leave out --kernel and \
         --rootfs, and unset BULKHEAD_KERNEL and BULKHEAD_ROOTFS"
    )]
    Locked(PathBuf),
    /// An image that the user can change, under a policy that locks isolation on.
    #[error(
        "enhancedContainerIsolation is locked by {}, so the guest image must be one that only root can change, but \
         {problem}; use the bulkhead of an installed package, or ask the administrator to install one",
        lock.display()
    )]
    NotRoots {
        /// The policy.
        lock: PathBuf,
        /// The place that is not root's.
        problem: NotRoots,
    },
    /// Only one of the two files is named.
    #[error("the kernel and the root file system go together: give both --kernel and --rootfs, or neither")]
    Half,
    /// A file that cannot be read.
    #[error("cannot read {path}; {BUILD}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// A manifest that is not valid.
    #[error("{path} is damaged; {BUILD} again")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// The error of the parser.
        #[source]
        source: serde_json::Error,
    },
    /// A file that is truncated, changed or of another format.
    #[error("{path} {problem}; {BUILD} again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The problem, as the end of a sentence about the path.
        problem: String,
    },
}

fn list(directories: &[PathBuf]) -> String {
    directories.iter().map(|directory| directory.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[derive(Clone, Debug, Deserialize)]
struct Manifest {
    version: String,
    files: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, Deserialize)]
struct Entry {
    size: u64,
    sha256: String,
}

/// A guest image whose files exist, have the right size and the right format.
#[derive(Clone, Debug)]
pub struct Image {
    /// ELF vmlinux or bzImage.
    pub kernel: PathBuf,
    /// EROFS root file system.
    pub rootfs: PathBuf,
    manifest: Option<Manifest>,
}

impl Image {
    /// Finds the image: the two named files, else `BULKHEAD_KERNEL` and `BULKHEAD_ROOTFS`, else the first that is in
    /// the user's data directory, in `../share/bulkhead` beside the program, or in the user's cache directory.
    ///
    /// With `lock`, the policy that locks isolation on, naming an image is an error, one that is installed beside the
    /// program is preferred to those in the user's directories, and it must be root's with all directories on the way.
    pub fn find(
        base: &Base,
        kernel: Option<&Path>,
        rootfs: Option<&Path>,
        lock: Option<&Path>,
    ) -> Result<Self, ImageError> {
        // An empty variable counts as unset, as `BULKHEAD_KERNEL= bulkhead start` is meant.
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let options = (kernel.map(Path::to_owned), rootfs.map(Path::to_owned));
        let variables = (variable("BULKHEAD_KERNEL"), variable("BULKHEAD_ROOTFS"));
        let image = Self::choose(base, [options, variables], lock)?;
        if let Some(lock) = lock {
            let roots = root_owned::check(&image.kernel).and_then(|()| root_owned::check(&image.rootfs));
            roots.map_err(|problem| ImageError::NotRoots { lock: lock.to_owned(), problem })?;
        }
        Ok(image)
    }

    /// Chooses among pairs of named files, the first pair first, and the directories.
    fn choose(
        base: &Base,
        named: [(Option<PathBuf>, Option<PathBuf>); 2],
        lock: Option<&Path>,
    ) -> Result<Self, ImageError> {
        for pair in named {
            match (pair, lock) {
                ((None, None), _) => {}
                // Before the pair is checked for completeness: half a pair is as much of an attempt.
                (_, Some(file)) => return Err(ImageError::Locked(file.to_owned())),
                // Without a manifest: the two need not be of one build.
                ((Some(kernel), Some(rootfs)), None) => return Self { kernel, rootfs, manifest: None }.checked(),
                _ => return Err(ImageError::Half),
            }
        }
        let directories = directories(base, lock.is_some());
        // One file is enough to choose a directory. A copy that broke off is then an error, instead of another image
        // that is used without a word.
        let has_one = |directory: &&PathBuf| directory.join(KERNEL).exists() || directory.join(MANIFEST).exists();
        if let Some(directory) = directories.iter().find(has_one) {
            return Self::in_directory(directory);
        }
        let remedy = if lock.is_some() { "" } else { ", or name one with --kernel and --rootfs" };
        Err(ImageError::Missing { directories, remedy })
    }

    fn in_directory(directory: &Path) -> Result<Self, ImageError> {
        // The cache's directory is a link to the newest build. Resolved once, so that a build which replaces it
        // meanwhile cannot mix its files with those of the old one.
        let directory =
            fs::canonicalize(directory).map_err(|source| ImageError::Io { path: directory.to_owned(), source })?;
        let path = directory.join(MANIFEST);
        let manifest = match fs::read(&path) {
            Ok(text) => Some(serde_json::from_slice(&text).map_err(|source| ImageError::Manifest { path, source })?),
            // An image that was put together by hand may have none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(ImageError::Io { path, source }),
        };
        Self { kernel: directory.join(KERNEL), rootfs: directory.join(ROOTFS), manifest }.checked()
    }

    fn checked(mut self) -> Result<Self, ImageError> {
        for path in [&mut self.kernel, &mut self.rootfs] {
            // Made absolute: the process that opens it may have another working directory.
            *path = fs::canonicalize(&*path).map_err(|source| ImageError::Io { path: path.clone(), source })?;
        }
        // The quick checks, because each start makes them. `doctor` also compares the digests, for which it reads both
        // files completely (`verify`).
        self.check_size(KERNEL, &self.kernel)?;
        self.check_size(ROOTFS, &self.rootfs)?;
        check_format(&self.kernel, format::kernel)?;
        check_format(&self.rootfs, format::erofs)?;
        Ok(self)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.manifest.as_ref()?.files.get(name)
    }

    fn check_size(&self, name: &str, path: &Path) -> Result<(), ImageError> {
        let size = fs::metadata(path).map_err(|source| ImageError::Io { path: path.to_owned(), source })?.len();
        match self.entry(name) {
            Some(entry) if entry.size != size => Err(ImageError::Damaged {
                path: path.to_owned(),
                problem: format!("has {size} bytes, but its manifest says {}", entry.size),
            }),
            _ => Ok(()),
        }
    }

    /// The image's version, if it has a manifest.
    pub fn version(&self) -> Option<&str> {
        self.manifest.as_ref().map(|manifest| manifest.version.as_str())
    }

    /// Reads both files completely and compares their digests with the manifest's; without a manifest it does nothing.
    pub fn verify(&self) -> Result<(), ImageError> {
        for (name, path) in [(KERNEL, &self.kernel), (ROOTFS, &self.rootfs)] {
            let Some(entry) = self.entry(name) else { continue };
            let digest = digest(path).map_err(|source| ImageError::Io { path: path.clone(), source })?;
            if !digest.eq_ignore_ascii_case(&entry.sha256) {
                return Err(ImageError::Damaged {
                    path: path.clone(),
                    problem: "does not match the SHA-256 in its manifest".into(),
                });
            }
        }
        Ok(())
    }
}

fn directories(base: &Base, installed_first: bool) -> Vec<PathBuf> {
    let beside =
        std::env::current_exe().ok().and_then(|program| Some(program.parent()?.parent()?.join("share/bulkhead")));
    // The user can write to two of the three, the data and the cache directory. Under a lock those come last.
    let mut directories = [Some(base.data_image()), beside, Some(base.cached_image())];
    if installed_first {
        directories.swap(0, 1);
    }
    directories.into_iter().flatten().collect()
}

fn check_format(
    path: &Path,
    check: fn(&mut File, u64) -> io::Result<Result<(), &'static str>>,
) -> Result<(), ImageError> {
    let io_error = |source| ImageError::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(io_error)?;
    let metadata = file.metadata().map_err(io_error)?;
    // The outer error is one of reading, the inner one is about the contents.
    let problem =
        if metadata.is_file() { check(&mut file, metadata.len()).map_err(io_error)? } else { Err("is not a file") };
    problem.map_err(|problem| ImageError::Damaged { path: path.to_owned(), problem: problem.into() })
}

fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    // In pieces: the root file system has hundreds of MiB.
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            length => hasher.update(&buffer[..length]),
        }
    }
    Ok(hex(&hasher.finalize()))
}

/// Entry points of the fuzz targets into this module.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    use std::{fs::File, io::Write};

    use super::{Manifest, format};

    /// Parses a manifest.
    pub fn manifest(text: &[u8]) {
        let _ = serde_json::from_slice::<Manifest>(text);
    }

    /// Checks `contents` as a kernel and as a root file system; `file` is open for reading and writing.
    pub fn formats(file: &mut File, contents: &[u8]) -> std::io::Result<()> {
        file.set_len(0)?;
        std::io::Seek::rewind(file)?;
        file.write_all(contents)?;
        let _ = format::kernel(file, contents.len() as u64)?;
        let _ = format::erofs(file, contents.len() as u64)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{format::samples, *};

    fn directory(manifest: Option<&str>) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(KERNEL), samples::elf()).unwrap();
        fs::write(directory.path().join(ROOTFS), samples::erofs()).unwrap();
        if let Some(manifest) = manifest {
            fs::write(directory.path().join(MANIFEST), manifest).unwrap();
        }
        directory
    }

    fn manifest(kernel: &[u8], rootfs: &[u8]) -> String {
        let entry =
            |bytes: &[u8]| format!("{{\"size\": {}, \"sha256\": \"{}\"}}", bytes.len(), hex(&Sha256::digest(bytes)));
        format!(
            "{{\"version\": \"7\", \"files\": {{\"{KERNEL}\": {}, \"{ROOTFS}\": {}}}}}",
            entry(kernel),
            entry(rootfs)
        )
    }

    #[test]
    fn a_whole_image_is_accepted_and_verified() {
        let directory = directory(Some(&manifest(&samples::elf(), &samples::erofs())));
        let image = Image::in_directory(directory.path()).unwrap();
        assert_eq!(image.version(), Some("7"));
        image.verify().unwrap();
    }

    #[test]
    fn a_truncated_file_is_refused_with_its_path_and_remedy() {
        let directory = directory(Some(&manifest(&samples::elf(), &samples::erofs())));
        let path = directory.path().join(ROOTFS);
        File::options().write(true).open(&path).unwrap().set_len(2048).unwrap();
        let message = Image::in_directory(directory.path()).unwrap_err().to_string();
        assert!(message.contains("rootfs.erofs has 2048 bytes"), "{message}");
        assert!(message.contains("scripts/image"), "{message}");
    }

    #[test]
    fn a_truncated_file_is_noticed_without_a_manifest_too() {
        let directory = directory(None);
        let path = directory.path().join(ROOTFS);
        File::options().write(true).open(&path).unwrap().set_len(2048).unwrap();
        assert!(matches!(Image::in_directory(directory.path()), Err(ImageError::Damaged { .. })));
    }

    #[test]
    fn a_changed_byte_is_found_by_the_full_check_only() {
        let directory = directory(Some(&manifest(&samples::elf(), &samples::erofs())));
        let mut rootfs = samples::erofs();
        *rootfs.last_mut().unwrap() ^= 1;
        fs::write(directory.path().join(ROOTFS), rootfs).unwrap();
        let image = Image::in_directory(directory.path()).unwrap();
        assert!(matches!(image.verify(), Err(ImageError::Damaged { .. })));
    }

    fn base(home: &Path) -> Base {
        Base::from_variables(|name| (name == "HOME").then(|| home.to_owned()), 0).unwrap()
    }

    #[test]
    fn under_a_lock_no_image_can_be_named_and_the_default_one_is_used() {
        let (home, mine, file) = (tempfile::tempdir().unwrap(), directory(None), Path::new("/policy.json"));
        let directory = fs::canonicalize(mine.path()).unwrap();
        let (kernel, rootfs) = (Some(directory.join(KERNEL)), Some(directory.join(ROOTFS)));
        let (base, nothing) = (base(home.path()), (None, None));
        let pairs = [(kernel.clone(), rootfs.clone()), (kernel.clone(), None), (None, rootfs)];
        for pair in pairs.clone() {
            for named in [[pair.clone(), nothing.clone()], [nothing.clone(), pair]] {
                let message = Image::choose(&base, named, Some(file)).unwrap_err().to_string();
                assert!(message.starts_with("enhancedContainerIsolation is locked by /policy.json, "), "{message}");
            }
        }
        for named in [[pairs[0].clone(), nothing.clone()], [nothing.clone(), pairs[0].clone()]] {
            assert_eq!(Image::choose(&base, named, None).unwrap().kernel, kernel.clone().unwrap());
        }
        let default = || Image::choose(&base, [nothing.clone(), nothing.clone()], Some(file));
        let missing = default().unwrap_err().to_string();
        assert!(missing.contains("no guest image found") && !missing.contains("--kernel"), "{missing}");
        fs::create_dir_all(base.cached_image().parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&directory, base.cached_image()).unwrap();
        assert_eq!(default().unwrap().kernel, kernel.unwrap());
    }

    #[test]
    fn under_a_lock_an_installed_image_goes_before_a_persons() {
        let home = tempfile::tempdir().unwrap();
        let base = base(home.path());
        let (free, locked) = (directories(&base, false), directories(&base, true));
        assert_eq!((&free[0], &free[2]), (&base.data_image(), &base.cached_image()));
        assert_eq!(locked, [free[1].clone(), free[0].clone(), free[2].clone()]);
        assert!(locked[0].ends_with("share/bulkhead"), "{locked:?}");
    }

    #[test]
    fn a_damaged_manifest_is_named() {
        let directory = directory(Some("{"));
        assert!(matches!(Image::in_directory(directory.path()), Err(ImageError::Manifest { .. })));
    }
}
