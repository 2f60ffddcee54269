//! Messages to what they need next: the reading state of one stream.

use std::{sync::Arc, time::Duration};

use quarrel_engine::{Cancel, Decoded, Decoder, Intake, Need, Plan};
use quarrel_proto::Reason;
use tokio::time::Instant;

use crate::{frame::FrameIn, shared::Shared, status::Fault};

/// Units that one look at a batch makes before they are handed on.
const UNITS_PER_LOOK: usize = 16;
/// How long one look at a batch of many rows takes before others have their turn.
const LOOK: Duration = Duration::from_millis(5);

/// Dictionaries of at most so many bytes are looked through with each light batch.
const LIGHT_BYTES: usize = 1 << 20;

/// What is needed next, and whether there may be more of the same message.
pub(crate) type Seen = (Vec<Need>, Result<bool, Fault>);

/// It goes to the pool and back with messages that take their time.
pub(crate) struct Reader {
    decoder: Decoder,
    /// Absent until the schema has come.
    intake: Option<Intake>,
    plan: Plan,
    shared: Arc<Shared>,
    cancel: Cancel,
}

impl Reader {
    pub(crate) fn new(plan: Plan, shared: Arc<Shared>, cancel: Cancel) -> Reader {
        Reader { decoder: Decoder::new(shared.config.layer_limits()), intake: None, plan, shared, cancel }
    }

    /// Takes a light message where it came; `None` if it is for [`Reader::look`] on the pool. With a recipe of hundreds of hard
    /// patterns it may take a few milliseconds.
    pub(crate) fn glance(&mut self, message: &mut Option<FrameIn>) -> Option<Seen> {
        let is_light = |message: &mut FrameIn| message.is_light() && self.decoder.bytes() <= LIGHT_BYTES;
        let message = message.take_if(is_light)?;
        Some(self.look(Some(&message)))
    }

    /// Takes a message, or goes on with the last.
    pub(crate) fn look(&mut self, message: Option<&FrameIn>) -> Seen {
        let mut needs = Vec::new();
        let more = self.look_into(message, &mut needs);
        if let (Err(_), Some(intake)) = (&more, &mut self.intake) {
            needs.extend(intake.remaining().into_iter().map(Need::Unit));
        }
        (needs, more)
    }

    fn look_into(&mut self, message: Option<&FrameIn>, needs: &mut Vec<Need>) -> Result<bool, Fault> {
        if let Some(message) = message {
            match self.decoder.decode(&message.header, &message.body)? {
                Decoded::Nothing => return Ok(false),
                Decoded::Schema(schema) => {
                    let limits = self.shared.config.layer_limits();
                    self.intake = Some(Intake::new(&self.plan, limits, &schema)?);
                    return Ok(false);
                }
                Decoded::Batch(batch) => match &mut self.intake {
                    Some(intake) => intake.begin(&batch)?,
                    None => return Err(Fault::new(Reason::SchemaMissing, "a batch came before the schema")),
                },
            }
        }
        let Some(intake) = &mut self.intake else { return Ok(false) };
        let began = Instant::now();
        while needs.len() < UNITS_PER_LOOK {
            match intake.next()? {
                Some(Need::Rest) if began.elapsed() > LOOK => break,
                Some(Need::Rest) if self.cancel.check().is_err() => break,
                Some(Need::Rest) => {}
                Some(need) => needs.push(need),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Bytes that stay from message to message beside spans.
    pub(crate) fn held_bytes(&self) -> usize {
        self.intake.as_ref().map_or(0, Intake::held_bytes) + self.decoder.bytes()
    }

    /// The end of the request.
    pub(crate) fn end(&self) -> Result<(), Fault> {
        match &self.intake {
            Some(intake) => Ok(intake.end()?),
            None => Err(Fault::new(Reason::SchemaMissing, "the stream ended before its schema came")),
        }
    }
}
