//! Parameters in the query of a request, as Go's `url.ParseQuery` reads them.

use super::kind::Text;
use crate::rules::{refusal::Refusal, target::encode_bytes};

/// A check of parameters: their names and values in order.
pub type QueryJudge = fn(&mut Vec<(String, String)>) -> Result<(), Refusal>;

/// A parameter that a route has.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// Its name. Unlike keys of JSON it matches in one spelling only.
    pub name: &'static str,
    /// The meaning of its values.
    pub kind: Text,
    /// dockerd reads all values and not just the first.
    pub repeats: bool,
}

impl Parameter {
    /// A parameter with one value.
    pub const fn one(name: &'static str, kind: Text) -> Self {
        Self { name, kind, repeats: false }
    }

    /// A parameter with a list of values.
    pub const fn many(name: &'static str, kind: Text) -> Self {
        Self { name, kind, repeats: true }
    }
}

/// The parameters of a request that its route has, in order. Values are bytes: a path can be any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query(Vec<(&'static str, Vec<u8>)>);

/// Decodes a key or a value; `None` if Go refuses it.
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                (digit()? * 16 + digit()?) as u8
            }
            byte => byte,
        });
    }
    Some(decoded)
}

impl Query {
    /// Reads a query. Parameters that the route does not have are dropped, and so are values that dockerd would not
    /// look at.
    pub fn read(parameters: &'static [Parameter], query: &str) -> Result<Self, Refusal> {
        let malformed = |pair: &str| Refusal::Query(pair.to_owned());
        let mut kept: Vec<(&'static str, Vec<u8>)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            // Go stopped to take `;` for `&`; what it splits differently from others is refused by both.
            if pair.contains(';') {
                return Err(malformed(pair));
            }
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let key = decode(key).ok_or_else(|| malformed(pair))?;
            let value = decode(value).ok_or_else(|| malformed(pair))?;
            let Some(parameter) = parameters.iter().find(|parameter| parameter.name.as_bytes() == key) else {
                continue;
            };
            if parameter.repeats || !kept.iter().any(|(name, _)| *name == parameter.name) {
                kept.push((parameter.name, value));
            }
        }
        Ok(Self(kept))
    }

    /// Returns the first value of a parameter, if there is one and it is text.
    pub fn first(&self, name: &str) -> Option<&str> {
        let value = self.0.iter().find(|(known, _)| *known == name);
        value.and_then(|(_, value)| std::str::from_utf8(value).ok())
    }

    /// Replaces the value of a parameter.
    pub fn set(&mut self, name: &str, value: &str) {
        if let Some((_, old)) = self.0.iter_mut().find(|(known, _)| *known == name) {
            *old = value.as_bytes().to_vec();
        }
    }

    /// Gives the parameters to a judge, and keeps what it leaves of them and adds.
    pub fn judge(&mut self, parameters: &'static [Parameter], judge: QueryJudge) -> Result<(), Refusal> {
        let mut texts = Vec::with_capacity(self.0.len());
        for (name, value) in std::mem::take(&mut self.0) {
            // dockerd would take the bytes as they are, but no name, number or JSON text that it knows has such.
            let text = String::from_utf8(value).map_err(|_| Refusal::Query(name.to_owned()))?;
            texts.push((name.to_owned(), text));
        }
        judge(&mut texts)?;
        for (name, text) in texts {
            if let Some(parameter) = parameters.iter().find(|parameter| parameter.name == name) {
                self.0.push((parameter.name, text.into_bytes()));
            }
        }
        Ok(())
    }

    /// Writes the query, without a question mark; empty without parameters.
    pub fn text(&self) -> String {
        let pair = |(name, value): &(&str, Vec<u8>)| format!("{name}={}", encode_bytes(value, b"_.-~:/@,"));
        self.0.iter().map(pair).collect::<Vec<_>>().join("&")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    static PARAMETERS: &[Parameter] = &[Parameter::one("a", Text::Free), Parameter::many("t", Text::Free)];

    fn rebuilt(query: &str) -> Option<String> {
        Query::read(PARAMETERS, query).ok().map(|query| query.text())
    }

    #[test]
    fn unknown_parameters_are_dropped_and_known_ones_keep_their_order() {
        for (query, expected) in [
            ("", ""),
            ("a=1&b=2", "a=1"),
            ("t=x&a=1&t=y", "t=x&a=1&t=y"),
            ("a=1&a=2", "a=1"),
            ("A=1", ""),
            ("%61=%31", "a=1"),
            ("a=b+c%2Bd", "a=b%20c%2Bd"),
            ("a", "a="),
            ("&&a=1&", "a=1"),
            ("=1&a=1", "a=1"),
            ("a=%E9%26t", "a=%E9%26t"),
            ("a=b=c", "a=b%3Dc"),
        ] {
            assert_eq!(rebuilt(query).as_deref(), Some(expected), "{query}");
        }
    }

    #[test]
    fn queries_that_go_refuses_are_refused() {
        for query in ["a=1;b=2", "a=%", "a=%4", "a=%zz", "%zz=1", "x=%zz"] {
            assert_eq!(rebuilt(query), None, "{query}");
        }
    }

    #[test]
    fn a_judge_can_change_remove_and_add_and_nothing_unknown_gets_in() {
        let mut query = Query::read(PARAMETERS, "a=1&t=x&t=y").unwrap();
        let judge = |texts: &mut Vec<(String, String)>| {
            texts.retain(|(_, text)| text != "x");
            texts.push(("a".to_owned(), "2".to_owned()));
            texts.push(("unknown".to_owned(), "3".to_owned()));
            Ok(())
        };
        query.judge(PARAMETERS, judge).unwrap();
        assert_eq!(query.text(), "a=1&t=y&a=2");
        let mut odd = Query::read(PARAMETERS, "a=%FF").unwrap();
        assert!(odd.judge(PARAMETERS, |_| Ok(())).is_err(), "a judge sees text only");
    }

    proptest! {
        #[test]
        fn no_query_makes_it_panic_and_a_rebuilt_one_means_the_same(query in "[at=&+%0-9;x\u{e9} ]{0,40}|.{0,60}") {
            if let Ok(read) = Query::read(PARAMETERS, &query) {
                let text = read.text();
                prop_assert_eq!(Query::read(PARAMETERS, &text).unwrap(), read);
                let target = format!("/x?{text}");
                prop_assert!(target.parse::<hyper::Uri>().is_ok());
            }
        }
    }
}
