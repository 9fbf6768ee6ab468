//! Containers that were created while isolation was off, and notes to the user about them.
//!
//! The engine keeps the runtime that a container was created with, so `docker inspect` shows `runc` for good. Once
//! isolation is on, such a container is isolated all the same, because `runc` in the VM is the isolating runtime then.

use super::client::{self, Client};
use crate::settings::Paths;

/// Most names in a note; the rest is counted.
const MAX_NAMES: usize = 10;

/// The note for a running engine; `None` without such containers, or if the engine does not list its containers.
pub(super) async fn note(paths: &Paths, client: &Client<'_>) -> Option<String> {
    // All errors end in no note: it is an extra to a verb that has already succeeded.
    let isolated = client.status().await.ok()?.vm?.enhanced_container_isolation;
    let names = client::made_without_isolation(&paths.docker_socket()).await.ok()?;
    sentence(&names, isolated)
}

/// The note after isolation was set to on; the running VM keeps it off until the next `restart`.
pub(super) async fn note_for_setting(paths: &Paths) -> Option<String> {
    let client = Client::connect(paths).await.ok()??;
    note(paths, &client).await
}

fn sentence(names: &[String], isolated: bool) -> Option<String> {
    if names.is_empty() {
        return None;
    }
    // On one line, like every other note and warning.
    let mut list = names.iter().take(MAX_NAMES).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > MAX_NAMES {
        list = format!("{list} and {} more", names.len() - MAX_NAMES);
    }
    let consequence =
        if isolated { "they are isolated like all others" } else { "they run without it until the next restart" };
    Some(format!("created before Enhanced Container Isolation was turned on: {list}; {consequence}"))
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
            "created before Enhanced Container Isolation was turned on: c1, c2; they are isolated like all others"
        );
        assert!(
            sentence(&names, false).unwrap().contains("c9, c10 and 2 more; they run without it until the next restart")
        );
    }
}
