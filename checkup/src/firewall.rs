//! Rules of other programs that stop what pods on the built-in bridge send beyond it: Docker and
//! ufw set the policy of a chain to drop, firewalld ends one with a rule that rejects.

use std::path::Path;
use std::time::Duration;

use berth_sys::program::Run;
use serde_json::Value;

use crate::{Daemon, Finding, Grade, cni, finding, host};

/// `nft` reads all rules of the node first, which may be thousands.
const DEADLINE: Duration = Duration::from_secs(10);

/// The most that is looked at.
const MAX_OUTPUT: usize = 64 << 20;

/// Looks at the firewall of this network namespace; for files of another node there is none to ask.
pub(crate) fn look(node: &Path, daemon: &Daemon) -> Vec<Finding> {
    if node != Path::new("/") || !cni::is_bridge(node, daemon) {
        return Vec::new();
    }
    let Some(nft) = host::program(node, "nft") else { return Vec::new() };
    let list = |what: &[&str]| list(&nft, what);
    let chains = list(&["chains"]).unwrap_or_default();
    let tables = closed(&chains, |family, table| list(&["table", family, table]), &daemon.bridge);
    tables.into_iter().map(|(family, table)| stops(&family, &table, &daemon.bridge)).collect()
}

fn stops(family: &str, table: &str, bridge: &str) -> Finding {
    let remedy = match (family, table) {
        (_, "firewalld") => format!(
            "firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload"
        ),
        ("ip", "filter") => format!(
            "iptables -I FORWARD -i {bridge} -j ACCEPT; iptables -I FORWARD -o {bridge} -j ACCEPT (with Docker in its chain DOCKER-USER, with ufw: ufw route allow in on {bridge}; ufw route allow out on {bridge})"
        ),
        ("ip6", "filter") => {
            format!("ip6tables -I FORWARD -i {bridge} -j ACCEPT; ip6tables -I FORWARD -o {bridge} -j ACCEPT")
        }
        _ => format!("accept packets whose iifname or oifname is {bridge} there"),
    };
    let text = format!(
        "table {family} {table} drops forwarded packets and does not name {bridge}, so pods may not reach other hosts: {remedy}"
    );
    finding(Grade::Note, "firewall", text)
}

/// What `nft` lists, or none when it cannot.
fn list(nft: &Path, what: &[&str]) -> Option<Value> {
    let mut arguments = vec!["-j", "list"];
    arguments.extend(what);
    let run = Run {
        program: nft,
        arguments: &arguments,
        environment: &[],
        stdin: b"",
        deadline: DEADLINE,
        max_output: Some(MAX_OUTPUT),
        max_message: 0,
        caller: None,
    };
    let ended = run.to_end().ok()??;
    ended.status.success().then(|| serde_json::from_slice(&ended.output).ok())?
}

/// The tables, as family and name, that forward nothing which no rule accepts, and have none about
/// the bridge.
fn closed(
    chains: &Value,
    list_table: impl Fn(&str, &str) -> Option<Value>,
    bridge: &str,
) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for chain in
        objects(chains, "chain").filter(|chain| chain["type"] == "filter" && chain["hook"] == "forward")
    {
        let [Some(family), Some(table), Some(name)] =
            ["family", "table", "name"].map(|key| chain[key].as_str())
        else {
            continue;
        };
        // A bridge's packets are another matter.
        if !matches!(family, "ip" | "ip6" | "inet") {
            continue;
        }
        let Some(listed) = list_table(family, table) else { continue };
        let in_chain = objects(&listed, "rule").filter(|rule| rule["chain"] == name);
        let verdicts: Vec<&str> = in_chain.filter_map(unconditional).collect();
        let drops = chain["policy"] == "drop" || verdicts.iter().any(|verdict| *verdict != "accept");
        let is_known = objects(&listed, "rule").any(|rule| names(rule, bridge));
        let table = (family.to_owned(), table.to_owned());
        if drops && !verdicts.contains(&"accept") && !is_known && !found.contains(&table) {
            found.push(table);
        }
    }
    found
}

/// The objects of a kind in an answer of `nft`: libnftables-json(5).
fn objects<'a>(answer: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    answer["nftables"].as_array().into_iter().flatten().filter_map(move |object| object.get(kind))
}

/// What a rule does with each packet, if it is about all of them.
fn unconditional(rule: &Value) -> Option<&str> {
    let statements = rule["expr"].as_array()?;
    let mut verdict = None;
    for statement in statements {
        let key = statement.as_object()?.keys().next()?.as_str();
        match key {
            "accept" | "drop" | "reject" => verdict = Some(key),
            "counter" | "log" => {}
            _ => return None,
        }
    }
    verdict
}

/// Whether a text is somewhere in a value.
fn names(value: &Value, text: &str) -> bool {
    match value {
        Value::String(found) => found == text,
        Value::Array(values) => values.iter().any(|value| names(value, text)),
        Value::Object(values) => values.values().any(|value| names(value, text)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The closed tables of a node with one, `ip filter`.
    fn is_closed(policy: &str, rules: &[Value]) -> bool {
        let chain = json!({"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward", "policy": policy}});
        let input = json!({"chain": {"family": "ip", "table": "filter", "name": "INPUT", "type": "filter", "hook": "input", "policy": "drop"}});
        let mut all = vec![chain, input];
        all.extend(rules.iter().map(|rule| json!({"rule": {"chain": "FORWARD", "expr": rule}})));
        all.push(json!({"rule": {"chain": "INPUT", "expr": [{"drop": null}]}}));
        let answer = json!({ "nftables": all });
        !closed(&answer, |_, _| Some(answer.clone()), "berth0").is_empty()
    }

    fn by(interface: &str) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": interface}})
    }

    #[test]
    fn a_chain_is_closed_by_its_policy_or_a_rule_unless_one_is_about_the_bridge_or_accepts_all() {
        let accept = json!({"accept": null});
        let reject = json!({"reject": {"type": "icmpx"}});
        let counter = json!({"counter": {"packets": 0, "bytes": 0}});
        let docker = json!([by("docker0"), accept]);
        let berth = json!([by("berth0"), accept]);
        for (policy, rules, expected) in [
            ("accept", vec![], false),
            ("drop", vec![], true),
            ("drop", vec![docker.clone()], true),
            ("drop", vec![docker.clone(), berth.clone()], false),
            ("drop", vec![json!([counter, accept])], false),
            ("accept", vec![docker.clone(), json!([counter, reject])], true),
            ("accept", vec![json!([by("eth0"), reject])], false),
            ("accept", vec![berth, json!([reject])], false),
        ] {
            assert_eq!(is_closed(policy, &rules), expected, "{policy} {rules:?}");
        }
    }

    #[test]
    fn answers_that_are_odd_are_survived() {
        for answer in [
            json!(null),
            json!({"nftables": 1}),
            json!({"nftables": [{"chain": {"type": "filter", "hook": "forward"}}]}),
        ] {
            assert_eq!(closed(&answer, |_, _| None, "berth0"), []);
        }
        assert_eq!(unconditional(&json!({"expr": [1, {}, null]})), None);
    }
}
