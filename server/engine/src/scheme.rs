//! Schemes: what numbers come out. A grammar, and the presets of the ecosystem.
//!
//! ```text
//! scheme  = (preset ["/g" N] | "int" N ["-asym"] ["/tensor" | "/channel" | "/g" N] | "fp8/" ("tensor" | "channel" | "b" R "x" C))
//!           [";channel_dims=" N] [";double_quant=" ("false" | "true")] [";mx=" ("floor" | "rceil" | "even")] [";solver=" ("absmax" | "mse" | "hqq")]
//! ```
//! The canonical form drops what is the default (`/channel` of `intN`, a preset's own group, one channel dimension) and parses back to itself. Formulas, layouts: `proto/SPEC.md`.

use std::{fmt, num::NonZeroU32, str::FromStr};

use quarrel_kernels::{Codes, Format, MxRule, Packing, Scaling, Search};
use quarrel_proto::Reason;

use crate::presets::{FP8, PRESETS, Preset, int};

/// What numbers come out of a layer. A value that exists is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    preset: Option<&'static Preset>,
    format: Format,
    granularity: Granularity,
    channel_dims: NonZeroU32,
    solver: Solver,
}

/// How a scale is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Solver {
    /// So that the whole range of the numbers is covered.
    #[default]
    Absmax,
    /// So that the squared error is least, of the range and narrower ones; integers only.
    Mse,
    /// So that the absolute error is least, of scales and zero points around those of the range; integers only.
    Hqq,
}

impl Solver {
    const ALL: [Solver; 3] = [Solver::Absmax, Solver::Mse, Solver::Hqq];

    fn named(word: &str) -> Option<Solver> {
        Solver::ALL.into_iter().find(|solver| solver.name() == word)
    }

    /// The word in a scheme.
    fn name(self) -> &'static str {
        match self {
            Solver::Absmax => "absmax",
            Solver::Mse => "mse",
            Solver::Hqq => "hqq",
        }
    }

    /// What is searched, if it is by search that scales are chosen.
    pub(crate) fn search(self) -> Option<Search> {
        match self {
            Solver::Absmax => None,
            Solver::Mse => Some(Search::Mse),
            Solver::Hqq => Some(Search::Hqq),
        }
    }
}

/// Which elements share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// The whole layer.
    Tensor,
    /// One output channel.
    Channel,
    /// So many consecutive columns of one output channel.
    Group(NonZeroU32),
    /// A rectangle of channels and columns; those at the edges may be smaller.
    Block {
        /// Output channels.
        rows: NonZeroU32,
        /// Columns.
        columns: NonZeroU32,
    },
}

/// Why a scheme or its options cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemeError {
    /// No such scheme.
    #[error(
        "unknown scheme `{text}`: expected a preset ({presets}), `intN[-asym][/tensor|/channel|/gG]` with N of 2..8, \
         or `fp8/tensor`, `fp8/channel`, `fp8/bRxC`, then options as in `;channel_dims=2`, of nf4 and fp4 `;double_quant=true`, \
         of MX presets `;mx=rceil`, of integers `;solver=mse` and `;solver=hqq`",
        presets = preset_names()
    )]
    Unknown {
        /// What came.
        text: String,
    },
    /// A group size where there is no group.
    #[error(
        "`group_size` {group_size} has no place in scheme `{scheme}`: expected `intN` or a grouped preset (W4A16, W4A16_ASYM, W8A16, nf4, fp4)"
    )]
    NotGrouped {
        /// The scheme, canonical.
        scheme: String,
        /// What was asked for.
        group_size: u32,
    },
    /// A group size that the format does not have.
    #[error("`group_size` of `{preset}` is {group_size}: expected 32, 64, 128, 256, 512, 1024, 2048 or 4096")]
    BlockSize {
        /// The preset.
        preset: &'static str,
        /// What was asked for.
        group_size: u32,
    },
    /// A number that must be at least one.
    #[error("`{option}` is 0: expected at least 1")]
    Zero {
        /// Its name.
        option: &'static str,
    },
    /// An option both in the scheme's own text and beside it.
    #[error("`{option}` is given twice: in scheme `{scheme}` and beside it")]
    Twice {
        /// The scheme, canonical.
        scheme: String,
        /// The option.
        option: &'static str,
    },
}

fn preset_names() -> String {
    PRESETS.each_ref().map(|preset| preset.name).join(", ")
}

impl SchemeError {
    /// The contract's word for it.
    pub fn reason(&self) -> Reason {
        match self {
            SchemeError::Unknown { .. } => Reason::SchemeUnknown,
            SchemeError::NotGrouped { .. } | SchemeError::Twice { .. } => Reason::OptionConflict,
            SchemeError::Zero { .. } | SchemeError::BlockSize { .. } => Reason::OptionInvalid,
        }
    }
}

impl Scheme {
    /// What the codes and the scales are.
    pub fn format(&self) -> Format {
        self.format
    }

    /// What the codes are.
    pub fn codes(&self) -> Codes {
        self.format.codes
    }

    /// Which elements share a scale.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// How many leading dimensions of a shape make up the output channels.
    pub fn channel_dims(&self) -> NonZeroU32 {
        self.channel_dims
    }

    /// The preset it is, or is a variant of.
    pub fn preset(&self) -> Option<&'static Preset> {
        self.preset
    }

    /// The scheme with groups of `group_size` columns.
    ///
    /// # Errors
    /// [`SchemeError`] for zero, for a scheme that takes no group, and for one that names its group already.
    pub fn with_group_size(self, group_size: u32) -> Result<Scheme, SchemeError> {
        let size = NonZeroU32::new(group_size).ok_or(SchemeError::Zero { option: "group_size" })?;
        match (self.preset, self.granularity, self.format.codes) {
            (Some(preset), Granularity::Group(_), _) if !preset.takes_group() => {
                return Err(SchemeError::NotGrouped { scheme: self.to_string(), group_size });
            }
            (Some(preset), Granularity::Group(_), _) if !preset.takes_group_of(group_size) => {
                return Err(SchemeError::BlockSize { preset: preset.name, group_size });
            }
            (Some(preset), Granularity::Group(_), _) if preset.granularity == self.granularity => {}
            (None, Granularity::Channel, Codes::Int { .. }) => {}
            (_, Granularity::Group(_), _) => {
                return Err(SchemeError::Twice { scheme: self.to_string(), option: "group_size" });
            }
            _ => return Err(SchemeError::NotGrouped { scheme: self.to_string(), group_size }),
        }
        Ok(Scheme { granularity: Granularity::Group(size), ..self })
    }

    /// The same for a matrix, whose channels are its rows.
    pub fn of_matrices(self) -> Scheme {
        Scheme { channel_dims: NonZeroU32::MIN, ..self }
    }

    /// The scheme with output channels over `channel_dims` dimensions.
    ///
    /// # Errors
    /// [`SchemeError`] for zero, and for a scheme that names them already.
    pub fn with_channel_dims(self, channel_dims: u32) -> Result<Scheme, SchemeError> {
        let channel_dims = NonZeroU32::new(channel_dims).ok_or(SchemeError::Zero { option: "channel_dims" })?;
        if self.channel_dims != NonZeroU32::MIN {
            return Err(SchemeError::Twice { scheme: self.to_string(), option: "channel_dims" });
        }
        Ok(Scheme { channel_dims, ..self })
    }

    /// The scheme with another rule for its powers of two.
    ///
    /// # Errors
    /// `None` if its scales are none.
    fn with_mx(self, rule: MxRule) -> Option<Scheme> {
        let Scaling::E8m0(_) = self.format.scaling else { return None };
        Some(Scheme { format: Format { scaling: Scaling::E8m0(rule), ..self.format }, ..self })
    }

    /// The scheme with scales that are quantized themselves; none if they are no magnitudes of blocks.
    fn with_double_quant(self) -> Option<Scheme> {
        let is_of_blocks = matches!(self.format.codes, Codes::Codebook(_));
        is_of_blocks.then_some(Scheme { format: Format { scaling: Scaling::Nested, ..self.format }, ..self })
    }

    /// How its scales are chosen.
    pub fn solver(&self) -> Solver {
        self.solver
    }

    /// The scheme with another solver; none if its codes are no integers.
    fn with_solver(self, solver: Solver) -> Option<Scheme> {
        matches!(self.format.codes, Codes::Int { .. }).then_some(Scheme { solver, ..self })
    }

    /// The format of files that hold these bytes: compressed-tensors' name of its own ones, or `gguf`.
    pub fn checkpoint_format(&self) -> &'static str {
        match (self.format.codes, self.format.scaling) {
            (Codes::Block(_), _) => "gguf",
            (Codes::Codebook(_) | Codes::Rowwise, _) => "bitsandbytes",
            (Codes::Int { packing: Packing::Dense, .. }, _) => "pack-quantized",
            (Codes::Int { packing: Packing::Plain, .. }, _) => "int-quantized",
            (Codes::Fp8E4m3, Scaling::E8m0(_)) => "mxfp8-quantized",
            (Codes::Fp8E4m3, _) => "float-quantized",
            (Codes::Fp6E2m3, _) => "mxfp6-pack-quantized",
            (Codes::Fp4E2m1, Scaling::E8m0(_)) => "mxfp4-pack-quantized",
            (Codes::Fp4E2m1, _) => "nvfp4-pack-quantized",
        }
    }
}

impl FromStr for Scheme {
    type Err = SchemeError;

    fn from_str(text: &str) -> Result<Scheme, SchemeError> {
        let unknown = || SchemeError::Unknown { text: crate::shorten(text, 100) };
        let (base, options) = match text.split_once(';') {
            Some((base, options)) => (base, Some(options)),
            None => (text, None),
        };
        let (name, suffix) = match base.split_once('/') {
            Some((name, suffix)) => (name, Some(suffix)),
            None => (base, None),
        };
        let scheme = match PRESETS.iter().find(|preset| preset.name == name) {
            Some(preset) => preset_with(preset, suffix),
            None if name == "fp8" => suffix.and_then(fp8),
            None => integer(name, suffix),
        }
        .ok_or_else(unknown)?;
        match options {
            None => Ok(scheme),
            Some(options) => with_options(scheme, options).ok_or_else(unknown),
        }
    }
}

/// `key=value` in the order of the keys, each at most once.
fn with_options(mut scheme: Scheme, options: &str) -> Option<Scheme> {
    let mut last = "";
    for option in options.split(';') {
        let (key, value) = option.split_once('=')?;
        if key <= last {
            return None;
        }
        last = key;
        scheme = match key {
            "channel_dims" => scheme.with_channel_dims(number(value)?.get()).ok()?,
            "double_quant" if value == "false" => scheme.with_double_quant().map(|_| scheme)?,
            "double_quant" if value == "true" => scheme.with_double_quant()?,
            "solver" => scheme.with_solver(Solver::named(value)?)?,
            "mx" => scheme.with_mx(*MxRule::ALL.iter().find(|rule| rule.name() == value)?)?,
            _ => return None,
        };
    }
    Some(scheme)
}

fn preset_with(preset: &'static Preset, suffix: Option<&str>) -> Option<Scheme> {
    let granularity = match (suffix, preset.granularity) {
        (None, granularity) => granularity,
        (Some(suffix), Granularity::Group(_)) if preset.takes_group() => {
            let size = number(suffix.strip_prefix('g')?)?;
            if !preset.takes_group_of(size.get()) {
                return None;
            }
            Granularity::Group(size)
        }
        (Some(_), _) => return None,
    };
    Some(Scheme {
        preset: Some(preset),
        format: preset.format,
        granularity,
        channel_dims: NonZeroU32::MIN,
        solver: Solver::Absmax,
    })
}

fn fp8(suffix: &str) -> Option<Scheme> {
    let granularity = match suffix {
        "tensor" => Granularity::Tensor,
        "channel" => Granularity::Channel,
        _ => {
            let (rows, columns) = suffix.strip_prefix('b')?.split_once('x')?;
            Granularity::Block { rows: number(rows)?, columns: number(columns)? }
        }
    };
    Some(Scheme { preset: None, format: FP8, granularity, channel_dims: NonZeroU32::MIN, solver: Solver::Absmax })
}

fn integer(name: &str, suffix: Option<&str>) -> Option<Scheme> {
    let rest = name.strip_prefix("int")?;
    let (bits, symmetric) = match rest.strip_suffix("-asym") {
        Some(bits) => (bits, false),
        None => (rest, true),
    };
    let bits = u8::try_from(number(bits)?.get()).ok().filter(|bits| (2..=8).contains(bits))?;
    let granularity = match suffix {
        None | Some("channel") => Granularity::Channel,
        Some("tensor") => Granularity::Tensor,
        Some(group) => Granularity::Group(number(group.strip_prefix('g')?)?),
    };
    Some(Scheme {
        preset: None,
        format: int(bits, symmetric),
        granularity,
        channel_dims: NonZeroU32::MIN,
        solver: Solver::Absmax,
    })
}

/// Decimal digits without sign or leading zero.
fn number(text: &str) -> Option<NonZeroU32> {
    if text.starts_with('0') || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.preset, self.format.codes) {
            (Some(preset), _) => f.write_str(preset.name)?,
            (None, Codes::Int { bits, symmetric: true, .. }) => write!(f, "int{bits}")?,
            (None, Codes::Int { bits, symmetric: false, .. }) => write!(f, "int{bits}-asym")?,
            (None, Codes::Fp8E4m3) => f.write_str("fp8")?,
            (None, Codes::Fp6E2m3 | Codes::Fp4E2m1 | Codes::Codebook(_) | Codes::Rowwise | Codes::Block(_)) => {
                unreachable!("FP4, FP6, bitsandbytes' formats and blocks are presets")
            }
        }
        match (self.preset, self.granularity, self.format.codes) {
            (Some(preset), granularity, _) if preset.granularity == granularity => {}
            (None, Granularity::Channel, Codes::Int { .. }) => {}
            (_, Granularity::Tensor, _) => f.write_str("/tensor")?,
            (_, Granularity::Channel, _) => f.write_str("/channel")?,
            (_, Granularity::Group(size), _) => write!(f, "/g{size}")?,
            (_, Granularity::Block { rows, columns }, _) => write!(f, "/b{rows}x{columns}")?,
        }
        if self.channel_dims != NonZeroU32::MIN {
            write!(f, ";channel_dims={}", self.channel_dims)?;
        }
        if self.format.scaling == Scaling::Nested {
            f.write_str(";double_quant=true")?;
        }
        if let (Some(preset), Scaling::E8m0(rule)) = (self.preset, self.format.scaling)
            && preset.format != self.format
        {
            write!(f, ";mx={}", rule.name())?;
        }
        if self.solver != Solver::default() {
            write!(f, ";solver={}", self.solver.name())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_canonical_form_parses_back_to_itself() {
        let cases = [
            ("W4A16", "W4A16"),
            ("W4A16/g128", "W4A16"),
            ("W4A16/g32", "W4A16/g32"),
            ("INT8", "INT8"),
            ("int4", "int4"),
            ("int4/channel", "int4"),
            ("int4-asym/tensor", "int4-asym/tensor"),
            ("int2/g64", "int2/g64"),
            ("fp8/b128x128", "fp8/b128x128"),
            ("FP8_BLOCK;channel_dims=2", "FP8_BLOCK;channel_dims=2"),
            ("int8;channel_dims=1", "int8"),
            ("MXFP4A16;mx=even", "MXFP4A16"),
            ("MXFP8A16;mx=rceil", "MXFP8A16;mx=rceil"),
            ("MXFP6A16;channel_dims=2;mx=floor", "MXFP6A16;channel_dims=2;mx=floor"),
            ("NVFP4A16", "NVFP4A16"),
            ("W4A16;solver=mse", "W4A16;solver=mse"),
            ("nf4", "nf4"),
            ("nf4/g64", "nf4"),
            ("fp4/g4096", "fp4/g4096"),
            ("nf4;double_quant=true", "nf4;double_quant=true"),
            ("fp4/g64;channel_dims=2;double_quant=true", "fp4;channel_dims=2;double_quant=true"),
            ("nf4/g32;double_quant=false", "nf4/g32"),
            ("int8_rowwise", "int8_rowwise"),
            ("W4A16;solver=absmax", "W4A16"),
            ("int4-asym/g64;solver=hqq", "int4-asym/g64;solver=hqq"),
            ("int3-asym/g64;channel_dims=2;solver=mse", "int3-asym/g64;channel_dims=2;solver=mse"),
        ];
        for (text, canonical) in cases {
            let scheme: Scheme = text.parse().unwrap();
            assert_eq!(scheme.to_string(), canonical);
            assert_eq!(canonical.parse::<Scheme>().unwrap(), scheme);
        }
    }

    #[test]
    fn what_is_no_scheme_is_refused() {
        for text in [
            "",
            "W4A17",
            "int1",
            "int9",
            "int04",
            "int4/g0",
            "int4/g-1",
            "int4/g",
            "W8A8/g32",
            "FP8/g32",
            "fp8",
            "fp8/g32",
            "fp8/b0x1",
            "int4/b1x1",
            "int4;",
            "int4;channel_dims=0",
            "int4;mx=even",
            "int4;solver=HQQ",
            "FP8_BLOCK;solver=mse",
            "MXFP4A16;solver=mse",
            "NVFP4A16;mx=even",
            "MXFP4A16;mx=ceil",
            "MXFP4A16;mx=floor;channel_dims=2",
            "MXFP4A16;mx=floor;mx=floor",
            "MXFP4A16/g32",
            "NVFP4A16/g16",
            "nf4/g48",
            "nf4/g16",
            "fp4/g8192",
            "nf4/channel",
            "int8_rowwise/g32",
            "nf4;solver=mse",
            "int4/g99999999999",
            "w4a16",
            "int+4",
        ] {
            assert_eq!(text.parse::<Scheme>().unwrap_err().reason(), Reason::SchemeUnknown, "{text}");
        }
    }

    #[test]
    fn a_group_size_needs_a_scheme_that_takes_one() {
        let with =
            |text: &str, size| text.parse::<Scheme>().unwrap().with_group_size(size).map(|scheme| scheme.to_string());
        assert_eq!(with("int4", 64).unwrap(), "int4/g64");
        assert_eq!(with("W4A16", 64).unwrap(), "W4A16/g64");
        for text in ["W8A8", "FP8_BLOCK", "fp8/channel", "int4/tensor", "int4/g32", "W4A16/g64", "MXFP4A16"] {
            assert_eq!(with(text, 64).unwrap_err().reason(), Reason::OptionConflict, "{text}");
        }
        assert_eq!(with("int4", 0).unwrap_err().reason(), Reason::OptionInvalid);
    }
}
