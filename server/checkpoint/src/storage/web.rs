//! Object stores over HTTP: whom TLS trusts, and where answers may lead.

use std::{sync::Arc, time::Duration};

use object_store::{
    ClientOptions, Error, ObjectStore, ObjectStoreScheme,
    aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder,
    client::{HttpClient, HttpConnector},
    gcp::GoogleCloudStorageBuilder,
    http::HttpBuilder,
};
use url::{Position, Url};

/// For an answer to begin, and for a connection: as the library's own.
const CONNECT: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(30);

/// A client that goes where it is told and nowhere else: an answer that leads elsewhere is an error. It has the library's own patience; of the options
/// of a client that the environment may name (`AWS_PROXY_URL`, `AWS_TIMEOUT`) it takes none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Direct;

impl HttpConnector for Direct {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .timeout(REQUEST)
            .build();
        let client = client.map_err(|error| Error::Generic { store: "HTTP", source: Box::new(error) })?;
        Ok(HttpClient::new(client))
    }
}

/// The store of a URL, with what the environment says of it. (The library's own `parse_url_opts` takes no client.)
pub(super) fn open<'a>(
    url: &Url,
    scheme: &ObjectStoreScheme,
    options: impl Iterator<Item = (&'a str, &'a str)>,
    client: Option<Direct>,
) -> object_store::Result<Arc<dyn ObjectStore>> {
    // rustls has two libraries for the arithmetic of TLS and takes neither by itself. Another part of this process may have said it before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    macro_rules! build {
        ($builder:ty, $url:expr) => {{
            let builder = options.fold(<$builder>::new().with_url($url), |builder, (name, value)| {
                match name.to_ascii_lowercase().parse() {
                    Ok(key) => builder.with_config(key, value),
                    Err(_) => builder,
                }
            });
            match client {
                Some(client) => Arc::new(builder.with_http_connector(client).build()?),
                None => Arc::new(builder.build()?),
            }
        }};
    }
    Ok(match scheme {
        ObjectStoreScheme::AmazonS3 => build!(AmazonS3Builder, url.as_str()),
        ObjectStoreScheme::GoogleCloudStorage => build!(GoogleCloudStorageBuilder, url.as_str()),
        ObjectStoreScheme::MicrosoftAzure => build!(MicrosoftAzureBuilder, url.as_str()),
        _ => build!(HttpBuilder, &url[..Position::BeforePath]),
    })
}
