//! Containers that were made while isolation was off.
//!
//! The engine keeps the runtime that a container was made with, so its `inspect` says `runc` for good. Such a container
//! is isolated all the same once isolation is on, as `runc` in the VM is the isolating runtime then.

use super::client::{self, Client};
use crate::settings::Paths;

/// Names in a line; the rest is counted.
const SHOWN: usize = 10;

/// What there is to say of a running engine, if anything; nothing when it does not say what containers it has.
pub(super) async fn of(paths: &Paths, client: &Client<'_>) -> Option<String> {
    let isolated = client.status().await.ok()?.vm?.enhanced_container_isolation;
    let names = client::made_without_isolation(&paths.docker_socket()).await.ok()?;
    sentence(&names, isolated)
}

/// The same for a setting that has just been changed and counts from the next `restart` on.
pub(super) async fn of_setting(paths: &Paths) -> Option<String> {
    let client = Client::connect(paths).await.ok()??;
    of(paths, &client).await
}

fn sentence(names: &[String], isolated: bool) -> Option<String> {
    if names.is_empty() {
        return None;
    }
    let mut list = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        list = format!("{list} and {} more", names.len() - SHOWN);
    }
    let consequence = if isolated { "they are isolated like all others" } else { "they run without it until then" };
    Some(format!("made before Enhanced Container Isolation was turned on: {list}; {consequence}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_from_before_are_named_up_to_ten() {
        let names: Vec<String> = (1..=12).map(|number| format!("c{number}")).collect();
        assert_eq!(sentence(&[], true), None);
        assert_eq!(
            sentence(&names[..2], true).unwrap(),
            "made before Enhanced Container Isolation was turned on: c1, c2; they are isolated like all others"
        );
        assert!(sentence(&names, false).unwrap().contains("c9, c10 and 2 more; they run without it until then"));
    }
}
