//! One layer: its shape, what is to become of it, and how its elements lie in channels, groups and spans.

use std::fmt;

use quarrel_kernels::{Arith, Codes, Dtype, Format, Scaler, Scaling, global_scale, packed_bytes};
use quarrel_proto::Reason;

use crate::{
    arrow_in::ColumnError,
    nested::Nested,
    plan::Thresholds,
    scheme::{Granularity, Scheme},
    shape::Shape,
};

/// Limits that a layer can meet. The numbers are the server's configuration.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest message, and so the largest output channel.
    pub message_bytes_max: usize,
    /// What one span may hold in memory.
    pub span_bytes_max: usize,
    /// Rows in one batch.
    pub batch_rows_max: usize,
    /// Layers in one stream.
    pub layers_max: usize,
    /// Bytes in a layer's name.
    pub name_bytes_max: usize,
}

impl Limits {
    /// For layers of one's own: nobody need be protected from them. Sums of them do not overflow.
    pub const NONE: Limits = Limits {
        message_bytes_max: 1 << 48,
        span_bytes_max: 1 << 48,
        batch_rows_max: 1 << 48,
        layers_max: 1 << 48,
        name_bytes_max: 1 << 48,
    };
}

/// Why a layer is kept or has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// The contract's word.
    pub reason: Reason,
    /// A sentence that names the layer, the value and what was expected.
    pub message: String,
}

/// A fault that ends the stream, and its reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.message)]
pub struct LayerError(pub Note);

impl From<ColumnError> for LayerError {
    fn from(error: ColumnError) -> Self {
        LayerError(Note { reason: error.reason, message: error.to_string() })
    }
}

/// What is to become of a layer.
#[derive(Debug, Clone)]
pub enum Decision {
    /// It stays as it is.
    Keep(Note),
    /// Its command cannot be carried out.
    Fail(Note),
    /// It gets this scheme.
    Quantize(Rung),
    /// It gets the first of these that reaches the thresholds, or stays as it is.
    Ladder(Vec<Rung>, Thresholds),
}

/// One scheme on one layer: everything that computing needs to know.
#[derive(Debug, Clone)]
pub struct Rung {
    /// The scheme.
    pub scheme: Scheme,
    /// In which type intermediates are rounded.
    pub arith: Arith,
    /// The element type of the weights.
    pub dtype: Dtype,
    /// Output channels.
    pub channels: usize,
    /// Elements of one output channel.
    pub columns: usize,
    /// Columns that share a scale.
    pub group: usize,
    /// Channels that share a scale, counted from the start of a matrix.
    pub height: usize,
    /// Channels of one matrix: blocks begin anew with each (fused experts are several matrices).
    pub matrix: usize,
    /// What the scales are under.
    pub global: Global,
}

/// The number that all scales of a layer are divided by, and that is made of a greatest magnitude.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Global {
    /// There is none.
    None,
    /// Of the layer's own, so that the whole layer is needed first.
    Found,
    /// Of this, which the command gives: the greatest over all layers that share it.
    Given(f32),
}

impl Rung {
    /// The scheme laid over a layer of rank 2 or more, or a single channel.
    ///
    /// # Errors
    /// A [`Note`] if the group does not divide the columns, or the scheme is not defined for the rank.
    pub fn new(
        scheme: Scheme,
        arith: Arith,
        amax: Option<f32>,
        dtype: Dtype,
        name: &str,
        shape: &Shape,
    ) -> Result<Rung, Note> {
        let dims = scheme.channel_dims().get() as usize;
        let (channels, columns, matrix) = match shape.rank() {
            0 | 1 => (1, shape.elements(), 1),
            rank if dims >= rank => {
                return Err(note(
                    Reason::RankUnsupported,
                    name,
                    format_args!(
                        "`channel_dims` {dims} leaves no columns in shape {shape}: expected at most {}",
                        rank - 1
                    ),
                ));
            }
            _ => {
                let channels: i64 = shape.dims()[..dims].iter().product();
                let columns: i64 = shape.dims()[dims..].iter().product();
                (channels as usize, columns as usize, shape.dims()[dims - 1] as usize)
            }
        };
        let (group, height) = match scheme.granularity() {
            Granularity::Tensor => (columns, channels),
            Granularity::Channel => (columns, 1),
            Granularity::Group(size) => {
                let size = size.get() as usize;
                if !columns.is_multiple_of(size) {
                    let what = match scheme.codes() {
                        Codes::Block(block) => {
                            let smaller =
                                [(32, "Q8_0, Q4_0 and IQ4_NL have 32"), (1, "no type of GGUF has a size that does")];
                            let smaller = smaller.iter().find(|(size, _)| columns.is_multiple_of(*size));
                            let smaller = smaller.map_or("", |(_, said)| said);
                            let block = block.name();
                            format!(
                                "blocks of {size} (`{block}`) do not divide {columns} columns of shape {shape}: {smaller}"
                            )
                        }
                        _ => format!("group size {size} does not divide {columns} columns of shape {shape}"),
                    };
                    return Err(note(Reason::GroupSizeIndivisible, name, format_args!("{what}")));
                }
                (size, 1)
            }
            Granularity::Block { rows, columns: width } => {
                if shape.rank() > dims + 1 {
                    let what = format_args!(
                        "scheme `{scheme}` needs {} dimensions, got shape {shape}: send it as [channels, columns]",
                        dims + 1
                    );
                    return Err(note(Reason::RankUnsupported, name, what));
                }
                (width.get() as usize, rows.get() as usize)
            }
        };
        let matrix = match scheme.granularity() {
            Granularity::Block { .. } => matrix,
            _ => channels,
        };
        let (group, height) = (group.clamp(1, columns.max(1)), height.clamp(1, matrix.max(1)));
        let global = match (scheme.format().scaling, amax) {
            (Scaling::Weights | Scaling::E8m0(_) | Scaling::Absmax | Scaling::Nested | Scaling::InBlocks, _) => {
                Global::None
            }
            (Scaling::E4m3, None) => Global::Found,
            (Scaling::E4m3, Some(amax)) => Global::Given(amax),
        };
        Ok(Rung { scheme, arith, dtype, channels, columns, group, height, matrix, global })
    }

    /// What the codes and the scales are.
    pub fn format(&self) -> Format {
        self.scheme.format()
    }

    /// How ranges become scales, under that global scale.
    pub fn scaler(&self, global: f32) -> Scaler {
        Scaler { format: self.format(), arith: self.arith, dtype: self.dtype, global }
    }

    /// What the scales are divided by, if the greatest magnitude is `amax`.
    pub fn global_of(&self, amax: f32) -> f32 {
        global_scale(self.arith, self.dtype, self.codes(), amax)
    }

    /// What the codes are.
    pub fn codes(&self) -> Codes {
        self.scheme.codes()
    }

    /// Scales of one channel that stand beside its codes: none where they stand in blocks.
    pub fn groups(&self) -> usize {
        match self.format().scaling {
            Scaling::InBlocks => 0,
            Scaling::Weights | Scaling::E8m0(_) | Scaling::E4m3 | Scaling::Absmax | Scaling::Nested => {
                self.columns.div_ceil(self.group)
            }
        }
    }

    /// The type that a scale may be too large for.
    pub fn scale_type(&self) -> Dtype {
        match self.format().scaling {
            Scaling::InBlocks => Dtype::F16,
            Scaling::Absmax | Scaling::Nested => Dtype::F32,
            Scaling::Weights | Scaling::E8m0(_) | Scaling::E4m3 => self.dtype.scale_type(),
        }
    }

    /// Whether scales stand beside the codes.
    pub fn scaled(&self) -> bool {
        self.format().scaling != Scaling::InBlocks
    }

    /// The span that holds a channel.
    pub fn span_of(&self, channel: usize) -> usize {
        let spans = self.matrix.div_ceil(self.height);
        channel / self.matrix * spans + channel % self.matrix / self.height
    }

    /// The end of the span that holds `channel`.
    pub fn span_end(&self, channel: usize) -> usize {
        let within = channel % self.matrix;
        let first = channel - within;
        first + (within - within % self.height + self.height).min(self.matrix)
    }

    /// The end of the last channels that can be computed when the first `channels` have come.
    pub fn complete(&self, channels: usize) -> usize {
        match self.is_together() {
            _ if channels >= self.channels => self.channels,
            true => 0,
            false => self.span_start(channels),
        }
    }

    /// The end of those that are computed together with `channel`.
    pub fn together_end(&self, channel: usize) -> usize {
        if self.is_together() { self.channels } else { self.span_end(channel) }
    }

    /// The start of the span that holds `channel`.
    pub fn span_start(&self, channel: usize) -> usize {
        channel - channel % self.matrix % self.height
    }

    /// Spans that begin in a range of channels: as many sets of scales stand in a row that holds it.
    pub fn spans_in(&self, channels: &std::ops::Range<usize>) -> usize {
        if self.height == 1 {
            return channels.len();
        }
        let begun = |channel: usize| if channel == 0 { 0 } else { self.span_of(channel - 1) + 1 };
        begun(channels.end) - begun(channels.start)
    }

    /// Bytes of one channel's weights.
    pub fn channel_bytes(&self) -> usize {
        self.columns * self.dtype.bytes()
    }

    /// Bytes of one channel's codes.
    pub fn packed_bytes(&self) -> usize {
        packed_bytes(self.codes(), self.columns)
    }

    /// Bits of the scales (as stored) and zero points of one span.
    pub fn scale_bits(&self) -> usize {
        let zero_point = if self.codes().symmetric() { 0 } else { usize::from(self.codes().bits()) };
        let scale = match self.format().scaling {
            Scaling::Weights => self.dtype.scale_type().bytes() * 8,
            Scaling::E8m0(_) | Scaling::E4m3 | Scaling::Nested => 8,
            Scaling::Absmax => 32,
            Scaling::InBlocks => 0,
        };
        self.groups() * (scale + zero_point)
    }

    /// Bits that a run of channels is stored in: scales, zero points, and with the first channel what stands there for all.
    pub fn beside_bits(&self, channels: &std::ops::Range<usize>) -> usize {
        let of_all = match (self.holds_global(channels), self.holds_nested(channels)) {
            (true, _) => 32,
            (_, true) => Nested::bits_beside(self.channels * self.groups()),
            _ => 0,
        };
        self.spans_in(channels) * self.scale_bits() + of_all
    }

    /// Whether the global scale stands with those channels: the first.
    pub fn holds_global(&self, channels: &std::ops::Range<usize>) -> bool {
        self.global != Global::None && channels.contains(&0)
    }

    /// Whether the layer's scales, quantized themselves, stand with those channels: the first.
    pub fn holds_nested(&self, channels: &std::ops::Range<usize>) -> bool {
        self.is_nested() && channels.contains(&0)
    }

    /// Whether its scales are quantized too.
    pub fn is_nested(&self) -> bool {
        self.format().scaling == Scaling::Nested
    }

    /// Bytes that the answer for `channels` channels holds in memory: codes, scales, zero points and sums.
    pub fn answer_bytes(&self, channels: usize) -> usize {
        let spans = channels.div_ceil(self.height) + 1;
        // Magnitudes beside scales; a byte for each, with its share of those of blocks, and twice more in the answer.
        let scale_bytes = if self.is_nested() { 8 + 4 } else { 8 };
        channels * (self.packed_bytes() + SUMS_BYTES) + spans * self.groups() * scale_bytes
    }

    /// Whether channels wait for others.
    pub fn buffers(&self) -> bool {
        self.shares() || self.is_together()
    }

    /// Whether no channel can be computed before all have come.
    pub fn is_together(&self) -> bool {
        self.global == Global::Found || self.is_nested()
    }

    /// Whether channels share scales.
    pub fn shares(&self) -> bool {
        self.height > 1
    }
}

/// What the metrics of one channel hold in memory until they are folded.
const SUMS_BYTES: usize = size_of::<quarrel_kernels::Sums>();

impl Decision {
    /// Bytes that the answer for `channels` channels holds in memory, at most.
    pub fn answer_bytes(&self, channels: usize) -> usize {
        match self {
            Decision::Keep(_) | Decision::Fail(_) => 0,
            Decision::Quantize(rung) => rung.answer_bytes(channels),
            // Two rungs' results are alive while one replaces the other.
            Decision::Ladder(rungs, _) => 2 * rungs.iter().map(|rung| rung.answer_bytes(channels)).max().unwrap_or(0),
        }
    }
}

/// A sentence about a layer.
pub(crate) fn note(reason: Reason, layer: &str, what: fmt::Arguments<'_>) -> Note {
    Note { reason, message: crate::shorten(&format!("layer `{}`: {what}", crate::shorten(layer, 200)), 1_000) }
}
