//! Names in the list of images that may have the engine's socket, under a policy that locks isolation.
//!
//! A name means what its registry says. So a name is worth as much as the way to the registry, and the policy's list
//! binds the user only if that way is not the user's to choose. An ID or a digest says by itself which image it means.
//!
//! What the engine believes a registry by is not the user's then either: certificates of authorities come from root's
//! files alone ([`super::certificates`]).

use std::path::Path;

use bulkhead_protocol::{SocketExceptions, daemon_options::daemon_option};

use super::{api::StartOptions, network::NetworkPlan};
use crate::{
    root_owned::{self, NotRoots},
    settings::{Proxy, ProxyEnvironment, Settings},
};

/// The reason why names do not count.
#[derive(Debug, thiserror::Error)]
pub enum Doubt {
    /// The engine's proxy.
    #[error("the user can choose the engine's proxy; lock `proxy` or `containersProxy`")]
    Proxy,
    /// An option of dockerd.
    #[error("the user can choose the daemon option `{0}`; lock `linuxVM.dockerDaemonOptions`")]
    Option(String),
    /// The program of the network.
    #[error("the user can choose the network's program: {0}")]
    Network(NotRoots),
}

/// Returns whether the policy lists images by name, so that the way to registries matters.
pub(super) fn matter(settings: &Settings) -> bool {
    settings.policy().isolation_lock().is_some()
        && settings.socket_exceptions().images.iter().any(|image| is_name(image))
}

/// Returns the reason why names do not count; `None` if they do. `network` is the program of the network, if it is not
/// this one.
fn doubt(settings: &Settings, environment: &ProxyEnvironment, network: Option<&Path>) -> Option<Doubt> {
    if let Some(option) = users_option(settings) {
        return Some(Doubt::Option(option));
    }
    if has_users_proxy(settings, environment) {
        return Some(Doubt::Proxy);
    }
    network.and_then(|program| root_owned::check(program).err()).map(Doubt::Network)
}

/// Returns whether names count for a VM that these options start; `None` where it does not matter.
pub fn state(settings: &Settings, options: &StartOptions) -> Option<Result<(), Doubt>> {
    if !matter(settings) {
        return None;
    }
    let kind = options.network.clone().unwrap_or_else(|| settings.network());
    // A network that cannot be had has no program that could be doubted.
    let network = NetworkPlan::new(&kind, settings).ok().flatten();
    let doubt = doubt(settings, &options.proxy, network.as_ref().and_then(NetworkPlan::program));
    Some(doubt.map_or(Ok(()), Err))
}

/// Leaves out of the exceptions what does not count; returns the warning about it.
pub(super) fn restrict(
    settings: &Settings,
    environment: &ProxyEnvironment,
    network: Option<&Path>,
    exceptions: &mut SocketExceptions,
) -> Option<String> {
    if !matter(settings) {
        return None;
    }
    let doubt = doubt(settings, environment, network)?;
    exceptions.images.retain(|image| !is_name(image));
    Some(warning(&doubt))
}

/// The warning about names that do not count.
pub fn warning(doubt: &Doubt) -> String {
    format!("image names in the policy's dockerSocketMount are ignored; only IDs and digests apply: {doubt}")
}

/// Returns whether an entry of the list means what a registry says: `name`, `name:tag`, `name:*`.
fn is_name(image: &str) -> bool {
    // `*` means all images, whatever their names are.
    !(image == "*" || image.starts_with("sha256:") || image.contains("@sha256:"))
}

/// The first option of dockerd that the user has set and that may concern registries.
fn users_option(settings: &Settings) -> Option<String> {
    let options = if settings.daemon_options_win() { return None } else { settings.daemon_options() };
    // An option that is not in the table is left out by init. It may still be one that a later table has.
    options
        .into_iter()
        .map(|(key, _)| key)
        .find(|key| daemon_option(key).is_none_or(|option| option.concerns_registries))
}

fn has_users_proxy(settings: &Settings, environment: &ProxyEnvironment) -> bool {
    if settings.has_policys_proxy() {
        return false;
    }
    // Options that the policy locks replace every other proxy.
    if settings.daemon_options_win() && settings.daemon_options().contains_key("proxies") {
        return false;
    }
    settings.proxy().unwrap_or_else(|| Proxy::from_environment(environment).0).is_some()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::settings::{Policy, PolicySource};

    const ID: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

    /// The settings of a user under a policy that lists two images by name, and these other keys.
    fn settings(mine: &str, keys: &str) -> Settings {
        under(
            mine,
            &format!(
                r#"{{"enhancedContainerIsolation": {{"locked": true, "value": true, "dockerSocketMount":
                     {{"imageList": {{"images": ["docker:cli", "a:*", "*", "b@{ID}", "{ID}"]}}}}}}{keys}}}"#
            ),
        )
    }

    fn under(mine: &str, policy: &str) -> Settings {
        let directory = tempfile::tempdir().unwrap();
        let (file, path) = (directory.path().join("policy.json"), directory.path().join("settings.json"));
        std::fs::write(&file, policy).unwrap();
        std::fs::write(&path, mine).unwrap();
        let policy = Policy::read(&PolicySource::new(vec![file], nix::unistd::geteuid().as_raw()));
        assert_eq!(policy.facts().unwrap().problem, None);
        Settings::load(&path).unwrap().under(policy)
    }

    /// The images that count, and the warning.
    fn restricted(settings: &Settings, proxy: Option<&str>, network: Option<&Path>) -> (Vec<String>, Option<String>) {
        let environment = ProxyEnvironment { https: proxy.map(ToOwned::to_owned), ..ProxyEnvironment::default() };
        let mut exceptions = settings.socket_exceptions();
        let warning = restrict(settings, &environment, network, &mut exceptions);
        (exceptions.images, warning)
    }

    #[test]
    fn names_count_unless_the_user_chooses_the_way_to_the_registry() {
        const MANUAL: &str = r#"{"proxyHttpMode": "manual", "overrideProxyHttps": "http://mine:1"}"#;
        const NO_PROXY: &str = r#"{"proxyHttpMode": "manual"}"#;
        const MIRROR: &str = r#"{"dockerDaemonOptions": "{\"registry-mirrors\": [\"https://mine\"]}"}"#;
        const PROXIES: &str = r#"{"dockerDaemonOptions": "{\"proxies\": {\"https-proxy\": \"http://mine:1\"}}"}"#;
        const DEBUG: &str =
            r#"{"dockerDaemonOptions": "{\"debug\": true, \"ip\": \"10.0.0.1\", \"log-format\": \"json\"}"}"#;
        const LEFT_OUT: &str = r#"{"dockerDaemonOptions": "{\"live-restore\": true, \"hosts\": []}"}"#;
        const UNKNOWN: &str = r#"{"dockerDaemonOptions": "{\"registry-of-later\": \"https://mine\"}"}"#;
        let environment = Some("http://environment:1");
        let theirs = |mode| format!(r#", "proxy": {{"locked": true, "mode": "{mode}", "https": "http://theirs:1"}}"#);
        let containers = |locked| {
            format!(r#", "containersProxy": {{"locked": {locked}, "mode": "manual", "https": "http://theirs:1"}}"#)
        };
        let options = |text: &str| {
            format!(r#", "linuxVM": {{"dockerDaemonOptions": {{"locked": true, "value": {}}}}}"#, json!(text))
        };
        let (mode, lock) = ("the user can choose the engine's proxy", "the user can choose the daemon option `");
        for (mine, keys, proxy, expected) in [
            ("{}", "", None, None),
            ("{}", "", environment, Some(mode)),
            (MANUAL, "", None, Some(mode)),
            (NO_PROXY, "", environment, None),
            (MANUAL, &*theirs("manual"), environment, None),
            (MANUAL, &theirs("system"), None, None),
            (MANUAL, &theirs("system"), environment, Some(mode)),
            (MANUAL, &containers(true), environment, None),
            ("{}", &containers(false), environment, None),
            (r#"{"containersProxy": false}"#, &containers(false), environment, Some(mode)),
            (MIRROR, "", None, Some(lock)),
            (PROXIES, "", None, Some(lock)),
            (PROXIES, &theirs("manual"), None, None),
            (MIRROR, &theirs("manual"), None, Some(lock)),
            (DEBUG, "", None, None),
            (LEFT_OUT, "", None, None),
            (UNKNOWN, "", None, Some(lock)),
            (MIRROR, &options("{}"), None, None),
            (MIRROR, &options("{}"), environment, Some(mode)),
            (PROXIES, &options(r#"{"proxies": {"https-proxy": "http://theirs:2"}}"#), environment, None),
        ] {
            let (images, warning) = restricted(&settings(mine, keys), proxy, None);
            let all = ["docker:cli", "a:*", "*", &format!("b@{ID}"), ID];
            assert_eq!(images, if expected.is_none() { &all[..] } else { &all[2..] }, "{mine} {keys} {proxy:?}");
            assert_eq!(warning.is_some(), expected.is_some(), "{mine} {keys} {proxy:?}");
            assert!(warning.is_none_or(|warning| warning.contains(expected.unwrap())), "{mine} {keys} {proxy:?}");
        }
    }

    #[test]
    fn names_do_not_count_with_a_network_program_that_others_can_change() {
        use std::os::unix::fs::PermissionsExt;
        let program = tempfile::NamedTempFile::new().unwrap();
        std::fs::set_permissions(program.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let (images, warning) = restricted(&settings("{}", ""), None, Some(program.path()));
        assert_eq!(images.len(), 3);
        assert!(warning.unwrap().contains("the user can choose the network's program: "));
        assert_eq!(restricted(&settings("{}", ""), None, Some(Path::new("/bin/sh"))).1, None);
    }

    #[test]
    fn without_a_lock_or_without_names_nothing_is_left_out() {
        let free = r#"{"enhancedContainerIsolation": {"locked": false, "value": true, "dockerSocketMount":
                       {"imageList": {"images": ["docker:cli"]}}}}"#;
        let off = free.replace("\"locked\": false, \"value\": true", "\"locked\": true, \"value\": false");
        let ids = free.replace("\"locked\": false", "\"locked\": true").replace("docker:cli", ID);
        for policy in [free, &off, &ids] {
            let (images, warning) = restricted(&under("{}", policy), Some("http://environment:1"), None);
            assert_eq!((images.len(), warning), (1, None), "{policy}");
        }
    }
}
