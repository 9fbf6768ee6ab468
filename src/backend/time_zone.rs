//! The host's time zone or the one of the setting `timeZone`, for containers that mount `/etc/localtime` or
//! `/etc/timezone`.

use std::{
    fs::{self, OpenOptions},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use bulkhead_protocol::{MAX_TIME_ZONE, TimeZone};

use crate::settings::Zone;

/// The rules (tzfile(5)), on most hosts a link into the tz database.
const RULES: &str = "/etc/localtime";

/// The name, on Debian and its kin.
const NAME: &str = "/etc/timezone";

/// The host's tz database.
const ZONES: &str = "/usr/share/zoneinfo";

/// Its directory, on any host, in whose files' paths the name is.
const DATABASE: &str = "/zoneinfo/";

/// The first bytes of a file of rules.
const MAGIC: &[u8] = b"TZif";

/// Longest name in bytes; more of the file is not read.
const MAX_NAME: u64 = 255;

/// A time zone that this host does not know.
#[derive(Debug, thiserror::Error)]
#[error("no time zone {0} in {ZONES}; install tzdata, or set another one with `bulkhead settings set timeZone NAME`")]
pub struct UnknownZone(String);

/// Returns the time zone; `None` for a host that has none, or no usable one, which is in UTC.
pub(super) fn load(zone: Zone) -> Result<Option<TimeZone>, UnknownZone> {
    match zone {
        Zone::OfHost => Ok(load_from(Path::new(RULES), Path::new(NAME))),
        Zone::Named(name) => load_named(Path::new(ZONES), &name).map(Some).ok_or(UnknownZone(name)),
    }
}

fn load_named(zones: &Path, name: &str) -> Option<TimeZone> {
    Some(TimeZone { name: Some(name.to_owned()), rules: rules(&zones.join(name))? })
}

fn load_from(rules: &Path, name: &Path) -> Option<TimeZone> {
    let contents = self::rules(rules)?;
    let written = || String::from_utf8(read(name, MAX_NAME)?).ok();
    let linked = || Some(fs::canonicalize(rules).ok()?.to_str()?.split_once(DATABASE)?.1.to_owned());
    // The link is what programs go by; a file beside it can be out of date.
    let name = linked().or_else(written).map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
    Some(TimeZone { name, rules: contents })
}

/// Reads a file of rules.
fn rules(path: &Path) -> Option<Vec<u8>> {
    let rules = read(path, MAX_TIME_ZONE as u64 + 1)?;
    (rules.starts_with(MAGIC) && rules.len() <= MAX_TIME_ZONE).then_some(rules)
}

/// Reads the start of a regular file.
fn read(path: &Path, limit: u64) -> Option<Vec<u8>> {
    // A FIFO would keep the start waiting.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
    let mut contents = Vec::new();
    file.metadata().ok().filter(fs::Metadata::is_file)?;
    file.take(limit).read_to_end(&mut contents).ok()?;
    Some(contents)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use bulkhead_protocol::{HostMessage, MAX_LINE, encode};

    use super::*;

    #[test]
    fn the_name_is_that_of_the_link_and_without_one_that_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("zoneinfo/Europe")).unwrap();
        fs::write(at("zoneinfo/Europe/Berlin"), b"TZif2 rules").unwrap();
        symlink("zoneinfo/Europe/Berlin", at("localtime")).unwrap();
        fs::write(at("plain"), b"TZif2 rules").unwrap();
        fs::write(at("timezone"), "Asia/Tokyo\n").unwrap();
        let zone =
            |name: Option<&str>| Some(TimeZone { name: name.map(str::to_owned), rules: b"TZif2 rules".to_vec() });
        assert_eq!(load_from(&at("localtime"), &at("timezone")), zone(Some("Europe/Berlin")));
        assert_eq!(load_from(&at("plain"), &at("timezone")), zone(Some("Asia/Tokyo")));
        assert_eq!(load_from(&at("plain"), &at("missing")), zone(None));
    }

    #[test]
    fn a_zone_by_its_name_is_one_of_the_hosts_database() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("Asia")).unwrap();
        fs::write(directory.path().join("Asia/Tokyo"), b"TZif2 rules").unwrap();
        let zone = TimeZone { name: Some("Asia/Tokyo".to_owned()), rules: b"TZif2 rules".to_vec() };
        assert_eq!(load_named(directory.path(), "Asia/Tokyo"), Some(zone));
        for name in ["Asia", "Asia/Atlantis"] {
            assert_eq!(load_named(directory.path(), name), None, "{name}");
        }
        let unknown = load(Zone::Named("Asia/Atlantis".to_owned())).unwrap_err().to_string();
        assert!(unknown.contains("no time zone Asia/Atlantis") && unknown.contains("install tzdata"), "{unknown}");
        assert!(load(Zone::OfHost).is_ok());
    }

    #[test]
    fn what_is_no_file_of_rules_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("text"), "Europe/Berlin\n").unwrap();
        fs::write(at("long"), [MAGIC, &[0; MAX_TIME_ZONE]].concat()).unwrap();
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["text", "long", "fifo", "missing", ""] {
            assert_eq!(load_from(&at(name), &at("missing")), None, "{name}");
        }
    }

    #[test]
    fn the_longest_zone_fits_a_line_of_the_protocol() {
        let zone = TimeZone { name: Some("x".repeat(255)), rules: vec![255; MAX_TIME_ZONE] };
        assert!(encode(&HostMessage::TimeZone(zone)).unwrap().len() < MAX_LINE);
    }
}
