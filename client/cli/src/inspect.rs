//! `quarrel inspect`: what is in a file, from its header alone.

use std::collections::HashMap;

use quarrel_checkpoint::{Source, modules};
use serde::Serialize;

use crate::{
    args::InspectArgs,
    failure::Failure,
    paths::stores,
    served::blocking,
    table::{clean, megabytes, print, shape, table},
};

#[derive(Debug, Serialize)]
struct Inspection {
    file: String,
    bytes: u64,
    metadata: std::collections::BTreeMap<String, String>,
    /// Quantized layers in the layout of compressed-tensors: module to scheme; null where the layout is another.
    schemes: Option<std::collections::BTreeMap<String, String>>,
    tensors: Vec<TensorLine>,
}

#[derive(Debug, Serialize)]
struct TensorLine {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    bytes: u64,
    /// The scheme of the quantized layer that it is part of.
    scheme: Option<String>,
}

pub(crate) async fn inspect(args: InspectArgs) -> Result<(), Failure> {
    let location = stores().locate(&args.file)?;
    let source = blocking(move || Source::open(&location)).await?;
    // A file whose quantized layers are of another layout can be looked at all the same.
    let (found, why) = match modules(&source) {
        Ok(found) => (Some(found), None),
        Err(error) => (None, Some(error)),
    };
    let found = found.as_deref();
    let scheme_of = HashMap::<String, String>::from_iter(found.unwrap_or_default().iter().flat_map(|module| {
        let scheme = module.scheme.to_string();
        module.parts().map(move |part| (part.to_owned(), scheme.clone())).collect::<Vec<_>>()
    }));
    let tensors = Vec::from_iter(source.tensors().iter().map(|tensor| TensorLine {
        name: tensor.name.clone(),
        dtype: format!("{:?}", tensor.dtype),
        shape: tensor.shape.clone(),
        bytes: tensor.bytes(),
        scheme: scheme_of.get(&tensor.name).cloned(),
    }));
    let inspection = Inspection {
        file: args.file.display().to_string(),
        bytes: tensors.iter().map(|tensor| tensor.bytes).sum(),
        metadata: source.metadata().clone(),
        schemes: found
            .map(|modules| modules.iter().map(|module| (module.name.clone(), module.scheme.to_string())).collect()),
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
    let modules = inspection.schemes.as_ref().map_or(0, |schemes| schemes.len());
    let total =
        format!("{} tensors, {}, {modules} quantized layers", inspection.tensors.len(), megabytes(inspection.bytes));
    print(&total)?;
    match why {
        Some(why) => print(&format!("Not read as quantized layers: {}", clean(&why.to_string()))),
        None => Ok(()),
    }
}
