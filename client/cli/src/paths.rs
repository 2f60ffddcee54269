//! Paths of a command line.

use std::path::Path;

use quarrel_checkpoint::{CheckpointError, Location, Stores};
use quarrel_flight::Config;

use crate::{args::FileArgs, failure::Failure, served::blocking};

/// Refuses one file in two roles.
pub(crate) fn different(paths: &[&Path], stores: &Stores) -> Result<(), Failure> {
    let places = paths.iter().map(|path| stores.locate(path)).collect::<Result<Vec<_>, _>>()?;
    for (at, place) in places.iter().enumerate() {
        if places[at + 1..].iter().any(|other| place.is(other)) {
            let sentence = format!("`{}` is named twice on the command line, in two roles", paths[at].display());
            return Err(Failure::usage(sentence, "Choose another name."));
        }
    }
    Ok(())
}

/// Source and destination of a job.
pub(crate) struct Ends {
    pub(crate) stores: Stores,
    pub(crate) source: Location,
    pub(crate) destination: Location,
    /// Whether the source is one; one that is not there is none.
    pub(crate) is_folder: bool,
}

impl Ends {
    pub(crate) async fn of(files: &FileArgs) -> Result<Ends, Failure> {
        let stores = stores();
        let (source, destination) = (stores.locate(&files.source)?, stores.locate(&files.destination)?);
        let is_folder = is_folder(&source).await?;
        Ok(Ends { stores, source, destination, is_folder })
    }

    /// Refuses a report within either of two folders. (Of each other the job itself refuses them.)
    pub(crate) fn apart_from(&self, report: &Location) -> Result<(), Failure> {
        match [&self.source, &self.destination].into_iter().find(|folder| self.is_folder && report.is_within(folder)) {
            Some(folder) => {
                let (report, folder) = (report.shown(), folder.shown());
                let sentence = format!("`{}` is within `{}`", report.display(), folder.display());
                Err(Failure::usage(sentence, "Choose another name."))
            }
            None => Ok(()),
        }
    }
}

/// The object stores of the environment.
pub(crate) fn stores() -> Stores {
    Stores::new(Config::variables())
}

/// Whether it is a folder; what is not there is none.
pub(crate) async fn is_folder(location: &Location) -> Result<bool, Failure> {
    let location = location.clone();
    let found = blocking(move || match location.is_folder() {
        // What else is wrong with it is said when it is opened.
        Err(CheckpointError::Io { .. }) if location.path().is_some() => Ok(false),
        found => found,
    });
    found.await
}
