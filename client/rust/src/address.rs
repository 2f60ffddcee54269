//! Where a server is, and connections to it.

use std::{io, path::PathBuf, pin::Pin, str::FromStr, sync::Arc};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use crate::error::Error;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address, Error> {
        let wrong = || Error::Address { address: text.to_owned() };
        if let Some(path) = text.strip_prefix("grpc+unix://").or_else(|| text.strip_prefix("unix:")) {
            return if path.is_empty() { Err(wrong()) } else { Ok(Address::Unix(path.into())) };
        }
        let host = text.strip_prefix("grpc://").or_else(|| text.strip_prefix("grpc+tcp://")).unwrap_or(text);
        match host.rsplit_once(':') {
            Some((name, port)) if !name.is_empty() && !name.contains('/') && port.parse::<u16>().is_ok() => {
                Ok(Address::Tcp(host.to_owned()))
            }
            _ => Err(wrong()),
        }
    }
}

/// Bytes both ways.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Makes connections.
pub(crate) type Dial = Arc<dyn Fn() -> Dialling + Send + Sync>;
pub(crate) type Dialling = Pin<Box<dyn Future<Output = io::Result<Box<dyn Io>>> + Send>>;

impl Address {
    pub(crate) fn dial(self) -> Dial {
        Arc::new(move || {
            let address = self.clone();
            Box::pin(async move {
                Ok(match address {
                    Address::Tcp(host) => {
                        let stream = TcpStream::connect(host).await?;
                        stream.set_nodelay(true)?;
                        Box::new(stream) as Box<dyn Io>
                    }
                    Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;

    #[test]
    fn addresses_are_read_as_servers_print_them() {
        let tcp = |host: &str| Address::Tcp(host.to_owned());
        for (text, address) in [
            ("grpc://127.0.0.1:8815", tcp("127.0.0.1:8815")),
            ("grpc+tcp://[::1]:8815", tcp("[::1]:8815")),
            ("quarrel.models.svc:8815", tcp("quarrel.models.svc:8815")),
            ("grpc+unix:///run/quarrel.sock", Address::Unix("/run/quarrel.sock".into())),
            ("unix:quarrel.sock", Address::Unix("quarrel.sock".into())),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address, "{text}");
        }
        for text in
            ["", "localhost", "http://host:80", "grpc+tls://host:1", "host:port", ":8815", "unix:", "host:99999"]
        {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
