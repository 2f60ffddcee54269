//! Schemes that have a name of their own in the ecosystem.

use std::num::NonZeroU32;

use quarrel_kernels::{Block, Codebook, Codes, Format, MxRule, Packing, Scaling};

use crate::scheme::Granularity;

/// A scheme that has a name of its own in the ecosystem.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Preset {
    /// The ecosystem's name.
    pub name: &'static str,
    pub(crate) format: Format,
    pub(crate) granularity: Granularity,
    /// Its activations are static and need calibration, which this service does not do.
    pub needs_calibration: bool,
}

const fn nonzero(n: u32) -> NonZeroU32 {
    match NonZeroU32::new(n) {
        Some(n) => n,
        None => panic!("a constant of this file is zero"),
    }
}

pub(crate) const fn int(bits: u8, symmetric: bool) -> Format {
    let packing = if bits == 8 { Packing::Plain } else { Packing::Dense };
    Format { codes: Codes::Int { bits, symmetric, packing }, scaling: Scaling::Weights }
}

pub(crate) const FP8: Format = Format { codes: Codes::Fp8E4m3, scaling: Scaling::Weights };
/// compressed-tensors' own rule is the default of every MX preset.
const MX: Scaling = Scaling::E8m0(MxRule::Even);

const G128: Granularity = Granularity::Group(nonzero(128));
const G32: Granularity = Granularity::Group(nonzero(32));
const G16: Granularity = Granularity::Group(nonzero(16));
const B128: Granularity = Granularity::Block { rows: nonzero(128), columns: nonzero(128) };

/// Presets of compressed-tensors 0.20, `quantization/quant_scheme.py`: their weights. Then bitsandbytes' formats and ggml's types.
pub static PRESETS: [Preset; 28] = [
    preset("W4A16", int(4, true), G128),
    preset("W4A16_ASYM", int(4, false), G128),
    preset(
        "W8A16",
        Format { codes: Codes::Int { bits: 8, symmetric: true, packing: Packing::Dense }, scaling: Scaling::Weights },
        G128,
    ),
    preset("W8A8", int(8, true), Granularity::Channel),
    preset("INT8", int(8, true), Granularity::Channel),
    Preset { needs_calibration: true, ..preset("FP8", FP8, Granularity::Tensor) },
    preset("FP8_DYNAMIC", FP8, Granularity::Channel),
    preset("FP8_BLOCK", FP8, B128),
    preset("NVFP4A16", Format { codes: Codes::Fp4E2m1, scaling: Scaling::E4m3 }, G16),
    preset("MXFP4A16", Format { codes: Codes::Fp4E2m1, scaling: MX }, G32),
    preset("MXFP6A16", Format { codes: Codes::Fp6E2m3, scaling: MX }, G32),
    preset("MXFP8A16", Format { codes: Codes::Fp8E4m3, scaling: MX }, G32),
    codebook(Codebook::Nf4),
    codebook(Codebook::Fp4),
    preset("int8_rowwise", Format { codes: Codes::Rowwise, scaling: Scaling::Absmax }, Granularity::Channel),
    ggml(Block::Q8_0),
    ggml(Block::Q4_0),
    ggml(Block::Q4_1),
    ggml(Block::Q5_0),
    ggml(Block::Q5_1),
    ggml(Block::Q2K),
    ggml(Block::Q3K),
    ggml(Block::Q4K),
    ggml(Block::Q5K),
    ggml(Block::Q6K),
    ggml(Block::Iq4Nl),
    ggml(Block::Mxfp4),
    ggml(Block::Nvfp4),
];

/// A block is a group: it must divide the columns.
const fn ggml(block: Block) -> Preset {
    let format = Format { codes: Codes::Block(block), scaling: Scaling::InBlocks };
    preset(block.name(), format, Granularity::Group(nonzero(block.elements() as u32)))
}

const fn codebook(book: Codebook) -> Preset {
    let format = Format { codes: Codes::Codebook(book), scaling: Scaling::Absmax };
    preset(book.name(), format, Granularity::Group(nonzero(64)))
}

const fn preset(name: &'static str, format: Format, granularity: Granularity) -> Preset {
    Preset { name, format, granularity, needs_calibration: false }
}

impl Preset {
    /// Whether its groups may have another size: those of MX and NVFP4 are part of the format.
    pub(crate) fn takes_group(&self) -> bool {
        matches!((self.granularity, self.format.scaling), (Granularity::Group(_), Scaling::Weights | Scaling::Absmax))
    }

    /// Whether its groups may be of so many columns: bitsandbytes has blocks of powers of two from 32 to 4096.
    pub(crate) fn takes_group_of(&self, size: u32) -> bool {
        match self.format.codes {
            Codes::Codebook(_) => size.is_power_of_two() && (32..=4096).contains(&size),
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use quarrel_proto::column::codes_hold_scales;

    use super::*;

    #[test]
    fn the_contract_says_whose_codes_hold_scales() {
        for preset in &PRESETS {
            let expected = preset.format.scaling == Scaling::InBlocks;
            for scheme in [preset.name.to_owned(), format!("{};channel_dims=2", preset.name)] {
                assert_eq!(codes_hold_scales(&scheme), expected, "{scheme}");
            }
        }
        assert!(!codes_hold_scales("int4/g32") && !codes_hold_scales(""));
    }
}
