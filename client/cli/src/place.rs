//! Where the work is done: on a server elsewhere, or on threads of this process.

use quarrel_client::Client;
use quarrel_flight::Config;

use crate::{args::PlaceArgs, failure::Failure};

const CHECK_ENVIRONMENT: &str = "Check the variables QUARREL_* of the environment.";

/// What the environment and the command line say of this process.
pub(crate) fn environment(args: &PlaceArgs) -> Result<Config, Failure> {
    let wrong = |sentence: String| Failure::usage(sentence, CHECK_ENVIRONMENT);
    let mut config = Config::from_environment().map_err(wrong)?;
    config.threads = args.threads.or(config.threads);
    config.cpu_level = args.cpu_level.or(config.cpu_level);
    config.check().map_err(|error| wrong(error.to_string()))?;
    Ok(config)
}

/// The server that the command line names, if it names one.
pub(crate) async fn server(args: &PlaceArgs) -> Result<Option<Client>, Failure> {
    let Some(address) = &args.server else { return Ok(None) };
    let client = Client::connect(address).await?;
    Ok(Some(client.streams(args.streams.unwrap_or(std::num::NonZeroUsize::MIN))))
}
