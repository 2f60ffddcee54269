//! Names of the columns on the wire. Types and meanings: SPEC.md, sections "Input" and "Output".

/// The layer's name, on every row in and out.
pub const LAYER_NAME: &str = "layer_name";
/// Elements of one run, row-major.
pub const WEIGHTS: &str = "weights";
/// Element type of binary weights; on output the element type as it came.
pub const DTYPE: &str = "dtype";
/// Full shape of the layer.
pub const SHAPE: &str = "shape";
/// How much each column counts, as float32.
pub const IMPORTANCE: &str = "importance";
/// `quantized`, `kept` or `failed`.
pub const STATUS: &str = "status";
/// A [`Reason`](crate::Reason)'s word, null if quantized.
pub const REASON: &str = "reason";
/// The reason as a sentence, null if quantized.
pub const MESSAGE: &str = "message";
/// Packed codes.
pub const QUANTIZED_DATA: &str = "quantized_data";
/// Scales as float32.
pub const SCALES: &str = "scales";
/// Zero points as int32, in the signed domain of the codes.
pub const ZERO_POINTS: &str = "zero_points";
/// State that is neither codes nor scales nor zero points.
pub const EXTRA_TENSORS: &str = "extra_tensors";
/// The canonical scheme of the row.
pub const SCHEME: &str = "scheme";
/// Bits per code.
pub const BIT_WIDTH: &str = "bit_width";
/// Measured quality of the row.
pub const METRICS: &str = "metrics";
/// Measured quality of the layer, on the row that completes it.
pub const LAYER_METRICS: &str = "layer_metrics";
/// crc32c of `quantized_data`.
pub const CHECKSUM: &str = "checksum";

/// Whether the codes of a scheme are blocks that hold their own scales, so that [`SCALES`] is null: the types of GGUF.
pub fn codes_hold_scales(scheme: &str) -> bool {
    const TYPES: [&str; 13] =
        ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "NVFP4"];
    scheme.split(';').next().is_some_and(|name| TYPES.contains(&name))
}

/// Names of tensors in the column `extra_tensors`.
pub mod tensor {
    /// The weights of a kept row.
    pub const WEIGHT: &str = "weight";
    /// What the scales of a layer are divided by: one f32, on the layer's first row.
    pub const WEIGHT_GLOBAL_SCALE: &str = "weight_global_scale";
    /// With double quantization: the scales as bytes, of the whole layer, on its first row.
    pub const ABSMAX: &str = "absmax";
    /// The greatest distances of blocks of them from their mean: f32.
    pub const NESTED_ABSMAX: &str = "nested_absmax";
    /// Their mean: one f32.
    pub const NESTED_OFFSET: &str = "nested_offset";
}

/// The values of the column `status`.
pub mod status {
    /// The row carries codes.
    pub const QUANTIZED: &str = "quantized";
    /// A recipe or rule says to leave the layer as it is.
    pub const KEPT: &str = "kept";
    /// The row could not be quantized, and the command said to go on.
    pub const FAILED: &str = "failed";
}
