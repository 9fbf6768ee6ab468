//! The certificate authorities that the host trusts, for the engine.
//!
//! They are read at each boot and reach the agent as messages before its configuration. They replace the list of the
//! guest image: an authority that the host does not trust is not trusted by the engine either.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use bulkhead_protocol::{HostMessage, MAX_CERTIFICATES};

use crate::root_owned;

/// Bundles of all authorities by distribution: Debian and most others, Fedora, RHEL, openSUSE, Alpine.
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Largest file that is read, in bytes; bundles have comments beside the certificates.
const MAX_FILE: u64 = 8 << 20;

/// Longest text of one message in bytes. JSON writes each line feed as two, and the line has to stay below the
/// protocol's limit.
const MAX_PART: usize = 48 * 1024;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Reason that the guest does not receive the host's authorities; it then trusts those of its own image.
#[derive(Debug, thiserror::Error)]
pub(super) enum CertificatesError {
    /// The file cannot be read.
    #[error(
        "the engine uses the guest image's certificate authorities instead of this machine's: cannot read {}",
        .0.display()
    )]
    Read(PathBuf, #[source] io::Error),
    /// The file contains no certificate.
    #[error(
        "the engine uses the guest image's certificate authorities instead of this machine's: {} has none",
        .0.display()
    )]
    Empty(PathBuf),
    /// The file exceeds the protocol's limit.
    #[error(
        "the engine uses the guest image's certificate authorities instead of this machine's: {} has more than {} \
         MiB of them",
        .0.display(), MAX_CERTIFICATES >> 20
    )]
    TooMany(PathBuf),
}

/// The file of the host's certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The one that the user chose with `SSL_CERT_FILE`.
    Named(PathBuf),
    /// The bundle of the host's distribution.
    Bundle,
    /// That bundle, if only root can change it; otherwise the list of the guest image.
    RootsBundle,
}

/// Returns the host's certificates as messages.
pub(super) fn load(source: &Source) -> Result<Vec<HostMessage>, CertificatesError> {
    let bundle = || BUNDLES.iter().map(Path::new).find(|path| path.is_file());
    let path = match source {
        Source::Named(path) => Some(path.as_path()),
        Source::Bundle => bundle(),
        Source::RootsBundle => bundle().filter(|path| root_owned::check(path).is_ok()),
    };
    // A host without a bundle is normal, and the image's own list will do.
    let Some(path) = path else { return Ok(Vec::new()) };
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
    read.map_err(|error| CertificatesError::Read(path.to_owned(), error))?;
    let parts = parts(&String::from_utf8_lossy(&text));
    // An incomplete list is worse than the image's: some registries would fail and others not.
    match parts.iter().map(String::len).sum() {
        0 => Err(CertificatesError::Empty(path.to_owned())),
        len if len > MAX_CERTIFICATES || text.len() as u64 == MAX_FILE => {
            Err(CertificatesError::TooMany(path.to_owned()))
        }
        _ => Ok(parts.into_iter().map(|pem| HostMessage::Certificates { pem }).collect()),
    }
}

/// Returns the certificates of a bundle (RFC 7468), without its comments and anything else in it.
///
/// The user may have named a file with a private key: nothing outside of complete certificates leaves the host.
fn certificates(text: &str) -> impl Iterator<Item = String> {
    let mut lines = text.lines().map(str::trim);
    std::iter::from_fn(move || {
        'search: loop {
            lines.find(|line| *line == BEGIN)?;
            let mut certificate = format!("{BEGIN}\n");
            for line in lines.by_ref() {
                match line {
                    // An empty certificate is skipped like any other broken one.
                    END if certificate.len() > BEGIN.len() + 1 => {
                        certificate.push_str(END);
                        certificate.push('\n');
                        return Some(certificate);
                    }
                    "" => {}
                    // The next one starts before this one ended: start over with it.
                    BEGIN => certificate.truncate(BEGIN.len() + 1),
                    _ if is_base64(line) && certificate.len() < MAX_PART - 1024 => {
                        certificate.push_str(line);
                        certificate.push('\n');
                    }
                    // Not base64, or too long for a message: search for the next beginning.
                    _ => continue 'search,
                }
            }
            return None;
        }
    })
}

fn is_base64(line: &str) -> bool {
    line.len() <= 1000 && line.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte))
}

/// Packs whole certificates into texts of at most [`MAX_PART`] bytes.
fn parts(text: &str) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    for certificate in certificates(text) {
        match parts.last_mut() {
            Some(last) if last.len() + certificate.len() <= MAX_PART => last.push_str(&certificate),
            _ => parts.push(certificate),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::encode;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_comments_and_broken_certificates_stay_here() {
        let text = format!(
            "# Root\n-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n{BEGIN}\r\nAAAA\r\nBB==\r\n{END}\r\n\
             {BEGIN}\nno!\n{END}\n{BEGIN}\n{END}\n{BEGIN}\nCUT\n{BEGIN}\nDDDD\n{END}\n{BEGIN}\nEEEE\n"
        );
        let expected = format!("{BEGIN}\nAAAA\nBB==\n{END}\n{BEGIN}\nDDDD\n{END}\n");
        assert_eq!(parts(&text), [expected]);
    }

    #[test]
    fn a_file_without_certificates_or_no_file_is_an_error_and_no_empty_list() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        let load = |path: &Path| load(&Source::Named(path.to_owned()));
        assert!(matches!(load(&path), Err(CertificatesError::Read(..))));
        std::fs::write(&path, "nothing").unwrap();
        assert!(matches!(load(&path), Err(CertificatesError::Empty(_))));
        std::fs::write(&path, format!("{BEGIN}\n{}{END}\n", "A".repeat(999) + "\n").repeat(2200)).unwrap();
        assert!(matches!(load(&path), Err(CertificatesError::TooMany(_))));
    }

    proptest! {
        #[test]
        fn every_certificate_arrives_whole_and_every_message_fits_in_a_line(sizes in prop::collection::vec(1_usize..300, 1..60)) {
            let one = |(at, lines): (usize, &usize)| format!("{BEGIN}\n{}{END}\n", format!("{at:0>64}\n").repeat(*lines));
            let all: Vec<String> = sizes.iter().enumerate().map(one).collect();
            let parts = parts(&all.join("comment\n"));
            prop_assert_eq!(parts.concat(), all.concat());
            for pem in parts {
                let whole = pem.starts_with(BEGIN) && pem.trim_end().ends_with(END);
                let line = encode(&HostMessage::Certificates { pem });
                prop_assert!(whole && line.is_ok());
            }
        }

        #[test]
        fn no_text_makes_the_splitter_panic(text in "(-----(BEGIN|END) CERTIFICATE-----|[A-Za-z+/=]{0,5}|\n| |\r\n){0,40}") {
            for part in parts(&text) {
                prop_assert!(part.len() <= MAX_PART);
            }
        }
    }
}
