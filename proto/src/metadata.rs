//! Keys of the reply's schema metadata, and names of actions.

/// The effective command, as JSON.
pub const COMMAND: &str = "quarrel.command";
/// The contract's version.
pub const VERSION: &str = "quarrel.version";
/// The CPU level that computes.
pub const LEVEL: &str = "quarrel.level";

/// Action: version, limits and CPU level, as `ServerInfo`.
pub const ACTION_SERVER_INFO: &str = "server.info";
/// Action: every scheme, as `Schemes`.
pub const ACTION_SCHEMES_LIST: &str = "schemes.list";
