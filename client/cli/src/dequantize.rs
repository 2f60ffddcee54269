//! `quarrel dequantize`: a quantized checkpoint to a dense one, through a server's verb of that name.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    num::NonZeroU64,
    sync::Arc,
    time::Instant,
};

use futures::TryStreamExt;
use quarrel_checkpoint::{Dtype, Module, Pieces, SCHEMES_KEY, Sink, Source, Stop, modules};
use quarrel_client::{CodedLayer, Error, proto::v1};
use serde::Serialize;

use crate::{
    args::{DequantizeArgs, FloatType, word},
    failure::Failure,
    place::{Place, Room},
    progress::Progress,
    seal::{different, seal, target},
    table::{clean, megabytes, place, print},
};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Done {
    source: String,
    destination: String,
    server: Option<String>,
    seconds: f64,
    source_bytes: u64,
    destination_bytes: u64,
    /// The quantized layers: name to scheme.
    dequantized: BTreeMap<String, String>,
    /// Tensors that were copied.
    copied: usize,
}

pub(crate) async fn dequantize(args: Box<DequantizeArgs>, stop: Arc<Stop>) -> Result<(), Failure> {
    let started = Instant::now();
    different(&[&args.files.source, &args.files.destination])?;
    let source = Source::open(&args.files.source)?;
    let found = modules(&source)?;
    if found.is_empty() {
        let sentence = format!("`{}` has no quantized layers", args.files.source.display());
        return Err(Failure::input(sentence, "Look at it with `quarrel inspect`."));
    }
    let mut sink = Sink::new(target(&args.files, &args.files.destination)?)?;
    let parts = HashSet::<&str>::from_iter(found.iter().flat_map(Module::parts));
    let others = source.tensors().iter().filter(|tensor| !parts.contains(tensor.name.as_str()));
    let copied = others.clone().count();
    for tensor in others {
        sink.copied(&source, tensor)?;
    }

    let place = Place::open(&args.place, args.output, Room::for_codes()).await?;
    let dequantized =
        found.iter().map(|module| (format!("{}.weight", module.name), module.scheme.to_string())).collect();
    let mut progress = Progress::new(found.iter().map(|module| module.codes.bytes()).sum(), args.output);
    // A stream has one type of values: as many streams, one after the other, as there are types.
    let mut by_type: BTreeMap<String, Vec<Module>> = BTreeMap::new();
    for module in found.iter().cloned() {
        let dtype = word(args.dtype.unwrap_or(own_type(&module)));
        if module.shape.contains(&0) {
            // Nothing to compute, and nothing that a server would answer.
            sink.here(format!("{}.weight", module.name), stored_type(&dtype), module.shape, &[])?;
        } else {
            by_type.entry(dtype).or_default().push(module);
        }
    }
    for (dtype, modules) in by_type {
        stream(&place, &source, &dtype, modules, &mut sink, &mut progress).await?;
    }
    let mut metadata = source.metadata().clone();
    metadata.remove(SCHEMES_KEY);
    let destination_bytes = seal(sink, metadata, &progress, &stop).await?;
    drop(progress);
    let done = Done {
        source: args.files.source.display().to_string(),
        destination: args.files.destination.display().to_string(),
        server: args.place.server.clone(),
        seconds: started.elapsed().as_secs_f64(),
        source_bytes: source.bytes(),
        destination_bytes,
        dequantized,
        copied,
    };
    tell(&done, &args)
}

/// All layers of one type, through one stream.
async fn stream(
    place: &Place,
    source: &Source,
    dtype: &str,
    modules: Vec<Module>,
    sink: &mut Sink,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let sizes = HashMap::<String, u64>::from_iter(modules.iter().map(|of| (of.name.clone(), of.codes.bytes())));
    let file = source.clone();
    let layers = modules.into_iter().map(move |module| coded(&file, &module));
    let mut open: HashMap<String, Pieces> = HashMap::new();
    let mut runs = place.client.dequantize(v1::Dequantize { dtype: Some(dtype.to_owned()) }, layers);
    while let Some(run) = runs.try_next().await? {
        let name = run.name.to_string();
        let pieces = open.entry(name.clone()).or_default();
        if run.elements.start == 0 {
            // The first, or the first again because its stream broke.
            *pieces = Pieces::default();
        }
        sink.spool(pieces, &run.data)?;
        let (size, total) = (sizes.get(&name).copied().unwrap_or(0), run.shape.iter().product::<u64>());
        let done = (size as f64 * run.elements.end as f64 / total as f64) as u64;
        progress.at(&name, if run.is_last { size } else { done }, run.is_last);
        if run.is_last {
            let pieces = open.remove(&name).unwrap_or_default();
            sink.spooled((format!("{name}.weight"), stored_type(dtype), run.shape.to_vec()), pieces)?;
        }
    }
    Ok(())
}

/// A layer to be sent. Its scales are read when its turn comes, its codes run by run.
fn coded(source: &Source, module: &Module) -> Result<CodedLayer, Error> {
    let broken = |detail: String| Error::Source { layer: module.name.clone(), detail };
    let scales = module.scales(source).map_err(|error| broken(error.to_string()))?;
    let points = module.zero_points(source).map_err(|error| broken(error.to_string()))?;
    let global = module.global_scale(source).map_err(|error| broken(error.to_string()))?;
    let span = NonZeroU64::new(module.span_channels()).unwrap_or(NonZeroU64::MIN);
    let dtype = word(own_type(module)).parse().map_err(|_| broken("its type is none of the wire".to_owned()))?;
    let (file, codes) = (source.clone(), module.codes.clone());
    let read = move |range| file.read(&codes, range);
    let scheme = module.scheme.to_string();
    CodedLayer::new(&*module.name, dtype, &module.shape, scheme, module.channels(), span, scales, points, read)
        .map(|layer| layer.with_global_scale(global))
}

fn tell(done: &Done, args: &DequantizeArgs) -> Result<(), Failure> {
    if args.output.quiet {
        return Ok(());
    }
    if args.output.json {
        return print(&serde_json::to_string_pretty(done).map_err(|error| Failure::ours(error.to_string()))?);
    }
    if args.output.verbose {
        for (layer, scheme) in &done.dequantized {
            print(&format!("{}  {scheme}", clean(layer)))?;
        }
    }
    let place = place(done.server.as_deref());
    let (layers, copied) = (done.dequantized.len(), done.copied);
    let (before, after) = (megabytes(done.source_bytes), megabytes(done.destination_bytes));
    print(&format!("{layers} dequantized, {copied} copied; {before} -> {after} in {:.1} s {place}", done.seconds))?;
    print(&done.destination)
}

/// The type that a layer's weights had.
fn own_type(module: &Module) -> FloatType {
    match module.dtype {
        Dtype::BF16 => FloatType::Bf16,
        Dtype::F16 => FloatType::F16,
        _ => FloatType::F32,
    }
}

fn stored_type(word: &str) -> Dtype {
    match word {
        "bf16" => Dtype::BF16,
        "f16" => Dtype::F16,
        _ => Dtype::F32,
    }
}
