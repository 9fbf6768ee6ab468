//! The engine's HTTP proxy, as the guest's configuration carries it.
//!
//! It comes from the settings or a policy, else from the environment in which `bulkhead start` was called. Pulls use it
//! through the `proxies` of dockerd's `daemon.json`; containers get it as variables if the setting `containersProxy` or
//! a policy says so. Its URL may contain a password: it must not reach a log, an error or a `Debug` text.

use bulkhead_protocol::Configuration;
use serde_json::{Map, Value, json};

use super::{api::StartOptions, network::NetworkPlan};
use crate::settings::{Proxy, ProxyUrl, Settings};

/// Puts the proxy into `configuration`, whose host name and daemon options are already set. Returns a warning for the
/// user when a proxy was named that the engine cannot use.
pub(super) fn configure(
    settings: &Settings,
    options: &StartOptions,
    network: Option<&NetworkPlan>,
    configuration: &mut Configuration,
) -> Option<String> {
    let (proxy, invalid) = match settings.proxy() {
        Some(proxy) => (proxy, Vec::new()),
        None => Proxy::from_environment(&options.proxy),
    };
    // Options that a policy locks win over the settings and the environment; anyone else's `proxies` are replaced.
    let overridden = settings.daemon_options_win() && configuration.daemon_options.contains_key("proxies");
    if let Some(network) = network.filter(|_| proxy.is_some() && !overridden) {
        apply(&proxy, settings.containers_proxy(), network, configuration);
    }
    if !invalid.is_empty() {
        // Names the variables only: an invalid value may still contain a password.
        Some(format!("ignoring {} of the environment: not a valid proxy URL", invalid.join(" and ")))
    } else if proxy.is_on_loopback() && network.is_some_and(|network| network.host_for_guest().is_none()) {
        Some(
            "the engine cannot use the proxy: it is on this machine's loopback, which the VM's network does not reach"
                .to_owned(),
        )
    } else {
        None
    }
}

fn apply(proxy: &Proxy, containers: bool, network: &NetworkPlan, configuration: &mut Configuration) {
    // In the guest a loopback address would be the guest's own, so it becomes the name or address that leads here.
    let host = network.host_for_guest();
    let url = |url: &Option<ProxyUrl>| url.as_ref().map(|url| url.for_guest(host.as_deref()));
    let (http, https) = (url(&proxy.http), url(&proxy.https));
    // The guest's own name and networks are reached directly: a proxy outside of the VM cannot find containers.
    let mut direct = network.own_networks();
    direct.push(configuration.hostname.clone());
    let exclude = proxy.no_proxy(&direct);
    let mut proxies = Map::new();
    for (key, value) in [("http-proxy", &http), ("https-proxy", &https), ("no-proxy", &Some(exclude.clone()))] {
        if let Some(value) = value {
            proxies.insert(key.to_owned(), json!(value));
        }
    }
    configuration.daemon_options.insert("proxies".to_owned(), Value::Object(proxies));
    if containers {
        let pairs = [("HTTP_PROXY", http), ("HTTPS_PROXY", https), ("NO_PROXY", Some(exclude))];
        let pairs = pairs.into_iter().filter_map(|(name, value)| Some((name, value?)));
        // Programs disagree about the case (curl reads `http_proxy` only); the docker command sets both, too.
        configuration.container_environment = pairs
            .flat_map(|(name, value)| [format!("{name}={value}"), format!("{}={value}", name.to_lowercase())])
            .collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{NetworkKind, Policy, PolicySource, ProxyEnvironment};

    fn settings(text: &str) -> Settings {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("settings.json");
        std::fs::write(&path, text).unwrap();
        Settings::load(&path).unwrap()
    }

    fn policy(text: Option<&str>) -> Policy {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("admin-settings.json");
        if let Some(text) = text {
            std::fs::write(&file, text).unwrap();
        }
        Policy::read(&PolicySource::new(vec![file], nix::unistd::geteuid().as_raw()))
    }

    fn applied(text: &str, environment: ProxyEnvironment) -> (Value, Vec<String>, Option<String>) {
        applied_under(settings(text), environment)
    }

    fn applied_under(settings: Settings, environment: ProxyEnvironment) -> (Value, Vec<String>, Option<String>) {
        let network = NetworkPlan::new(&NetworkKind::User, &settings).unwrap();
        let options = StartOptions { proxy: environment, ..StartOptions::default() };
        let mut configuration: Configuration = serde_json::from_value(json!({
            "hostname": "bulkhead", "time_unix_ns": 0, "isolation": true, "data_disk_serial": "data"
        }))
        .unwrap();
        configuration.daemon_options = settings.daemon_options();
        let warning = configure(&settings, &options, network.as_ref(), &mut configuration);
        (Value::Object(configuration.daemon_options), configuration.container_environment, warning)
    }

    #[test]
    fn the_environments_proxy_on_the_loopback_is_the_hosts_for_the_engine() {
        let environment = ProxyEnvironment {
            http: Some("http://me:pw@127.0.0.1:3128".into()),
            https: None,
            exclude: Some(".corp".into()),
        };
        let (options, containers, warning) = applied("{}", environment);
        let exclude = "localhost,127.0.0.0/8,::1,host.docker.internal,gateway.docker.internal,192.168.65.0/24,\
                       fd0b:ad:c0ff::/64,bulkhead,.corp";
        let expected = json!({"proxies": {
            "http-proxy": "http://me:pw@host.docker.internal:3128", "no-proxy": exclude
        }});
        assert_eq!((options, containers, warning), (expected, vec![], None));
    }

    #[test]
    fn manual_settings_replace_the_environment_and_containers_have_them_when_asked() {
        let text = r#"{"proxyHttpMode": "manual", "overrideProxyHttps": "http://proxy:1", "containersProxy": true,
                       "overrideProxyExclude": ["*"]}"#;
        let environment = ProxyEnvironment { http: Some("http://other:2".into()), ..ProxyEnvironment::default() };
        let (options, containers, warning) = applied(text, environment);
        assert_eq!(options["proxies"]["https-proxy"], "http://proxy:1");
        assert!(options["proxies"].get("http-proxy").is_none() && warning.is_none());
        assert_eq!(containers[..2], ["HTTPS_PROXY=http://proxy:1", "https_proxy=http://proxy:1"]);
        assert!(containers[2].starts_with("NO_PROXY=localhost,") && containers[3].ends_with(",*"));
    }

    #[test]
    fn the_lock_of_a_policy_decides_between_the_proxy_and_the_daemons_options() {
        let mine = r#"{"proxyHttpMode": "manual", "overrideProxyHttp": "http://mine:1", "dockerDaemonOptions":
                       "{\"debug\": true, \"proxies\": {\"http-proxy\": \"http://options:1\"}}"}"#;
        let proxy = |text: Option<&str>| {
            let environment = ProxyEnvironment { http: Some("http://environment:1".into()), ..Default::default() };
            applied_under(settings(mine).under(policy(text)), environment).0["proxies"]["http-proxy"].clone()
        };
        assert_eq!(proxy(None), "http://mine:1");
        let theirs = r#"{"proxy": {"locked": true, "mode": "manual", "http": "http://theirs:1"}}"#;
        assert_eq!(proxy(Some(theirs)), "http://theirs:1");
        assert_eq!(proxy(Some(r#"{"proxy": {"locked": true, "mode": "manual"}}"#)), Value::Null);
        assert_eq!(proxy(Some(r#"{"proxy": {"locked": true, "mode": "system"}}"#)), "http://environment:1");
        let options = r#"{"linuxVM": {"dockerDaemonOptions": {"locked": true, "value":
                          "{\"proxies\": {\"http-proxy\": \"http://theirs:2\"}}"}}}"#;
        assert_eq!(proxy(Some(options)), "http://theirs:2");
    }

    /// The http proxy of pulls and that of new containers, for a user whose environment has one, too.
    fn pulls_and_containers(setting: &str, text: Option<&str>) -> (Option<String>, Option<String>) {
        let environment = ProxyEnvironment { http: Some("http://environment:1".into()), ..Default::default() };
        let (options, containers, warning) = applied_under(settings(setting).under(policy(text)), environment);
        assert_eq!(warning, None);
        let variable = containers.iter().find_map(|variable| variable.strip_prefix("HTTP_PROXY="));
        assert_eq!(variable.is_some(), containers.iter().any(|variable| variable.starts_with("no_proxy=localhost,")));
        (options["proxies"]["http-proxy"].as_str().map(ToOwned::to_owned), variable.map(ToOwned::to_owned))
    }

    #[test]
    fn the_policys_proxy_for_containers_governs_them_and_pulls_unless_turned_off() {
        const UNSET: &str = "{}";
        const OFF: &str = r#"{"containersProxy": false}"#;
        const ON: &str = r#"{"containersProxy": true}"#;
        const MINE: &str = r#"{"proxyHttpMode": "manual", "overrideProxyHttp": "http://mine:1", "dockerDaemonOptions":
                               "{\"proxies\": {\"http-proxy\": \"http://options:1\"}}"}"#;
        let key = |locked, mode, http| {
            format!(r#""containersProxy": {{"locked": {locked}, "mode": "{mode}", "http": "{http}"}}"#)
        };
        let locked = key(true, "manual", "http://theirs:1");
        let free = key(false, "manual", "http://theirs:1");
        let engines = r#""proxy": {"locked": true, "mode": "manual", "http": "http://engine:1"}"#;
        let options = r#""linuxVM": {"dockerDaemonOptions": {"locked": true, "value":
                         "{\"proxies\": {\"http-proxy\": \"http://options:2\"}}"}}"#;
        let (environment, theirs) = (Some("http://environment:1"), Some("http://theirs:1"));
        for (keys, setting, pulls, containers) in [
            // No such key: the engine's proxy, in containers if the user says so.
            (vec![], UNSET, environment, None),
            (vec![], ON, environment, environment),
            (vec![], OFF, environment, None),
            // Locked: the user and other keys have no say.
            (vec![&*locked], UNSET, theirs, theirs),
            (vec![&*locked], ON, theirs, theirs),
            (vec![&*locked], OFF, theirs, theirs),
            (vec![&*locked], MINE, theirs, theirs),
            (vec![&*locked, engines], OFF, theirs, theirs),
            (vec![&*locked, options], OFF, theirs, theirs),
            // Not locked: the same until the user turns it off.
            (vec![&*free], UNSET, theirs, theirs),
            (vec![&*free], ON, theirs, theirs),
            (vec![&*free], OFF, environment, None),
            (vec![&*free, engines], UNSET, theirs, theirs),
            (vec![&*free, engines], OFF, Some("http://engine:1"), None),
            (vec![&*free, options], UNSET, theirs, theirs),
            (vec![&*free, options], OFF, Some("http://options:2"), None),
            // An empty proxy means no proxy. Mode system: the engine's.
            (vec![&*key(true, "manual", "")], MINE, None, None),
            (vec![&*key(true, "manual", ""), engines], ON, None, None),
            (vec![&*key(true, "system", "http://ignored:1")], OFF, environment, environment),
            (vec![&*key(true, "system", ""), engines], OFF, Some("http://engine:1"), Some("http://engine:1")),
            (vec![&*key(false, "system", "")], OFF, environment, None),
        ] {
            let text = (!keys.is_empty()).then(|| format!("{{{}}}", keys.join(", ")));
            let (got_pulls, got_containers) = pulls_and_containers(setting, text.as_deref());
            assert_eq!((got_pulls.as_deref(), got_containers.as_deref()), (pulls, containers), "{text:?} {setting}");
        }
    }

    #[test]
    fn the_policys_proxy_for_containers_on_the_loopback_is_the_hosts() {
        let text = r#"{"containersProxy": {"locked": true, "mode": "manual", "http": "http://127.0.0.1:3128",
                       "https": "http://me:pw@localhost:3129", "exclude": [".corp"]}}"#;
        let under =
            |setting: &str| applied_under(settings(setting).under(policy(Some(text))), ProxyEnvironment::default());
        let (options, containers, warning) = under("{}");
        assert_eq!(options["proxies"]["http-proxy"], "http://host.docker.internal:3128");
        assert_eq!(containers[2], "HTTPS_PROXY=http://me:pw@host.docker.internal:3129");
        assert!(containers[4].starts_with("NO_PROXY=localhost,") && containers[4].ends_with(",bulkhead,.corp"));
        assert_eq!(warning, None);
        assert!(under(r#"{"hostLoopback": false}"#).2.unwrap().contains("loopback"));
    }

    #[test]
    fn a_proxy_that_cannot_be_reached_or_read_is_warned_of() {
        let loopback = ProxyEnvironment { http: Some("localhost:3128".into()), ..ProxyEnvironment::default() };
        assert!(applied(r#"{"hostLoopback": false}"#, loopback).2.unwrap().contains("loopback"));
        let wrong = ProxyEnvironment { https: Some("ftp://me:s3cret@x".into()), ..ProxyEnvironment::default() };
        let (options, _, warning) = applied("{}", wrong);
        assert_eq!(options, json!({}));
        assert!(warning.as_deref().is_some_and(|text| text.contains("HTTPS_PROXY") && !text.contains("s3cret")));
    }
}
