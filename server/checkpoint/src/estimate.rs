//! What a job would make of a checkpoint, from headers alone: which layer gets which scheme, and how large it becomes.

use quarrel_engine::{Codes, Scheme};
use quarrel_proto::v1;
use serde::Serialize;

use crate::{
    becoming::{Becoming, check_for_gguf, is_copy},
    error::CheckpointError,
    fate::{Fate, fates, plan_of},
    fused::is_whole,
    job::copied_model,
    model::Model,
    report::Status,
    source::Tensor,
    storage::Location,
    stored::{self, Entry, Part, layout},
    view::{Computed, view},
};

/// What a process takes beside weights and results. Seen: up to 60 MiB, on a busy machine.
const BESIDE_BYTES: u64 = 80 << 20;

/// What a job would make.
#[derive(Debug, Serialize)]
pub struct Estimate {
    /// In the order of the source.
    pub layers: Vec<Estimated>,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the destination's tensors; with ladders, at least and at most.
    pub destination_bytes: (u64, u64),
    /// Over all quantized layers that have one scheme.
    pub bits_per_weight: Option<f64>,
    /// What `quarrel quantize` takes in this process, at most.
    pub peak_memory_bytes: u64,
}

/// What would become of a tensor.
#[derive(Debug, Serialize)]
pub struct Estimated {
    /// Its name.
    pub name: String,
    /// Quantized or kept.
    pub status: Status,
    /// The contract's word, if it is kept.
    pub reason: Option<String>,
    /// The same as a sentence.
    pub message: Option<String>,
    /// Its element type.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The scheme; those of a ladder in their order, of which none may be good enough.
    pub schemes: Vec<String>,
    /// Codes with padding, scales and zero points, in bits per element; none for a ladder.
    pub bits_per_weight: Option<f64>,
    /// Bytes in the source.
    pub bytes: u64,
    /// Bytes in the destination, at least and at most.
    pub destination_bytes: (u64, u64),
}

/// Looks at a file or a model's folder; to be a GGUF file, if `gguf` is there, with the metadata of another, if that says one.
///
/// # Errors
/// [`CheckpointError`] for a source or a command that a job would refuse.
pub fn estimate(
    source: &Location,
    command: v1::Quantize,
    gguf: Option<Option<&Location>>,
    memory_bytes: u64,
) -> Result<Estimate, CheckpointError> {
    if gguf.is_none() && is_copy(&command) {
        return copied(source, &command, memory_bytes);
    }
    let model = Model::open(source)?;
    // Layers of GPTQ and AWQ are computed whole: two at once, each read, turned and remembered.
    let computed = model.tensors().filter(|(_, tensor)| Computed::holds(tensor.at.start));
    let computed = 6 * computed.map(|(_, tensor)| tensor.bytes()).max().unwrap_or(0);
    let becoming = gguf.map(|metadata| Becoming::new(&model, command.clone(), metadata)).transpose()?;
    let (model, command) = match &becoming {
        Some(becoming) => (becoming.model.clone(), becoming.command.clone()),
        None => (view(model, &command)?, command),
    };
    let mut fates = fates(model.shards(), &command)?;
    if let Some(becoming) = becoming {
        becoming.tell(&mut fates);
    }
    let plan = plan_of(&command)?;
    let mut layers = Vec::new();
    let mut whole = 0;
    for ((_, tensor), fate) in model.tensors().zip(fates.iter().flatten()) {
        let schemes = match fate {
            Fate::Sent(word) => plan.schemes_of(&tensor.name, &tensor.shape, word)?,
            Fate::Copied { .. } => Vec::new(),
        };
        if schemes.len() > 1 || schemes.iter().any(|scheme| is_whole(scheme, tensor)) {
            whole = whole.max(tensor.bytes());
        }
        layers.push(estimated(tensor, fate, &schemes));
    }
    let of_one = || layers.iter().filter_map(|layer| Some((layer.bits_per_weight?, layer.elements())));
    let elements: f64 = of_one().map(|(_, elements)| elements).sum();
    let bits: f64 = of_one().map(|(bits, elements)| bits * elements).sum();
    let sum = |of: fn(&Estimated) -> u64| layers.iter().map(of).sum();
    Ok(Estimate {
        source_bytes: model.stored_bytes(),
        destination_bytes: (sum(|layer| layer.destination_bytes.0), sum(|layer| layer.destination_bytes.1)),
        bits_per_weight: (elements > 0.0).then(|| bits / elements),
        peak_memory_bytes: BESIDE_BYTES + memory_bytes + 3 * whole + computed,
        layers,
    })
}

/// Of a command that stores every tensor as it is seen.
fn copied(source: &Location, command: &v1::Quantize, memory_bytes: u64) -> Result<Estimate, CheckpointError> {
    check_for_gguf(command)?;
    let (model, _) = copied_model(Model::open(source)?)?;
    let layers = Vec::from_iter(model.tensors().map(|(_, tensor)| Estimated {
        name: tensor.name.clone(),
        status: Status::Kept,
        reason: None,
        message: None,
        dtype: tensor.dtype.to_string(),
        shape: tensor.shape.clone(),
        schemes: Vec::new(),
        bits_per_weight: None,
        bytes: tensor.bytes(),
        destination_bytes: (tensor.bytes(), tensor.bytes()),
    }));
    let bytes = layers.iter().map(|layer| layer.bytes).sum();
    // Codes of GPTQ and AWQ, and blocks, are computed whole.
    let most = 6 * layers.iter().map(|layer| layer.bytes).max().unwrap_or(0);
    Ok(Estimate {
        source_bytes: model.stored_bytes(),
        destination_bytes: (bytes, bytes),
        bits_per_weight: None,
        peak_memory_bytes: BESIDE_BYTES + memory_bytes + most,
        layers,
    })
}

fn estimated(tensor: &Tensor, fate: &Fate, schemes: &[Scheme]) -> Estimated {
    let sizes = schemes.iter().map(|scheme| bytes(scheme, tensor));
    // A ladder's last rung may miss: then the layer stays.
    let sizes = Vec::from_iter(sizes.chain((schemes.len() != 1).then_some(tensor.bytes())));
    let (reason, message) = match fate {
        Fate::Copied { reason, message } => (Some(reason.word().to_owned()), Some(message.clone())),
        Fate::Sent(_) => (None, None),
    };
    Estimated {
        name: tensor.name.clone(),
        status: if schemes.is_empty() { Status::Kept } else { Status::Quantized },
        reason,
        message,
        dtype: tensor.dtype.to_string(),
        shape: tensor.shape.clone(),
        schemes: schemes.iter().map(Scheme::to_string).collect(),
        bits_per_weight: match schemes {
            [scheme] if tensor.bytes() > 0 => Some(bits(scheme, tensor)),
            _ => None,
        },
        bytes: tensor.bytes(),
        destination_bytes: (
            sizes.iter().copied().min().unwrap_or_default(),
            sizes.iter().copied().max().unwrap_or_default(),
        ),
    }
}

impl Estimated {
    fn elements(&self) -> f64 {
        self.shape.iter().product::<u64>() as f64
    }
}

/// Of all tensors that a layer becomes.
fn bytes(scheme: &Scheme, tensor: &Tensor) -> u64 {
    layout("", scheme, (tensor.dtype.of_values(), &tensor.shape)).iter().map(|(_, entry)| stored::bytes(entry)).sum()
}

/// Per element, as the metrics count them.
fn bits(scheme: &Scheme, tensor: &Tensor) -> f64 {
    let width = match scheme.codes() {
        Codes::Int { bits, .. } => u64::from(bits),
        // Symmetric: no zero points.
        _ => 0,
    };
    let parts = layout("", scheme, (tensor.dtype.of_values(), &tensor.shape));
    let scales = parts.iter().find(|(part, _)| *part == Part::Scales);
    let scales: u64 = scales.map_or(0, |(_, (_, _, shape))| shape.iter().product());
    let of = |(part, entry): &(Part, Entry)| match part {
        // With the mean beside them, which is said.
        Part::Nested => 8 * (stored::bytes(entry) + 4),
        Part::Codes | Part::Scales | Part::Global => 8 * stored::bytes(entry),
        // However they are packed.
        Part::ZeroPoints => scales * width,
        Part::Shape | Part::Said => 0,
    };
    let elements = tensor.shape.iter().product::<u64>();
    parts.iter().map(of).sum::<u64>() as f64 / elements as f64
}
