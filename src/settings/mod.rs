//! Settings of a profile: what a person may set, where it is kept, and the names and paths around it.

mod paths;
mod profile;
mod size;

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Map, Value};

pub use self::{
    paths::{Base, PathError, Paths},
    profile::{InvalidName, ProfileName},
    size::{InvalidSize, Size},
};

/// Largest settings file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Why settings could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// No such setting.
    #[error("there is no setting `{0}`; `bulkhead settings list` shows all")]
    UnknownKey(String),
    /// The value does not fit the setting.
    #[error("`{value}` is no value for {key}: {expected}")]
    InvalidValue {
        /// The setting.
        key: &'static str,
        /// What was given.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// The file is not a JSON object.
    #[error("{path} is not a JSON object; correct or remove it")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said, if it is no JSON at all.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The file cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The folder cannot be used.
    #[error(transparent)]
    Path(#[from] PathError),
}

/// What kind of value a setting takes.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `true` or `false`.
    Bool {
        /// When it is not set.
        default: bool,
    },
    /// A whole number.
    Integer {
        /// Smallest accepted value.
        min: u64,
        /// Largest accepted value.
        max: u64,
        /// When it is not set; `None` means that it follows the host.
        default: Option<u64>,
    },
    /// One of some words.
    Choice {
        /// The words; the first is the default.
        values: &'static [&'static str],
    },
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Its name in `settings.json` and on the command line.
    pub key: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// One line for a person.
    pub description: &'static str,
}

/// Every setting there is.
pub const DEFINITIONS: [Definition; 5] = [
    Definition {
        key: "enhancedContainerIsolation",
        kind: Kind::Bool { default: true },
        description: "run every container in a user namespace of its own",
    },
    Definition {
        key: "cpus",
        kind: Kind::Integer { min: 1, max: 32, default: None },
        description: "virtual CPUs (default: half of the host's)",
    },
    Definition {
        key: "memoryMiB",
        kind: Kind::Integer { min: 256, max: 1 << 24, default: None },
        description: "guest memory in MiB (default: a quarter of the host's)",
    },
    Definition {
        key: "diskGiB",
        kind: Kind::Integer { min: 1, max: 16_383, default: Some(64) },
        description: "largest size of the data disk in GiB; it grows, never shrinks",
    },
    Definition {
        key: "network",
        kind: Kind::Choice { values: &["none", "user"] },
        description: "what the VM is connected to: the host's network through a process of this user, or nothing",
    },
];

impl Definition {
    /// The setting of this name.
    pub fn find(key: &str) -> Result<&'static Self, SettingsError> {
        DEFINITIONS
            .iter()
            .find(|definition| definition.key == key)
            .ok_or_else(|| SettingsError::UnknownKey(key.to_owned()))
    }

    /// Reads a value as it is written on the command line.
    pub fn parse(&self, text: &str) -> Result<Value, SettingsError> {
        let value = match text {
            "on" => Value::Bool(true),
            "off" => Value::Bool(false),
            _ => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned())),
        };
        self.check(&value)?;
        Ok(value)
    }

    fn check(&self, value: &Value) -> Result<(), SettingsError> {
        let (fits, expected) = match self.kind {
            Kind::Bool { .. } => (value.is_boolean(), "write true or false".to_owned()),
            Kind::Integer { min, max, .. } => (
                value.as_u64().is_some_and(|number| (min..=max).contains(&number)),
                format!("write a whole number from {min} to {max}"),
            ),
            Kind::Choice { values } => {
                (value.as_str().is_some_and(|word| values.contains(&word)), format!("write {}", values.join(" or ")))
            }
        };
        if fits {
            return Ok(());
        }
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        Err(SettingsError::InvalidValue { key: self.key, value, expected })
    }

    /// The value when nobody set one; `null` means that it follows the host.
    pub fn default_value(&self) -> Value {
        match self.kind {
            Kind::Bool { default } => default.into(),
            Kind::Integer { default, .. } => default.into(),
            Kind::Choice { values } => values.first().copied().into(),
        }
    }
}

/// What a person set; keys that this version does not know are kept as they are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    values: Map<String, Value>,
}

impl Settings {
    /// Reads the file; a missing one holds nothing.
    pub fn load(path: &Path) -> Result<Self, SettingsError> {
        let io_error = |source| SettingsError::Io { path: path.to_owned(), source };
        let text = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(io_error(error)),
            Ok(metadata) if metadata.len() > MAX_FILE => {
                return Err(io_error(io::Error::other("the file is too large for settings")));
            }
            Ok(_) => fs::read(path).map_err(io_error)?,
        };
        Self::parse(&text, path)
    }

    fn parse(text: &[u8], path: &Path) -> Result<Self, SettingsError> {
        let values = match serde_json::from_slice(text) {
            Ok(Value::Object(values)) => values,
            Ok(_) => return Err(SettingsError::Syntax { path: path.to_owned(), source: None }),
            Err(source) => return Err(SettingsError::Syntax { path: path.to_owned(), source: Some(source) }),
        };
        for definition in &DEFINITIONS {
            if let Some(value) = values.get(definition.key) {
                definition.check(value)?;
            }
        }
        Ok(Self { values })
    }

    /// The value that holds: the one set, else the default.
    pub fn get(&self, definition: &Definition) -> Value {
        self.values.get(definition.key).cloned().unwrap_or_else(|| definition.default_value())
    }

    /// Whether a person set it.
    pub fn is_set(&self, definition: &Definition) -> bool {
        self.values.contains_key(definition.key)
    }

    /// Enhanced Container Isolation.
    pub fn isolation(&self) -> bool {
        self.get(&DEFINITIONS[0]).as_bool().unwrap_or(true)
    }

    /// vCPUs, if set.
    pub fn cpus(&self) -> Option<u8> {
        self.get(&DEFINITIONS[1]).as_u64().and_then(|number| u8::try_from(number).ok())
    }

    /// Guest memory in MiB, if set.
    pub fn memory_mib(&self) -> Option<u64> {
        self.get(&DEFINITIONS[2]).as_u64()
    }

    /// Size of the data disk in GiB, if set.
    pub fn disk_gib(&self) -> Option<u64> {
        self.is_set(&DEFINITIONS[3]).then(|| self.get(&DEFINITIONS[3]).as_u64()).flatten()
    }

    /// Whether the VM has a network.
    pub fn network(&self) -> bool {
        self.get(&DEFINITIONS[4]) == "user"
    }

    /// Sets (`Some`) or unsets (`None`) one value in the profile's file, atomically and alone.
    pub fn update(paths: &Paths, definition: &Definition, value: Option<Value>) -> Result<(), SettingsError> {
        let folder = paths.create_config()?;
        let path = paths.settings();
        let io_error = |source| SettingsError::Io { path: path.clone(), source };
        // Two writers at once must not lose one of the two changes.
        let lock = File::open(&folder).map_err(io_error)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| io_error(errno.into()))?;
        let mut settings = Self::load(&path)?;
        match value {
            Some(value) => {
                definition.check(&value)?;
                settings.values.insert(definition.key.to_owned(), value);
            }
            None => {
                settings.values.remove(definition.key);
            }
        }
        replace(&folder, &path, &Value::Object(settings.values)).map_err(io_error)?;
        drop(lock);
        Ok(())
    }
}

fn replace(folder: &Path, path: &Path, value: &Value) -> io::Result<()> {
    let new = folder.join(".settings.json.new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    writeln!(file, "{value:#}")?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// What the fuzz targets reach of this room.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    use super::{DEFINITIONS, Path, Settings};

    /// Reads a settings file, and a value as the command line gives it.
    pub fn settings(text: &[u8]) {
        if let Ok(settings) = Settings::parse(text, Path::new("settings.json")) {
            for definition in &DEFINITIONS {
                // What was accepted holds when it is looked at again.
                assert!(!settings.is_set(definition) || definition.check(&settings.get(definition)).is_ok());
            }
        }
        if let Ok(text) = std::str::from_utf8(text) {
            for definition in &DEFINITIONS {
                if let Ok(value) = definition.parse(text) {
                    assert!(definition.check(&value).is_ok(), "{} = {text}", definition.key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        Settings::parse(text.as_bytes(), Path::new("settings.json"))
    }

    #[test]
    fn isolation_is_on_unless_it_is_set_to_false() {
        assert!(Settings::default().isolation());
        assert!(!parse(r#"{"enhancedContainerIsolation": false}"#).unwrap().isolation());
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_refused_and_never_read_as_the_default() {
        for text in [
            r#"{"enhancedContainerIsolation": "false"}"#,
            r#"{"enhancedContainerIsolation": null}"#,
            r#"{"cpus": 0}"#,
            r#"{"cpus": 33}"#,
            r#"{"memoryMiB": -1}"#,
            r#"{"diskGiB": 1.5}"#,
            r#"{"network": "bridge"}"#,
            r#"{"network": false}"#,
        ] {
            assert!(matches!(parse(text), Err(SettingsError::InvalidValue { .. })), "{text}");
        }
    }

    #[test]
    fn definitions_are_in_the_order_that_the_getters_use() {
        let keys: Vec<_> = DEFINITIONS.iter().map(|definition| definition.key).collect();
        assert_eq!(keys, ["enhancedContainerIsolation", "cpus", "memoryMiB", "diskGiB", "network"]);
    }

    #[test]
    fn an_unknown_key_is_kept_when_another_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("settings.json");
        fs::write(&path, r#"{"fromTheFuture": [1], "cpus": 2}"#).unwrap();
        let mut settings = Settings::load(&path).unwrap();
        settings.values.remove("cpus");
        replace(folder.path(), &path, &Value::Object(settings.values)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\n  \"fromTheFuture\": [\n    1\n  ]\n}\n");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Settings::parse(&bytes, Path::new("settings.json"));
        }

        #[test]
        fn a_number_in_range_reads_back(cpus in 1_u8..=32) {
            let value = DEFINITIONS[1].parse(&cpus.to_string()).unwrap();
            let text = format!("{{\"cpus\": {value}}}");
            prop_assert_eq!(parse(&text).unwrap().cpus(), Some(cpus));
        }
    }
}
