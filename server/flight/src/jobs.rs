//! Jobs: checkpoints from one URI to another, which the server reads and writes under the prefixes that its operator allows.
//!
//! A job is a pure map over files (`quarrel_checkpoint::Job`); what it has made lies at its sink and nowhere else. So nothing here outlives the
//! process, and a job that was stopped goes on when it is submitted again, to whichever server.

mod work;

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use prost::Message;
use quarrel_checkpoint::{Allowed, CheckpointError, Location, Stop, Stores, Told, check_for_gguf, is_copy, is_gguf};
use quarrel_proto::{
    Reason,
    v1::{self, command::Verb},
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::work::Work;
pub(crate) use self::work::by;
use crate::{
    config::Config,
    shared::Shared,
    sinks::{Claim, Sinks},
    status::Fault,
};

/// Jobs that are remembered after their end.
const REMEMBERED: usize = 1_000;
/// A longer command is forgotten at the end of its job.
const COMMAND_REMEMBERED_BYTES: usize = 16 << 10;

/// What a server does at URIs.
#[derive(Debug)]
pub(crate) struct Jobs {
    stores: Stores,
    read: Allowed,
    write: Allowed,
    sinks: Sinks,
    places: Arc<Semaphore>,
    /// The newest last.
    known: Mutex<BTreeMap<u64, Arc<Entry>>>,
    /// Told apart from those of a server that was here before.
    prefix: String,
}

/// A job that was submitted.
#[derive(Debug)]
struct Entry {
    state: Mutex<State>,
    /// Until it has ended.
    claim: Mutex<Option<Claim>>,
    began: Instant,
    stop: Arc<Stop>,
    /// Nobody waits for it any more.
    cancelled: CancellationToken,
}

#[derive(Debug)]
struct State {
    job: v1::Job,
    ended: bool,
    /// Bytes of layers that are done, and of those that are not.
    done: u64,
    underway: u64,
}

const RUNNING: &str = "running";
const DONE: &str = "done";
const FAILED: &str = "failed";
const CANCELLED: &str = "cancelled";

impl Jobs {
    /// What the configuration allows.
    ///
    /// # Errors
    /// A prefix that is none.
    pub(crate) fn new(config: &Config) -> Result<Jobs, CheckpointError> {
        let stores = Stores::new(Config::variables()).that_follow_nothing();
        let (read, write) = config.allowed()?;
        Ok(Jobs {
            stores,
            read,
            write,
            sinks: Sinks::default(),
            places: Arc::new(Semaphore::new(config.jobs_max)),
            known: Mutex::default(),
            prefix: format!("{:08x}", RandomState::new().hash_one(0u8) as u32),
        })
    }

    /// Where a URI leads that may be read.
    pub(crate) fn source(&self, uri: &str) -> Result<Location, Fault> {
        Ok(self.read.locate(uri, &self.stores)?)
    }

    /// A place that may be written, until what is returned with it is dropped: nobody else of this server writes there meanwhile.
    pub(crate) fn sink(&self, uri: &str, who: String) -> Result<(Location, Claim), Fault> {
        let sink = self.write.locate(uri, &self.stores)?;
        let claim = self.sinks.claim(&sink, who)?;
        Ok((sink, claim))
    }

    /// Begins a job. What its command gets wrong is said at once; what is wrong with its source, by its status.
    pub(crate) fn submit(&self, shared: &Arc<Shared>, request: v1::JobRequest) -> Result<v1::Job, Fault> {
        if shared.draining.is_cancelled() {
            return Err(Fault::new(Reason::Stopping, "the server is stopping: try another, or again later"));
        }
        let command = request.command.clone().unwrap_or_default();
        let missing = |field: &str| Fault::new(Reason::CommandMalformed, format!("a job needs `{field}`, a URI"));
        let source = command.source.as_deref().ok_or_else(|| missing("source"))?;
        let sink = command.sink.as_deref().ok_or_else(|| missing("sink"))?;
        let ends = (self.source(source)?, self.write.locate(sink, &self.stores)?);
        if matches!(&command.verb, Some(Verb::Quantize(quantize)) if quantize.return_kept.is_some()) {
            let what = "`return_kept` has no effect on a checkpoint: what is kept is copied";
            return Err(Fault::new(Reason::OptionConflict, what));
        }
        for (name, value) in [("sqnr_db_min", request.sqnr_db_min), ("cosine_min", request.cosine_min)] {
            if value.is_some_and(|value| !value.is_finite()) {
                return Err(Fault::new(Reason::OptionInvalid, format!("`{name}` is no finite number")));
            }
        }
        let metadata = request.metadata.as_deref().map(|uri| self.source(uri)).transpose()?;
        if metadata.is_some() && !(is_gguf(&ends.1) && matches!(command.verb, Some(Verb::Quantize(_)))) {
            let what = "`metadata` has no effect here: it is for `quantize` to a GGUF file";
            return Err(Fault::new(Reason::OptionConflict, what));
        }
        match &command.verb {
            Some(Verb::Quantize(quantize)) if is_gguf(&ends.1) || is_copy(quantize) => check_for_gguf(quantize)?,
            // The plan of the verb alone: a stream's has no URIs.
            verb => drop(quarrel_engine::Plan::new(&v1::Command { verb: verb.clone(), ..v1::Command::default() })?),
        }
        let most = shared.config.jobs_max;
        let exceeded = || format!("{most} jobs run, as many as `jobs_max`: try again later");
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| Fault::new(Reason::JobsExceeded, exceeded()))?;

        let (number, entry) = self.enter(command, &ends.1)?;
        tracing::info!(job = self.name(number), source = ?ends.0.shown(), sink = ?ends.1.shown(), "job submitted");
        let work = Work { shared: Arc::clone(shared), entry: Arc::clone(&entry), request, ends, metadata };
        tokio::spawn(work.run(self.name(number), place));
        Ok(entry.job())
    }

    fn name(&self, number: u64) -> String {
        format!("{}-{number}", self.prefix)
    }

    fn enter(&self, command: v1::Command, sink: &Location) -> Result<(u64, Arc<Entry>), Fault> {
        let mut known = lock(&self.known);
        let number = known.last_key_value().map_or(1, |(last, _)| last + 1);
        let claim = self.sinks.claim(sink, format!("job `{}`", self.name(number)))?;
        let job =
            v1::Job { job: self.name(number), state: RUNNING.to_owned(), command: Some(command), ..v1::Job::default() };
        let entry = Arc::new(Entry {
            state: Mutex::new(State { job, ended: false, done: 0, underway: 0 }),
            claim: Mutex::new(Some(claim)),
            began: Instant::now(),
            stop: Arc::default(),
            cancelled: CancellationToken::new(),
        });
        known.insert(number, Arc::clone(&entry));
        // The oldest that are over go.
        let over = known.iter().filter(|(_, entry)| lock(&entry.state).ended).map(|(number, _)| *number);
        let over = Vec::from_iter(over);
        for number in &over[..over.len().saturating_sub(REMEMBERED)] {
            known.remove(number);
        }
        Ok((number, entry))
    }

    fn find(&self, name: &str) -> Result<Arc<Entry>, Fault> {
        let number = name.strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix('-')?.parse::<u64>().ok());
        let found = number.and_then(|number| lock(&self.known).get(&number).cloned());
        let name = quarrel_engine::shorten(name, 100);
        found.ok_or_else(|| Fault::new(Reason::JobUnknown, format!("no job is called `{name}`")))
    }

    /// How far a job is.
    pub(crate) fn status(&self, name: &str) -> Result<v1::Job, Fault> {
        Ok(self.find(name)?.job())
    }

    /// Stops a job, unless it is about to be done.
    pub(crate) fn cancel(&self, name: &str) -> Result<v1::Job, Fault> {
        let entry = self.find(name)?;
        entry.cancel();
        Ok(entry.job())
    }

    /// Every job, the newest first.
    pub(crate) fn list(&self) -> Vec<v1::Job> {
        lock(&self.known).values().rev().map(|entry| entry.job()).collect()
    }

    /// Waits until no job runs.
    pub(crate) async fn idle(&self, most: usize) {
        let all = u32::try_from(most).unwrap_or(u32::MAX);
        let _ = self.places.acquire_many(all).await;
    }

    /// Stops all of them.
    pub(crate) fn stop(&self) {
        lock(&self.known).values().for_each(|entry| entry.cancel());
    }
}

impl Entry {
    fn job(&self) -> v1::Job {
        let state = lock(&self.state);
        let mut job = state.job.clone();
        if !state.ended {
            job.seconds = self.began.elapsed().as_secs_f64();
            job.bytes_done = state.done + state.underway;
        }
        job
    }

    fn cancel(&self) {
        // Too late once what makes it a model is being written.
        if self.stop.stop() {
            self.cancelled.cancel();
        }
    }

    fn begins(&self, bytes: u64, effective: Option<&v1::Command>) {
        let mut state = lock(&self.state);
        state.job.bytes_total = bytes;
        if let (Some(effective), Some(command)) = (effective, &mut state.job.command) {
            command.verb = effective.verb.clone();
        }
    }

    fn told(&self, told: Told<'_>) {
        let mut state = lock(&self.state);
        match told {
            Told::Layer { name, bytes, completes } => {
                state.job.layer = Some(name.to_owned());
                state.underway = if completes { 0 } else { bytes };
                state.done += if completes { bytes } else { 0 };
            }
            Told::Skipped(bytes) => state.done += bytes,
            Told::Writes => state.job.layer = None,
        }
    }

    fn end(&self, ended: &Result<v1::Summary, Fault>) {
        let mut state = lock(&self.state);
        state.job.seconds = self.began.elapsed().as_secs_f64();
        state.job.bytes_done = state.done + state.underway;
        state.job.layer = None;
        state.ended = true;
        drop(lock(&self.claim).take());
        if state.job.command.as_ref().is_some_and(|command| command.encoded_len() > COMMAND_REMEMBERED_BYTES) {
            state.job.command = None;
        }
        match ended {
            Ok(summary) => {
                state.job.state = DONE.to_owned();
                state.job.bytes_done = state.job.bytes_total;
                state.job.summary = Some(summary.clone());
            }
            Err(_) if self.stop.is_stopped() => state.job.state = CANCELLED.to_owned(),
            Err(fault) => {
                state.job.state = FAILED.to_owned();
                state.job.reason = Some(fault.reason.word().to_owned());
                state.job.message = Some(fault.message.clone());
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic between two lines of this file leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
