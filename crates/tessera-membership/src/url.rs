//! Where membership lives: `embedded`, or `etcd://host:port[,host:port…]`.

use std::fmt;
use std::str::FromStr;

/// Port that etcd serves clients on, used where an endpoint names none.
pub const ETCD_CLIENT_PORT: u16 = 2379;
/// Most endpoints one URL may name.
pub const MAX_ENDPOINTS: usize = 16;

/// Text is not a membership URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipUrlError {
    /// Neither `embedded` nor a known scheme.
    #[error("membership {text:?} is neither `embedded` nor `etcd://host:port[,host:port]`")]
    UnknownScheme { text: String },
    /// TLS is not supported yet.
    #[error("membership {text:?} asks for TLS, which is not supported; use `etcd://host:port`")]
    Tls { text: String },
    /// No endpoint between the commas, or too many.
    #[error("membership {text:?} names {count} endpoints, expected 1 to {MAX_ENDPOINTS}")]
    EndpointCount { text: String, count: usize },
    /// One endpoint is malformed.
    #[error("membership endpoint {endpoint:?} is malformed: {detail}")]
    Endpoint { endpoint: String, detail: &'static str },
}

/// One `host:port` of etcd. IPv6 addresses are written in brackets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreEndpoint {
    host: String,
    port: u16,
}

impl StoreEndpoint {
    /// The endpoint as an `http://` URL.
    pub fn http_url(&self) -> String {
        format!("http://{self}")
    }
}

impl fmt::Display for StoreEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl From<std::net::SocketAddr> for StoreEndpoint {
    fn from(addr: std::net::SocketAddr) -> Self {
        let host = match addr {
            std::net::SocketAddr::V4(v4) => v4.ip().to_string(),
            std::net::SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
        };
        let port = addr.port();
        Self { host, port }
    }
}

impl FromStr for StoreEndpoint {
    type Err = MembershipUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = |detail| MembershipUrlError::Endpoint { endpoint: text.to_owned(), detail };
        let text = text.trim();
        if text.contains('@') {
            return Err(malformed("user names are not supported"));
        }
        if text.contains('/') {
            return Err(malformed("expected host:port without a path"));
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest
                    .split_once(']')
                    .ok_or_else(|| malformed("the IPv6 bracket is not closed"))?;
                let address: std::net::Ipv6Addr =
                    address.parse().map_err(|_| malformed("not an IPv6 address"))?;
                match port.strip_prefix(':') {
                    Some(port) => (format!("[{address}]"), Some(port)),
                    None if port.is_empty() => (format!("[{address}]"), None),
                    None => return Err(malformed("expected :port after the bracket")),
                }
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host.to_owned(), Some(port)),
                None => (text.to_owned(), None),
            },
        };
        let is_host_char = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        let is_name = !host.is_empty() && host.chars().all(is_host_char);
        if !is_name && !host.starts_with('[') {
            return Err(malformed("not a host name"));
        }
        let port = match port.map(str::parse) {
            None => ETCD_CLIENT_PORT,
            Some(Ok(port)) if port > 0 => port,
            Some(_) => return Err(malformed("not a port between 1 and 65535")),
        };
        Ok(Self { host, port })
    }
}

/// A cluster's name in a store, and the store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterAddress {
    /// Its records live under `/tessera/{name}/`.
    pub name: String,
    /// Members of the store; any of them will do.
    pub endpoints: Vec<StoreEndpoint>,
}

/// Where membership lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipUrl {
    /// A store inside the process tree of `tessera up`.
    Embedded,
    /// An etcd cluster (or an embedded store of another process).
    Etcd(Vec<StoreEndpoint>),
}

impl FromStr for MembershipUrl {
    type Err = MembershipUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "embedded" {
            return Ok(Self::Embedded);
        }
        if text.starts_with("https://") || text.starts_with("etcds://") {
            let text = text.to_owned();
            return Err(MembershipUrlError::Tls { text });
        }
        let list = text
            .strip_prefix("etcd://")
            .or_else(|| text.strip_prefix("http://"))
            .ok_or_else(|| MembershipUrlError::UnknownScheme { text: text.to_owned() })?;
        let list = list.strip_suffix('/').unwrap_or(list);
        let mut endpoints = Vec::new();
        for endpoint in list.split(',').filter(|part| !part.trim().is_empty()) {
            let endpoint: StoreEndpoint = endpoint.parse()?;
            if !endpoints.contains(&endpoint) {
                endpoints.push(endpoint);
            }
        }
        if endpoints.is_empty() || endpoints.len() > MAX_ENDPOINTS {
            return Err(MembershipUrlError::EndpointCount {
                text: text.to_owned(),
                count: endpoints.len(),
            });
        }
        Ok(Self::Etcd(endpoints))
    }
}

impl fmt::Display for MembershipUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::Etcd(endpoints) => {
                f.write_str("etcd://")?;
                for (i, endpoint) in endpoints.iter().enumerate() {
                    let comma = if i == 0 { "" } else { "," };
                    write!(f, "{comma}{endpoint}")?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> String {
        text.parse::<MembershipUrl>().unwrap().to_string()
    }

    #[test]
    fn urls_survive_their_own_text() {
        for text in [
            "embedded",
            "etcd://127.0.0.1:2379",
            "etcd://a:2379,b:2380,c.d-e:1",
            "etcd://[::1]:2379",
        ] {
            assert_eq!(parsed(text), text);
        }
    }

    #[test]
    fn ports_default_and_repeated_endpoints_count_once() {
        assert_eq!(parsed("etcd://a"), "etcd://a:2379");
        assert_eq!(parsed("etcd://[::1]"), "etcd://[::1]:2379");
        assert_eq!(parsed("http://a:1/"), "etcd://a:1");
        assert_eq!(parsed("etcd://a:1, a:1,b:2,"), "etcd://a:1,b:2");
    }

    #[test]
    fn malformed_urls_are_refused() {
        for text in [
            "",
            "Embedded",
            "zookeeper://a",
            "a:2379",
            "https://a:2379",
            "etcd://",
            "etcd://,",
            "etcd://a:0",
            "etcd://a:65536",
            "etcd://a:port",
            "etcd://a b:1",
            "etcd://user@a:1",
            "etcd://a:1/path",
            "etcd://[::1:2379",
            "etcd://[zz]:2379",
            "etcd://[::1]2379",
            "etcd://:2379",
            "etcd://a:1:2",
            "etcd://a]:1",
        ] {
            assert!(text.parse::<MembershipUrl>().is_err(), "{text:?} parsed");
        }
        let many: Vec<String> = (0..=MAX_ENDPOINTS).map(|i| format!("h{i}")).collect();
        let many = format!("etcd://{}", many.join(","));
        assert!(many.parse::<MembershipUrl>().is_err());
    }
}
