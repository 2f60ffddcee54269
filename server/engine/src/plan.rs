//! A command made into a plan. Every mistake of a command surfaces here, before any data comes; what a layer can get
//! wrong surfaces in [`QuantizePlan::decide`], before any element of it is computed.

use quarrel_kernels::{Arith, Decoded, Dtype, Scaling};
use quarrel_proto::{
    Reason,
    v1::{self, command::Verb as Asked, quantize::How},
};

use crate::{
    layer::{Decision, Note, Rung, note},
    recipe::{Match, Target, Targets, profile},
    scheme::{Granularity, Scheme, SchemeError},
    shape::Shape,
};

/// What a stream is to do, and the command that says so with every default filled in.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What to do.
    pub verb: Verb,
    /// The effective command: what the reply's schema metadata echoes.
    pub effective: v1::Command,
}

/// The verbs of a stream.
#[derive(Debug, Clone)]
pub enum Verb {
    /// Weights in, codes out.
    Quantize(QuantizePlan),
    /// Codes in, weights out.
    Dequantize(DequantizePlan),
}

/// How each layer is quantized.
#[derive(Debug, Clone)]
pub struct QuantizePlan {
    how: Layers,
    arith: Arith,
    /// What a fault in a layer's numbers does to the stream.
    pub on_error: OnError,
    /// Whether kept rows carry their weights.
    pub return_kept: bool,
}

/// How codes are turned back.
#[derive(Debug, Clone, Copy)]
pub struct DequantizePlan {
    /// The type of the values.
    pub decoded: Decoded,
}

/// What a fault in a layer's numbers does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// It ends the stream.
    Fail,
    /// Its rows say `failed`, and the stream goes on.
    Continue,
}

/// What a group that does not divide does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnIndivisible {
    Fail,
    Keep,
}

#[derive(Debug, Clone)]
enum Layers {
    /// Every layer of rank 2 or more, whatever its name.
    All(Choice),
    Recipe {
        rules: Vec<(Vec<Target>, Choice)>,
        ignore: Vec<(String, Vec<Target>)>,
    },
}

/// A scheme, or a ladder of them.
#[derive(Debug, Clone)]
struct Choice {
    schemes: Vec<Scheme>,
    thresholds: Option<Thresholds>,
    on_indivisible: OnIndivisible,
    /// The greatest magnitude over the layers that share a global scale.
    amax: Option<f32>,
}

/// The least quality that a rung of a ladder must reach. An exact layer passes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// In dB.
    pub sqnr_db_min: Option<f64>,
    /// Of the angle between weights and decoded values.
    pub cosine_min: Option<f64>,
}

/// Why a command cannot be carried out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// A scheme, or an option of one.
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    /// No such profile.
    #[error("unknown profile `{0}`: expected `edge`, `local` or `cloud`")]
    Profile(String),
    /// A word that is not one of an option's.
    #[error("`{option}` is `{value}`: expected {expected}")]
    Option {
        /// The option.
        option: &'static str,
        /// What came.
        value: String,
        /// What may come.
        expected: &'static str,
    },
    /// Options that exclude each other, or one without effect.
    #[error("{0}")]
    Conflict(String),
    /// A recipe's target that cannot be used.
    #[error("target `{target}`: {why}")]
    Target {
        /// The target.
        target: String,
        /// What is wrong with it.
        why: String,
    },
    /// A recipe that says nothing.
    #[error("{0}")]
    Recipe(&'static str),
    /// A quantize command without scheme, recipe or profile.
    #[error("`quantize` says not how: expected one of `scheme`, `recipe`, `profile`")]
    NoScheme,
    /// Not here.
    #[error("{0}")]
    Unsupported(&'static str),
}

impl PlanError {
    /// The contract's word for it.
    pub fn reason(&self) -> Reason {
        match self {
            PlanError::Scheme(error) => error.reason(),
            PlanError::Profile(_) => Reason::ProfileUnknown,
            PlanError::Option { .. } => Reason::OptionInvalid,
            PlanError::Conflict(_) => Reason::OptionConflict,
            PlanError::Target { .. } | PlanError::Recipe(_) => Reason::RecipeInvalid,
            PlanError::NoScheme => Reason::CommandMalformed,
            PlanError::Unsupported(_) => Reason::VerbUnsupported,
        }
    }
}

impl Plan {
    /// The plan of a command that reads and writes the caller's stream.
    ///
    /// # Errors
    /// [`PlanError`] for anything that the command gets wrong.
    pub fn new(command: &v1::Command) -> Result<Plan, PlanError> {
        if command.source.is_some() || command.sink.is_some() {
            return Err(PlanError::Unsupported(
                "`source` and `sink` are not served by this version: send layers on the stream of DoExchange and write what comes back",
            ));
        }
        let (verb, effective) = match &command.verb {
            Some(Asked::Quantize(quantize)) => {
                let (plan, effective) = QuantizePlan::new(quantize)?;
                (Verb::Quantize(plan), Asked::Quantize(effective))
            }
            Some(Asked::Dequantize(dequantize)) => {
                let (plan, effective) = DequantizePlan::new(dequantize)?;
                (Verb::Dequantize(plan), Asked::Dequantize(effective))
            }
            Some(Asked::Measure(_)) | None => {
                return Err(PlanError::Unsupported(
                    "`measure` is not served by this version: the columns `metrics` and `layer_metrics` of `quantize` measure every row",
                ));
            }
        };
        Ok(Plan { verb, effective: v1::Command { verb: Some(effective), ..Default::default() } })
    }

    /// Why `quantize` leaves a layer as it is, where that is known before any element is read. `dtype` is the wire's word.
    pub fn keeps(&self, name: &str, dims: &[u64], dtype: &str) -> Option<Note> {
        match self.decision(name, dims, dtype)? {
            Decision::Keep(note) => Some(note),
            Decision::Quantize(_) | Decision::Ladder(..) | Decision::Fail(_) => None,
        }
    }

    /// The schemes that `quantize` may give a layer: one, or those of a ladder; an error for a layer that cannot be quantized.
    pub fn schemes_of(&self, name: &str, dims: &[u64], dtype: &str) -> Result<Vec<Scheme>, crate::LayerError> {
        Ok(match self.decision(name, dims, dtype) {
            Some(Decision::Quantize(rung)) => vec![rung.scheme],
            Some(Decision::Ladder(rungs, _)) => rungs.iter().map(|rung| rung.scheme).collect(),
            Some(Decision::Fail(note)) => return Err(crate::LayerError(note)),
            Some(Decision::Keep(_)) | None => Vec::new(),
        })
    }

    fn decision(&self, name: &str, dims: &[u64], dtype: &str) -> Option<Decision> {
        let (Verb::Quantize(plan), Some(dtype)) = (&self.verb, Dtype::named(dtype)) else { return None };
        let dims = dims.iter().map(|dim| i64::try_from(*dim).ok()).collect::<Option<_>>()?;
        let shape = Shape::new(dims).ok()?;
        Some(plan.decide(name, Some(&shape), shape.elements(), dtype))
    }

    /// Every scheme that `quantize` may use, those of ladders included.
    pub fn schemes(&self) -> Vec<Scheme> {
        match &self.verb {
            Verb::Quantize(QuantizePlan { how: Layers::All(choice), .. }) => choice.schemes.clone(),
            Verb::Quantize(QuantizePlan { how: Layers::Recipe { rules, .. }, .. }) => {
                rules.iter().flat_map(|(_, choice)| choice.schemes.iter().copied()).collect()
            }
            Verb::Dequantize(_) => Vec::new(),
        }
    }
}

impl DequantizePlan {
    fn new(command: &v1::Dequantize) -> Result<(DequantizePlan, v1::Dequantize), PlanError> {
        let word = command.dtype.as_deref().unwrap_or("f32");
        let decoded = match word {
            "f32" => Decoded::F32,
            "bf16" => Decoded::Bf16,
            "f16" => Decoded::F16,
            _ => return Err(option("dtype", word, "`f32`, `bf16` or `f16`")),
        };
        Ok((DequantizePlan { decoded }, v1::Dequantize { dtype: Some(word.to_owned()) }))
    }
}

impl QuantizePlan {
    fn new(command: &v1::Quantize) -> Result<(QuantizePlan, v1::Quantize), PlanError> {
        let arith_word = command.arith.as_deref().unwrap_or("f32");
        let arith = match arith_word {
            "f32" => Arith::F32,
            "weight-dtype" => Arith::WeightDtype,
            _ => return Err(option("arith", arith_word, "`f32` or `weight-dtype`")),
        };
        let on_error_word = command.on_error.as_deref().unwrap_or("fail");
        let on_error = match on_error_word {
            "fail" => OnError::Fail,
            "continue" => OnError::Continue,
            _ => return Err(option("on_error", on_error_word, "`fail` or `continue`")),
        };
        let mut effective = v1::Quantize {
            arith: Some(arith_word.to_owned()),
            on_error: Some(on_error_word.to_owned()),
            return_kept: Some(command.return_kept.unwrap_or(false)),
            ..Default::default()
        };
        let how = match &command.how {
            None => return Err(PlanError::NoScheme),
            Some(How::Scheme(scheme)) => {
                let rule = v1::Rule {
                    targets: Vec::new(),
                    scheme: scheme.clone(),
                    group_size: command.group_size,
                    channel_dims: command.channel_dims,
                    on_indivisible: command.on_indivisible.clone(),
                    fallback: command.fallback.clone(),
                    amax: command.amax,
                };
                let (choice, rule) = Choice::new(&rule)?;
                effective.how = Some(How::Scheme(rule.scheme));
                effective.on_indivisible = rule.on_indivisible;
                effective.fallback = rule.fallback;
                effective.amax = rule.amax;
                Layers::All(choice)
            }
            Some(How::Recipe(recipe)) => {
                refuse_beside(command, "recipe")?;
                let (layers, recipe) = recipe_layers(recipe)?;
                effective.how = Some(How::Recipe(recipe));
                layers
            }
            Some(How::Profile(name)) => {
                refuse_beside(command, "profile")?;
                let (layers, recipe) = recipe_layers(&profile(name)?)?;
                effective.how = Some(How::Recipe(recipe));
                layers
            }
        };
        Ok((QuantizePlan { how, arith, on_error, return_kept: command.return_kept.unwrap_or(false) }, effective))
    }

    /// What is to become of a layer. `shape` is absent for a row that is one whole channel.
    pub fn decide(&self, name: &str, shape: Option<&Shape>, elements: usize, dtype: Dtype) -> Decision {
        let flat = Shape::flat(elements);
        let laid = shape.unwrap_or(&flat);
        let rank = shape.map_or(1, Shape::rank);
        let choice = match self.choose(name, rank) {
            Ok((choice, named)) => {
                if shape.is_some() && rank < 2 && !named {
                    let what = format_args!("shape {laid} has rank {rank}; a rule that names the layer quantizes it");
                    return Decision::Keep(note(Reason::Rank1, name, what));
                }
                choice
            }
            Err(kept) => return Decision::Keep(kept),
        };
        if laid.elements() == 0 {
            return Decision::Keep(note(Reason::Empty, name, format_args!("shape {laid} has no elements")));
        }
        let rung = |scheme: &Scheme| Rung::new(*scheme, self.arith, choice.amax, dtype, name, laid);
        let refuse = |note: Note| match (note.reason, choice.on_indivisible) {
            (Reason::GroupSizeIndivisible, OnIndivisible::Keep) => Decision::Keep(note),
            _ => Decision::Fail(note),
        };
        match (choice.thresholds, choice.schemes.as_slice()) {
            (None, [scheme, ..]) => rung(scheme).map_or_else(refuse, Decision::Quantize),
            (None, []) => unreachable!("a choice has a scheme"),
            (Some(thresholds), schemes) => {
                let mut rungs = Vec::new();
                let mut indivisible = None;
                for scheme in schemes {
                    match rung(scheme) {
                        Ok(rung) => rungs.push(rung),
                        Err(note) if note.reason == Reason::GroupSizeIndivisible => {
                            indivisible.get_or_insert(note);
                        }
                        Err(note) => return Decision::Fail(note),
                    }
                }
                match indivisible {
                    Some(note) if rungs.is_empty() => refuse(note),
                    _ => Decision::Ladder(rungs, thresholds),
                }
            }
        }
    }

    /// The layer's choice and whether its very name was given; or why it is kept.
    fn choose(&self, name: &str, rank: usize) -> Result<(&Choice, bool), Note> {
        match &self.how {
            Layers::All(choice) => Ok((choice, false)),
            Layers::Recipe { rules, ignore } => {
                if let Some((text, _)) = ignore
                    .iter()
                    .find(|(_, targets)| targets.iter().any(|target| target.matches(name, rank) != Match::No))
                {
                    return Err(note(
                        Reason::Ignored,
                        name,
                        format_args!("`ignore` names it by `{}`", crate::shorten(text, 100)),
                    ));
                }
                rules
                    .iter()
                    .find_map(|(targets, choice)| {
                        let met =
                            targets.iter().map(|target| target.matches(name, rank)).find(|met| *met != Match::No)?;
                        Some((choice, met == Match::ByName))
                    })
                    .ok_or_else(|| note(Reason::Unmatched, name, format_args!("no rule of the recipe matches it")))
            }
        }
    }
}

impl Choice {
    /// The choice of a rule, and the rule with defaults filled in.
    fn new(rule: &v1::Rule) -> Result<(Choice, v1::Rule), PlanError> {
        let mut scheme: Scheme = rule.scheme.parse()?;
        if let Some(size) = rule.group_size {
            scheme = scheme.with_group_size(size)?;
        }
        if let Some(dims) = rule.channel_dims {
            scheme = scheme.with_channel_dims(dims)?;
        }
        let mut schemes = vec![scheme];
        let mut thresholds = None;
        let mut fallback = None;
        if let Some(ladder) = &rule.fallback {
            for text in &ladder.schemes {
                let mut rung: Scheme = text.parse()?;
                if let Some(dims) = rule.channel_dims {
                    rung = rung.with_channel_dims(dims)?;
                }
                schemes.push(rung);
            }
            if let Some(other) = schemes.iter().find(|rung| rung.channel_dims() != scheme.channel_dims()) {
                return Err(PlanError::Conflict(format!(
                    "rungs `{scheme}` and `{other}` differ in `channel_dims`: expected one layout of the layer for all"
                )));
            }
            thresholds = Some(Thresholds::new(ladder)?);
            let texts = schemes[1..].iter().map(Scheme::to_string).collect();
            fallback = Some(v1::Ladder { schemes: texts, ..*ladder });
        }
        let grouped = schemes.iter().any(|scheme| matches!(scheme.granularity(), Granularity::Group(_)));
        let on_indivisible = match rule.on_indivisible.as_deref() {
            None | Some("fail") => OnIndivisible::Fail,
            Some("keep") => OnIndivisible::Keep,
            Some(word) => return Err(option("on_indivisible", word, "`fail` or `keep`")),
        };
        if rule.on_indivisible.is_some() && !grouped {
            return Err(PlanError::Conflict(format!(
                "`on_indivisible` has no effect on scheme `{scheme}`, which has no groups"
            )));
        }
        let is_global = schemes.iter().any(|scheme| scheme.format().scaling == Scaling::E4m3);
        if rule.amax.is_some() && !is_global {
            return Err(PlanError::Conflict(format!(
                "`amax` has no effect on scheme `{scheme}`, which has no global scale: expected NVFP4A16"
            )));
        }
        let amax = match rule.amax {
            None => None,
            Some(amax) if amax.is_finite() && amax >= 0.0 && (amax as f32).is_finite() => Some(amax as f32),
            Some(amax) => return Err(option("amax", &amax.to_string(), "a finite f32, at least 0")),
        };
        let effective = v1::Rule {
            targets: rule.targets.clone(),
            scheme: scheme.to_string(),
            // They stand in the canonical scheme.
            group_size: None,
            channel_dims: None,
            on_indivisible: grouped.then(|| rule.on_indivisible.clone().unwrap_or_else(|| "fail".to_owned())),
            fallback,
            amax: amax.map(f64::from),
        };
        Ok((Choice { schemes, thresholds, on_indivisible, amax }, effective))
    }
}

impl Thresholds {
    fn new(ladder: &v1::Ladder) -> Result<Thresholds, PlanError> {
        if ladder.sqnr_db_min.is_none() && ladder.cosine_min.is_none() {
            return Err(PlanError::Conflict(
                "`fallback` has no effect without a threshold: expected `sqnr_db_min` or `cosine_min`".to_owned(),
            ));
        }
        for (name, value) in [("sqnr_db_min", ladder.sqnr_db_min), ("cosine_min", ladder.cosine_min)] {
            if let Some(value) = value.filter(|value| !value.is_finite()) {
                return Err(option(name, &value.to_string(), "a finite number"));
            }
        }
        if let Some(cosine) = ladder.cosine_min.filter(|cosine| !(-1.0..=1.0).contains(cosine)) {
            return Err(option("cosine_min", &cosine.to_string(), "a number of -1 to 1"));
        }
        Ok(Thresholds { sqnr_db_min: ladder.sqnr_db_min, cosine_min: ladder.cosine_min })
    }

    /// Whether those metrics reach them. An exact layer (mse 0) does.
    pub fn met(&self, metrics: &quarrel_kernels::Metrics) -> bool {
        let reaches = |least: Option<f64>, value: Option<f64>| {
            least.is_none_or(|least| value.is_some_and(|value| value >= least))
        };
        metrics.mse == Some(0.0)
            || reaches(self.sqnr_db_min, metrics.sqnr_db) && reaches(self.cosine_min, metrics.cosine)
    }
}

fn recipe_layers(recipe: &v1::Recipe) -> Result<(Layers, v1::Recipe), PlanError> {
    if recipe.rules.is_empty() {
        return Err(PlanError::Recipe("the recipe has no rules: expected at least one of `targets` and `scheme`"));
    }
    let mut targets = Targets::default();
    let (mut rules, mut effective) = (Vec::new(), Vec::new());
    for rule in &recipe.rules {
        if rule.targets.is_empty() {
            return Err(PlanError::Recipe(
                "a rule of the recipe has no targets: expected names, globs, `Linear` or `re:`",
            ));
        }
        let (choice, rule) = Choice::new(rule)?;
        let compiled = rule.targets.iter().map(|target| targets.rule(target)).collect::<Result<_, _>>()?;
        rules.push((compiled, choice));
        effective.push(rule);
    }
    let mut ignore = Vec::new();
    for text in &recipe.ignore {
        ignore.push((text.clone(), targets.ignore(text)?));
    }
    Ok((Layers::Recipe { rules, ignore }, v1::Recipe { rules: effective, ignore: recipe.ignore.clone() }))
}

/// Options that belong to a rule have no place beside a recipe or a profile.
fn refuse_beside(command: &v1::Quantize, how: &str) -> Result<(), PlanError> {
    let given = [
        ("group_size", command.group_size.is_some()),
        ("channel_dims", command.channel_dims.is_some()),
        ("on_indivisible", command.on_indivisible.is_some()),
        ("fallback", command.fallback.is_some()),
        ("amax", command.amax.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(PlanError::Conflict(format!(
            "`{name}` stands beside `{how}`: expected it in a rule of a recipe, or beside `scheme`"
        ))),
        None => Ok(()),
    }
}

fn option(option: &'static str, value: &str, expected: &'static str) -> PlanError {
    PlanError::Option { option, value: crate::shorten(value, 100), expected }
}
