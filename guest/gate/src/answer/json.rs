//! A filter for JSON that passes in pieces: takes the shares' mount point off the paths that stand in known places.
//!
//! Only the strings in these places are held back until they are complete; labels, commands and variables of a container
//! can hold any text, which stays. JSON that is not well-formed passes, and so does any string that is very long.

use bulkhead_policy::shares::{self, MOUNT_POINT};

/// Longest string in a known place that is changed, in bytes: a path with every byte escaped, or a long message.
const MAX_STRING: usize = 64 * 1024;

/// Longest key that is compared with the known ones, in bytes.
const MAX_KEY: usize = 16;

/// Depth below which nothing is changed; the engine's documents have about ten levels.
const MAX_DEPTH: usize = 64;

/// The kind of document, which decides about the places of paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Places {
    /// None.
    None,
    /// Descriptions of containers, volumes and services.
    Descriptions,
    /// The message of an error.
    Error,
}

/// A key that the places are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Binds,
    Mounts,
    Source,
    Options,
    Device,
    State,
    Status,
    ErrorText,
    Message,
    Other,
}

impl Key {
    fn of(name: &[u8]) -> Self {
        match name {
            b"Binds" => Self::Binds,
            b"Mounts" => Self::Mounts,
            b"Source" => Self::Source,
            b"Options" => Self::Options,
            b"device" => Self::Device,
            b"State" => Self::State,
            b"Status" => Self::Status,
            b"Error" | b"Err" => Self::ErrorText,
            b"message" => Self::Message,
            _ => Self::Other,
        }
    }
}

/// An object or array that is open.
#[derive(Clone, Copy, Debug)]
struct Level {
    is_object: bool,
    /// The key of its object that it belongs to; of an element, that of the array.
    name: Key,
    is_element: bool,
    /// The last key of this object.
    key: Key,
    /// The next string is a key.
    expects_key: bool,
}

/// The form of a string in a known place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// `SOURCE:DESTINATION[:OPTIONS]`.
    Bind,
    /// A path.
    Path,
    /// A text with paths in it.
    Text,
}

/// The string that the filter is in, without its quotes.
#[derive(Debug)]
enum Position {
    /// Between strings.
    Outside,
    /// In a key, of which these bytes have passed.
    Key(Vec<u8>),
    /// In a string that passes.
    Passing,
    /// In a string of a known place, of which these bytes are held back.
    Held(Form, Vec<u8>),
}

/// The filter of one document, or of several after each other.
#[derive(Debug)]
pub(super) struct Filter {
    places: Places,
    levels: Vec<Level>,
    position: Position,
    /// The next byte belongs to an escape.
    escaped: bool,
    /// The nesting is deeper than is followed: the rest passes.
    lost: bool,
}

impl Filter {
    pub(super) fn new(places: Places) -> Self {
        Self { places, levels: Vec::new(), position: Position::Outside, escaped: false, lost: false }
    }

    /// Takes a piece, and returns what can be sent.
    pub(super) fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        let mut sent = Vec::with_capacity(piece.len());
        for (at, &byte) in piece.iter().enumerate() {
            if self.lost {
                sent.extend_from_slice(&piece[at..]);
                break;
            }
            match &mut self.position {
                Position::Outside => {
                    sent.push(byte);
                    self.outside(byte);
                }
                _ => self.inside(byte, &mut sent),
            }
        }
        sent
    }

    /// Returns what is still held back when the document has ended in the middle of a string.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        match std::mem::replace(&mut self.position, Position::Passing) {
            Position::Held(_, held) => held,
            _ => Vec::new(),
        }
    }

    pub(super) fn holds_nothing(&self) -> bool {
        !matches!(&self.position, Position::Held(_, held) if !held.is_empty())
    }

    fn outside(&mut self, byte: u8) {
        match byte {
            b'{' | b'[' if self.levels.len() == MAX_DEPTH => self.lost = true,
            b'{' | b'[' => {
                let is_object = byte == b'{';
                let (name, is_element) = self.levels.last().map_or((Key::Other, false), |level| {
                    if level.is_object { (level.key, false) } else { (level.name, true) }
                });
                self.levels.push(Level { is_object, name, is_element, key: Key::Other, expects_key: is_object });
            }
            b'}' | b']' => drop(self.levels.pop()),
            b',' => {
                if let Some(level) = self.levels.last_mut() {
                    level.expects_key = level.is_object;
                }
            }
            b'"' => {
                self.position = match self.levels.last() {
                    Some(level) if level.expects_key => Position::Key(Vec::new()),
                    _ => self.form().map_or(Position::Passing, |form| Position::Held(form, Vec::new())),
                };
            }
            _ => {}
        }
    }

    /// Returns the form of the string that begins here, if the place is a known one.
    fn form(&self) -> Option<Form> {
        let level = self.levels.last()?;
        match self.places {
            Places::None => None,
            Places::Error => (self.levels.len() == 1 && level.key == Key::Message).then_some(Form::Text),
            Places::Descriptions if !level.is_object => (level.name == Key::Binds).then_some(Form::Bind),
            Places::Descriptions => match (level.name, level.is_element, level.key) {
                (Key::Mounts, true, Key::Source) | (Key::Options, false, Key::Device) => Some(Form::Path),
                (Key::State | Key::Status, false, Key::ErrorText) => Some(Form::Text),
                _ => None,
            },
        }
    }

    fn inside(&mut self, byte: u8, sent: &mut Vec<u8>) {
        let ends = byte == b'"' && !self.escaped;
        self.escaped = byte == b'\\' && !self.escaped;
        match &mut self.position {
            Position::Held(form, held) if ends => {
                sent.extend(shown(*form, held));
                sent.push(byte);
            }
            Position::Held(_, held) => {
                held.push(byte);
                if held.len() > MAX_STRING {
                    sent.append(held);
                    self.position = Position::Passing;
                }
                return;
            }
            Position::Key(name) if ends => {
                let key = Key::of(name);
                if let Some(level) = self.levels.last_mut() {
                    (level.key, level.expects_key) = (key, false);
                }
                sent.push(byte);
            }
            Position::Key(name) => {
                // A longer one is none of the known keys, and stays longer than all of them.
                if name.len() <= MAX_KEY {
                    name.push(byte);
                }
                sent.push(byte);
            }
            Position::Passing | Position::Outside => sent.push(byte),
        }
        if ends {
            self.position = Position::Outside;
        }
    }
}

/// Returns the string as the client sees it. A slash of the engine is never escaped, so that escapes can stay.
fn shown(form: Form, text: &[u8]) -> Vec<u8> {
    let Ok(string) = std::str::from_utf8(text) else { return text.to_vec() };
    let changed = match form {
        Form::Path => shares::on_host(string).map(ToOwned::to_owned),
        Form::Bind => string
            .split_once(':')
            .and_then(|(source, rest)| shares::on_host(source).map(|source| format!("{source}:{rest}"))),
        Form::Text => Some(shown_in_text(string)),
    };
    changed.map_or_else(|| text.to_vec(), String::into_bytes)
}

/// Takes the mount point off each path in a text that begins with it.
fn shown_in_text(text: &str) -> String {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte) || !byte.is_ascii();
    let mut shown = String::with_capacity(text.len());
    let mut at = 0;
    for (found, _) in text.match_indices(MOUNT_POINT) {
        let (before, after) = (&text.as_bytes()[..found], &text.as_bytes()[found + MOUNT_POINT.len()..]);
        // In the middle of a longer path it is another directory. A letter can be the end of an escape: `\n`.
        let begins = match before {
            [.., b'\\', b'n' | b't'] | [] => true,
            [.., last] => !is_name(*last) && *last != b'/',
        };
        let rest = after.first().copied();
        if begins && !rest.is_some_and(is_name) {
            shown.push_str(&text[at..found]);
            if rest != Some(b'/') {
                shown.push('/');
            }
            at = found + MOUNT_POINT.len();
        }
    }
    shown + &text[at..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn filtered(places: Places, text: &str) -> String {
        let mut filter = Filter::new(places);
        let mut sent = filter.push(text.as_bytes());
        sent.extend(filter.finish());
        String::from_utf8(sent).unwrap()
    }

    fn described(document: &Value) -> Value {
        serde_json::from_str(&filtered(Places::Descriptions, &document.to_string())).unwrap()
    }

    #[test]
    fn sources_are_shown_as_on_the_host() {
        let document = json!([{"Id": "x", "HostConfig": {
            "Binds": ["/host_mnt/home/me:/src:ro", "v:/host_mnt/x", "/host_mnt:/all", "/etc:/host_mnt"],
            "Mounts": [{"Type": "bind", "Source": "/host_mnt/a b/é\"\\", "Target": "/host_mnt/t",
                "VolumeOptions": {"DriverConfig": {"Options": {"device": "/host_mnt/d", "o": "bind"}}}}]},
            "Mounts": [{"Type": "bind", "Source": "/host_mnt/home/me", "Destination": "/src"},
                {"Type": "volume", "Source": "/var/lib/docker/volumes/v/_data"}],
            "State": {"Error": "cannot open /host_mnt/home/me: gone"}}]);
        let expected = json!([{"Id": "x", "HostConfig": {
            "Binds": ["/home/me:/src:ro", "v:/host_mnt/x", "/:/all", "/etc:/host_mnt"],
            "Mounts": [{"Type": "bind", "Source": "/a b/é\"\\", "Target": "/host_mnt/t",
                "VolumeOptions": {"DriverConfig": {"Options": {"device": "/d", "o": "bind"}}}}]},
            "Mounts": [{"Type": "bind", "Source": "/home/me", "Destination": "/src"},
                {"Type": "volume", "Source": "/var/lib/docker/volumes/v/_data"}],
            "State": {"Error": "cannot open /home/me: gone"}}]);
        assert_eq!(described(&document), expected);
    }

    #[test]
    fn volumes_services_and_tasks_are_shown_as_on_the_host() {
        let volume = |device: &str| json!({"Volumes": [{"Name": "v", "Options": {"device": device, "o": "bind"}, "Mountpoint": "/host_mnt/x"}]});
        assert_eq!(described(&volume("/host_mnt/home/me")), volume("/home/me"));
        let service = |source: &str| {
            let spec = json!({"ContainerSpec": {"Mounts": [{"Source": source, "Type": "bind"}]}});
            json!([{"Spec": {"TaskTemplate": spec}, "PreviousSpec": {"TaskTemplate": spec}, "Status": {"Err": format!("no {source}.")}}])
        };
        assert_eq!(described(&service("/host_mnt/srv")), service("/srv"));
    }

    #[test]
    fn what_a_user_chose_stays() {
        for document in [
            json!({"Config": {"Cmd": ["/host_mnt/x"], "Env": ["A=/host_mnt/x"], "WorkingDir": "/host_mnt/x",
                "Labels": {"Source": "/host_mnt/x", "device": "/host_mnt/x", "Binds": "/host_mnt/x"}}}),
            json!({"Mounts": {"Source": "/host_mnt/x"}, "Source": "/host_mnt/x", "Error": "/host_mnt/x"}),
            json!({"Mounts": [["/host_mnt/x"]], "message": "/host_mnt/x"}),
            json!({"Mounts": [{"Source": "/host_mnt2/x", "Destination": "/host_mnt/x"}], "Binds": ["host_mnt/x:/y"]}),
            json!("/host_mnt/x"),
        ] {
            assert_eq!(described(&document), document);
        }
    }

    #[test]
    fn errors_name_the_hosts_paths() {
        for (text, expected) in [
            (r#"{"message":"no /host_mnt/home/me: gone"}"#, r#"{"message":"no /home/me: gone"}"#),
            (r#"{"message":"mkdir \"/host_mnt/a\": x\n/host_mnt/b"}"#, r#"{"message":"mkdir \"/a\": x\n/b"}"#),
            (r#"{"message":"'/host_mnt' and /host_mnt."}"#, r#"{"message":"'/' and /host_mnt."}"#),
            (
                r#"{"message":"/x/host_mnt/a /host_mnt2 a/host_mnt/"}"#,
                r#"{"message":"/x/host_mnt/a /host_mnt2 a/host_mnt/"}"#,
            ),
            (r#"{"detail":{"message":"/host_mnt/a"}}"#, r#"{"detail":{"message":"/host_mnt/a"}}"#),
            (r#"{"message":"/host_mnt/a"#, r#"{"message":"/host_mnt/a"#),
        ] {
            assert_eq!(filtered(Places::Error, text), expected);
        }
    }

    #[test]
    fn a_very_long_string_and_very_deep_nesting_pass() {
        let long = format!(r#"{{"message":"/host_mnt/{}"}}"#, "a".repeat(MAX_STRING));
        assert_eq!(filtered(Places::Error, &long), long);
        let deep = format!(r#"{}{{"Binds":["/host_mnt/x:/y"]"#, "[".repeat(MAX_DEPTH));
        assert_eq!(filtered(Places::Descriptions, &deep), deep);
    }

    /// Documents with keys and strings that mean something to the filter.
    fn documents() -> impl Strategy<Value = Value> {
        let text = "(/host_mnt|/home/me|:/x|v|\"|\\\\|é|/| ){0,4}";
        let leaf = prop_oneof![Just(Value::Null), any::<i32>().prop_map(Value::from), text.prop_map(Value::from)];
        leaf.prop_recursive(6, 40, 4, |inner| {
            let key = "(Binds|Mounts|Source|Options|device|State|Error|message|Labels)";
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::vec((key, inner), 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_give_the_same(
            document in documents(),
            cuts in proptest::collection::vec(0_usize..200, 0..8),
            places in prop_oneof![Just(Places::Descriptions), Just(Places::Error)],
        ) {
            let text = document.to_string();
            let whole = filtered(places, &text);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let mut filter = Filter::new(places);
            let mut sent: Vec<u8> = Vec::new();
            for ends in cuts.windows(2) {
                sent.extend(filter.push(&text.as_bytes()[ends[0]..ends[1]]));
            }
            sent.extend(filter.finish());
            prop_assert_eq!(String::from_utf8(sent).unwrap(), whole.clone());
            // Still the same document, but for the strings that begin with the mount point.
            let read: Value = serde_json::from_str(&whole).unwrap();
            if !text.contains(MOUNT_POINT) {
                prop_assert_eq!(&read, &document);
                prop_assert_eq!(whole, text);
            }
        }

        #[test]
        fn bytes_without_the_mount_point_pass_unchanged(
            bytes in proptest::collection::vec(prop_oneof![Just(b'"'), Just(b'\\'), Just(b'{'), Just(b'['), Just(b','), any::<u8>()], 0..200),
            cut in 0_usize..200,
        ) {
            for places in [Places::Descriptions, Places::Error] {
                let mut filter = Filter::new(places);
                let (first, second) = bytes.split_at(cut.min(bytes.len()));
                let mut sent = filter.push(first);
                sent.extend(filter.push(second));
                sent.extend(filter.finish());
                prop_assert_eq!(&sent, &bytes);
            }
        }
    }
}
