//! A command's plan.

use bytes::Bytes;
use quarrel_engine::Plan;
use quarrel_proto::command;

use crate::{shared::Shared, status::Fault};

/// A command's plan. Patterns are compiled, so it is made on the pool.
pub(crate) async fn plan_of(shared: &Shared, bytes: Bytes) -> Result<Plan, Fault> {
    let made = shared.pool.lane().run(move || -> Result<Plan, Fault> { Ok(Plan::new(&command::parse(&bytes)?)?) });
    made.await.map_err(Fault::from)?
}

/// The plan of a command, and whether its layers are a stored checkpoint's: then it is what DoGet answers.
pub(crate) async fn plan_of_any(shared: &Shared, bytes: Bytes) -> Result<(Plan, bool), Fault> {
    let made = shared.pool.lane().run(move || -> Result<(Plan, bool), Fault> {
        let mut command = command::parse(&bytes)?;
        let is_stored = command.source.is_some() && command.sink.is_none();
        if is_stored {
            command.source = None;
        }
        Ok((Plan::new(&command)?, is_stored))
    });
    made.await.map_err(Fault::from)?
}
