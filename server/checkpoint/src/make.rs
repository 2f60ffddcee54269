//! One file of a job through a quantizer: its layers asked for, their answers put together.

use std::collections::BTreeMap;

use futures::StreamExt;
use quarrel_proto::v1;
use safetensors::Dtype;

use crate::{
    fate::Fate,
    job::{Coded, Quantizer, Told, Weights},
    modules::Module,
    report::Status,
    source::Source,
    target::Target,
    unit::Unit,
};

/// A file, quantized but not written yet.
pub(crate) async fn quantized<Q: Quantizer>(
    quantizer: &Q,
    command: v1::Quantize,
    (shard, fates): (&Source, &[Fate]),
    target: Target,
    tell: &mut impl FnMut(Told<'_>),
) -> Result<Unit, Q::Error> {
    let mut unit = Unit::new(target, shard.clone())?;
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

/// A file, dequantized but not written yet.
pub(crate) async fn dense<Q: Quantizer>(
    quantizer: &Q,
    dtype: Option<&str>,
    (shard, modules): (&Source, &[Module]),
    target: Target,
    tell: &mut impl FnMut(Told<'_>),
) -> Result<Unit, Q::Error> {
    let mut unit = Unit::dense(target, shard.clone(), modules)?;
    // A stream has one type of values: as many streams, one after the other, as there are types.
    let mut by_type: BTreeMap<&str, Vec<Coded>> = BTreeMap::new();
    for module in modules {
        let (word, stored) = match dtype.unwrap_or(module.dtype_word()) {
            "bf16" => ("bf16", Dtype::BF16),
            "f16" => ("f16", Dtype::F16),
            _ => ("f32", Dtype::F32),
        };
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
