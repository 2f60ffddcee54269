//! One file of a job through a quantizer: its layers asked for, their answers put together.

use std::collections::BTreeMap;

use futures::StreamExt;
use quarrel_proto::v1;

use crate::{
    error::CheckpointError,
    fate::{Fate, dtype_of, plan_of},
    gguf::Head,
    layer::module_of,
    modules::Module,
    quantizer::{Coded, Quantizer, Told, Weights},
    report::Status,
    source::Source,
    stored::layout,
    target::Target,
    unit::{Foretold, Unit},
};

/// A file, quantized but not written yet: GGUF with that head, else safetensors.
pub(crate) async fn quantized<Q: Quantizer>(
    quantizer: &Q,
    command: v1::Quantize,
    (shard, fates): (&Source, &[Fate]),
    (target, head): (Target, Option<&Head>),
    tell: &mut impl FnMut(Told<'_>),
) -> Result<Unit, Q::Error> {
    let mut unit = Unit::new(target, shard.clone(), foretold(&command, shard, fates)?, head.cloned())?;
    let mut layers = Vec::new();
    for (at, (tensor, fate)) in shard.tensors().iter().zip(fates).enumerate() {
        match fate {
            Fate::Sent(dtype) => {
                layers.push(Weights { source: shard.clone(), tensor: tensor.clone(), dtype });
                unit.waits(at);
            }
            Fate::Copied { reason, message } => {
                unit.copy(at, Status::Kept, reason.word().to_owned(), message.clone())?;
            }
        }
    }
    if layers.is_empty() {
        return Ok(unit);
    }
    let mut rows = quantizer.quantize(command, layers);
    while let Some(row) = rows.next().await {
        let row = row?;
        let (name, bytes, completes) = (row.name.clone(), row.done, row.completes);
        unit.take(row)?;
        tell(Told::Layer { name: &name, bytes, completes });
    }
    Ok(unit)
}

/// A file whose quantized layers are stored as they are seen.
pub(crate) fn copied(shard: &Source, modules: &[Module], target: Target) -> Result<Unit, CheckpointError> {
    let schemes = modules.iter().map(|module| (module.name.clone(), module.scheme.to_string()));
    Unit::copied(target, shard.clone(), schemes.collect())
}

/// A file, dequantized but not written yet.
pub(crate) async fn dense<Q: Quantizer>(
    quantizer: &Q,
    dtype: Option<&str>,
    (shard, modules): (&Source, &[Module]),
    target: Target,
    tell: &mut impl FnMut(Told<'_>),
) -> Result<Unit, Q::Error> {
    let typed = modules.iter().map(|module| {
        let word = dtype.unwrap_or(module.dtype_word());
        (module, (word, dtype_of(word)))
    });
    let typed = Vec::from_iter(typed);
    let becoming = Vec::from_iter(typed.iter().map(|(module, (_, stored))| (*module, *stored)));
    let mut unit = Unit::dense(target, shard.clone(), &becoming)?;
    // A stream has one type of values: as many streams, one after the other, as there are types.
    let mut by_type: BTreeMap<&str, Vec<Coded>> = BTreeMap::new();
    for (module, (word, stored)) in typed {
        if unit.waits_dense(module, stored)? {
            by_type.entry(word).or_default().push(Coded { source: shard.clone(), module: module.clone() });
        }
    }
    for (dtype, layers) in by_type {
        let mut values = quantizer.dequantize(dtype.to_owned(), layers);
        while let Some(values) = values.next().await {
            let values = values?;
            let (name, bytes, completes) = (values.module.clone(), values.done, values.completes);
            unit.take_values(values)?;
            tell(Told::Layer { name: &name, bytes, completes });
        }
    }
    Ok(unit)
}

/// What a file is to become, unless that depends on numbers: a ladder's rung does.
fn foretold(command: &v1::Quantize, shard: &Source, fates: &[Fate]) -> Result<Option<Foretold>, CheckpointError> {
    let plan = plan_of(command)?;
    let mut foretold = Foretold::default();
    for (tensor, fate) in shard.tensors().iter().zip(fates) {
        let Fate::Sent(dtype) = fate else {
            foretold.entries.push(tensor.entry());
            continue;
        };
        // What cannot be quantized is told when its turn comes.
        let schemes = plan.schemes_of(&tensor.name, &tensor.shape, dtype).unwrap_or_default();
        let [scheme] = schemes.as_slice() else { return Ok(None) };
        let (module, weights) = (module_of(&tensor.name), (tensor.dtype.of_values(), tensor.shape.as_slice()));
        foretold.entries.extend(layout(module, scheme, weights).into_iter().map(|(_, entry)| entry));
        foretold.schemes.insert(module.to_owned(), scheme.to_string());
    }
    Ok(Some(foretold))
}
