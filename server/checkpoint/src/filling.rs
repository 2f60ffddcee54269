//! A model that is filled from async code: each step on a thread that may block, full files written while more comes.

use std::sync::Arc;

use arrow_array::RecordBatch;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::{
    beside::Beside,
    error::CheckpointError,
    put::{Closed, Put, Written},
    report::{By, Gate, Report, pass},
    target::Stop,
};

/// A [`Put`] and the file of it that is being written. Dropped before it is finished, it leaves nothing, once its [`Stop`] is released.
#[derive(Debug)]
pub struct Filling {
    /// Elsewhere during a step; gone if one has panicked.
    put: Option<Put>,
    writing: Option<JoinHandle<Result<Written, CheckpointError>>>,
    stop: Arc<Stop>,
}

impl Filling {
    /// Of a model that is begun, with the [`Stop`] that it was begun with.
    pub fn new(put: Put, stop: Arc<Stop>) -> Filling {
        Filling { put: Some(put), writing: None, stop }
    }

    /// Takes the next answers to the stream's rows.
    ///
    /// # Errors
    /// [`CheckpointError`] for a layer that cannot be stored, and for a disk that cannot be written to.
    pub async fn take(&mut self, batch: RecordBatch) -> Result<(), CheckpointError> {
        let closed = self.step(move |put| put.take(&batch)).await?;
        self.write(closed).await
    }

    /// The layer that came last.
    pub(crate) fn last_layer(&self) -> Option<&str> {
        self.put.as_ref()?.last_layer()
    }

    /// The stream has come to its end, after so many layers if it says so: all of them are written, if they are good enough.
    ///
    /// # Errors
    /// [`CheckpointError::Command`] if not as many have come; [`CheckpointError::Gate`]; [`CheckpointError::Io`].
    pub async fn end(&mut self, layers: Option<u64>, gate: Gate) -> Result<(), CheckpointError> {
        let ended = self.step(move |put| {
            let closed = put.end(layers)?;
            pass(gate, put.layers())?;
            Ok(closed)
        });
        let closed = ended.await?;
        self.write(closed).await?;
        self.written().await
    }

    /// Makes a model of its files and what it has `beside` them, of a source that is called so.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], of kind `Interrupted` if the [`Stop`] was first; [`CheckpointError`] for a configuration that no loader could use.
    pub async fn finish(&mut self, source: String, beside: Beside, by: By) -> Result<Report, CheckpointError> {
        let stop = self.stop.hold();
        self.step(move |put| put.finish(source, beside, by, &stop)).await
    }

    async fn step<T: Send + 'static>(
        &mut self,
        act: impl FnOnce(&mut Put) -> Result<T, CheckpointError> + Send + 'static,
    ) -> Result<T, CheckpointError> {
        let gone = || CheckpointError::Ours("a step before has panicked".to_owned());
        let mut put = self.put.take().ok_or_else(gone)?;
        let acting = spawn_blocking(move || {
            let done = act(&mut put);
            (put, done)
        });
        let (put, done) = acting.await.map_err(|error| CheckpointError::Ours(error.to_string()))?;
        self.put = Some(put);
        done
    }

    /// Has files written that are full, one after the other.
    async fn write(&mut self, closed: Vec<Closed>) -> Result<(), CheckpointError> {
        for closed in closed {
            self.written().await?;
            let stop = self.stop.hold();
            self.writing = Some(spawn_blocking(move || closed.write(&stop)));
        }
        Ok(())
    }

    /// Waits for the file that is being written.
    async fn written(&mut self) -> Result<(), CheckpointError> {
        let Some(writing) = &mut self.writing else { return Ok(()) };
        let written = writing.await;
        self.writing = None;
        let written = written.map_err(|error| CheckpointError::Ours(error.to_string()))??;
        if let Some(put) = &mut self.put {
            put.add(written);
        }
        Ok(())
    }
}
