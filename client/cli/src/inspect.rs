//! `quarrel inspect`: what is in a checkpoint, from headers alone.

use std::collections::{BTreeMap, HashMap};

use quarrel_checkpoint::{Model, Source, modules};
use serde::Serialize;

use crate::{
    args::InspectArgs,
    failure::Failure,
    paths::stores,
    served::blocking,
    table::{clean, megabytes, print, shape, table},
};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Inspection {
    /// The file or folder.
    file: String,
    /// Of all tensors.
    bytes: u64,
    /// Of a file; of a folder's, see `files`.
    metadata: BTreeMap<String, String>,
    /// A folder's files of tensors: name to metadata.
    files: BTreeMap<String, BTreeMap<String, String>>,
    /// Quantized layers in the layout of compressed-tensors: module to scheme; null where the layout is another.
    schemes: Option<BTreeMap<String, String>>,
    tensors: Vec<TensorLine>,
}

#[derive(Debug, Serialize)]
struct TensorLine {
    name: String,
    /// The file that it is in.
    file: String,
    dtype: String,
    shape: Vec<u64>,
    bytes: u64,
    /// The scheme of the quantized layer that it is part of.
    scheme: Option<String>,
}

pub(crate) async fn inspect(args: InspectArgs) -> Result<(), Failure> {
    let location = stores().locate(&args.source)?;
    let model = blocking(move || Model::open(&location)).await?;
    let (mut tensors, mut schemes, mut why) = (Vec::new(), Some(BTreeMap::new()), None);
    for source in model.shards() {
        // A file whose quantized layers are of another layout can be looked at all the same.
        let found = modules(source).map_err(|error| why = Some(error)).ok();
        let scheme_of = HashMap::<&str, String>::from_iter(found.iter().flatten().flat_map(|module| {
            let scheme = module.scheme.to_string();
            module.parts().map(move |part| (part, scheme.clone()))
        }));
        tensors.extend(source.tensors().iter().map(|tensor| TensorLine {
            name: tensor.name.clone(),
            file: name(source),
            dtype: tensor.dtype.to_string(),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes(),
            scheme: tensor.scheme.map(|scheme| scheme.to_string()).or(scheme_of.get(tensor.name.as_str()).cloned()),
        }));
        match (&mut schemes, &found) {
            (Some(schemes), Some(found)) => {
                schemes.extend(found.iter().map(|module| (module.name.clone(), module.scheme.to_string())));
                // What is decoded as it is opened.
                schemes.extend(source.tensors().iter().filter_map(|tensor| {
                    let module = tensor.name.strip_suffix(".weight")?;
                    Some((module.to_owned(), tensor.scheme?.to_string()))
                }));
            }
            _ => schemes = None,
        }
    }
    let is_folder = model.folder().is_some();
    let of = |source: &Source| (name(source), source.metadata().clone());
    let inspection = Inspection {
        file: args.source.display().to_string(),
        bytes: tensors.iter().map(|tensor| tensor.bytes).sum(),
        metadata: if is_folder { BTreeMap::new() } else { model.shards()[0].metadata().clone() },
        files: if is_folder { model.shards().iter().map(of).collect() } else { BTreeMap::new() },
        schemes,
        tensors,
    };
    if args.json {
        return print(&serde_json::to_string_pretty(&inspection).map_err(|error| Failure::ours(error.to_string()))?);
    }
    let mut lines = table(["tensor", "shape", "type", "bytes", "scheme"]);
    for tensor in &inspection.tensors {
        lines.add_row([
            clean(&tensor.name),
            shape(&tensor.shape),
            tensor.dtype.clone(),
            tensor.bytes.to_string(),
            tensor.scheme.clone().unwrap_or_default(),
        ]);
    }
    print(&lines.to_string())?;
    print(&summary(&inspection))?;
    match why {
        Some(why) => print(&format!("Not read as quantized layers: {}", clean(&why.to_string()))),
        None => Ok(()),
    }
}

fn summary(inspection: &Inspection) -> String {
    let mut lines = Vec::new();
    let mut by_scheme = BTreeMap::<&str, usize>::new();
    for scheme in inspection.schemes.iter().flat_map(BTreeMap::values) {
        *by_scheme.entry(scheme).or_default() += 1;
    }
    if by_scheme.len() > 1 {
        lines.extend(by_scheme.iter().map(|(scheme, layers)| format!("{layers} layers of {scheme}")));
    }
    let modules = inspection.schemes.as_ref().map_or(0, BTreeMap::len);
    let files = inspection.files.len();
    let files = if files > 1 { format!(" in {files} files") } else { String::new() };
    let (tensors, size) = (inspection.tensors.len(), megabytes(inspection.bytes));
    lines.push(format!("{tensors} tensors{files}, {size}, {modules} quantized layers"));
    lines.join("\n")
}

fn name(source: &Source) -> String {
    source.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}
