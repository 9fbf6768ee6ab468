//! The query of `POST /commit`.

use crate::rules::Refusal;

/// Makes the engine pause the container while it packs its files: a running one could put a link where a file was, and
/// the engine would pack a file of the VM. All other parameters are opaque: names and texts of the image.
#[expect(clippy::unnecessary_wraps, reason = "the judges of all routes have one form")]
pub(crate) fn query(parameters: &mut Vec<(String, String)>) -> Result<(), Refusal> {
    parameters.retain(|(name, _)| name != "pause");
    parameters.push(("pause".to_owned(), "1".to_owned()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_paused_whatever_the_client_says() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        for given in [vec![], vec![pair("pause", "0")], vec![pair("pause", "1"), pair("pause", "false")]] {
            let mut parameters = vec![pair("container", "c")];
            parameters.extend(given);
            query(&mut parameters).unwrap();
            assert_eq!(parameters, [pair("container", "c"), pair("pause", "1")]);
        }
    }
}
