//! Where the report goes: what became of every tensor, measured, as JSON beside the result. The table is made of it.

use std::path::PathBuf;

use quarrel_checkpoint::REPORT;

use crate::args::QuantizeArgs;

/// Where the report goes.
pub(crate) fn path(args: &QuantizeArgs, is_folder: bool) -> PathBuf {
    let destination = &args.files.destination;
    if args.report.is_none() && is_folder {
        return destination.join(REPORT);
    }
    args.report.clone().unwrap_or_else(|| match destination.extension() {
        Some(ending) if ending == "safetensors" => destination.with_extension("report.json"),
        _ => destination.with_added_extension("report.json"),
    })
}
