//! A forwarded port: `8080:80`, `80` for the same local port, `:80` for any local port.

use std::str::FromStr;

/// A local port and one in the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PortSpec {
    /// The local port; `None` for any free one.
    pub(crate) local: Option<u16>,
    /// The port in the pod. Never 0.
    pub(crate) remote: u16,
}

/// A text that is not a port mapping.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not [LOCAL:]REMOTE with ports from 1 to 65535; leave LOCAL empty for any free port")]
pub(crate) struct PortSpecError(String);

impl FromStr for PortSpec {
    type Err = PortSpecError;

    fn from_str(text: &str) -> Result<Self, PortSpecError> {
        let wrong = || PortSpecError(text.to_owned());
        // `parse` would accept "+80".
        let port = |text: &str| {
            let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok());
            number.flatten().filter(|port| *port != 0).ok_or_else(wrong)
        };
        let (local, remote) = match text.split_once(':') {
            None => (Some(port(text)?), port(text)?),
            Some(("", remote)) => (None, port(remote)?),
            // 0 means any port, as in other tools.
            Some(("0", remote)) => (None, port(remote)?),
            Some((local, remote)) => (Some(port(local)?), port(remote)?),
        };
        Ok(Self { local, remote })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_mistakes_named() {
        for (text, local, remote) in
            [("80", Some(80), 80), ("8080:80", Some(8080), 80), (":80", None, 80), ("0:80", None, 80)]
        {
            assert_eq!(text.parse(), Ok(PortSpec { local, remote }), "{text}");
        }
        for text in ["", ":", "0", "80:", "80:0", "+80", "80:http", "65536", "1:2:3", "127.0.0.1:80", " 80"] {
            assert!(text.parse::<PortSpec>().is_err(), "{text:?}");
        }
    }
}
