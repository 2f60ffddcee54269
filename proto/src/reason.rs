//! The reasons: constant words that say what went wrong or why a layer was kept.
//!
//! A reason stands in the `reason` column of a row, or in brackets at the start of a gRPC status message
//! (`[non_finite] layer ...`). Programs match on it; people read the sentence beside it. SPEC.md lists them all, and a
//! test holds that list and this one equal. Which gRPC code belongs to a reason is decided in `server/flight/status`.

use std::fmt;

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal,)+) => {
        /// Why a request, a layer or a stream was not quantized. The word is part of the contract.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Reason {
            /// Every reason, in the order of SPEC.md.
            pub const ALL: &[Reason] = &[$(Reason::$name,)+];

            /// The word on the wire.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Reason::$name => $word,)+
                }
            }

            /// What it means, in one sentence: the text of SPEC.md.
            pub const fn meaning(self) -> &'static str {
                match self {
                    $(Reason::$name => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }
    };
}

reasons! {
    /// No command: the first message has no descriptor, or its descriptor carries no `cmd` bytes.
    CommandMissing = "command_missing",
    /// The command is neither a `quarrel.v1.Command` in protobuf nor its proto3 JSON, or names no verb.
    CommandMalformed = "command_malformed",
    /// The command holds a field that this version does not know.
    FieldUnknown = "field_unknown",
    /// Options that contradict each other, or an option that would have no effect.
    OptionConflict = "option_conflict",
    /// An option's value is not one of those that SPEC.md lists.
    OptionInvalid = "option_invalid",
    /// No such scheme.
    SchemeUnknown = "scheme_unknown",
    /// No such profile.
    ProfileUnknown = "profile_unknown",
    /// A recipe's target, set or pattern cannot be used.
    RecipeInvalid = "recipe_invalid",
    /// The verb is not served here; the message names the one to use.
    VerbUnsupported = "verb_unsupported",

    /// The stream ended, or sent a batch, before its schema.
    SchemaMissing = "schema_missing",
    /// A required column is missing.
    ColumnMissing = "column_missing",
    /// A column that the contract does not know.
    ColumnUnexpected = "column_unexpected",
    /// A column has a type that the contract does not allow.
    ColumnType = "column_type",
    /// A tensor type with a permutation other than identity.
    Permuted = "permuted",
    /// A message is not valid Arrow IPC.
    FrameInvalid = "frame_invalid",
    /// A message is larger than `message_bytes_max`.
    MessageTooLarge = "message_too_large",
    /// A batch has more rows than `batch_rows_max`.
    BatchRowsExceeded = "batch_rows_exceeded",
    /// A stream names more layers than `layers_max`.
    LayersExceeded = "layers_exceeded",
    /// A layer's name is longer than `name_bytes_max`.
    NameTooLong = "name_too_long",

    /// A row has no layer name.
    NameNull = "name_null",
    /// A row has no weights.
    WeightsNull = "weights_null",
    /// An element of the weights is null.
    ElementNull = "element_null",
    /// The element type is unknown, or missing beside binary weights.
    DtypeInvalid = "dtype_invalid",
    /// The runs of one layer differ in element type.
    DtypeChanged = "dtype_changed",
    /// The shape is negative, holds a null, has over 32 dimensions, or multiplies out beyond 2^48 elements.
    ShapeInvalid = "shape_invalid",
    /// The runs of one layer differ in shape.
    ShapeChanged = "shape_changed",
    /// The row's length is no whole number of elements.
    BytesRagged = "bytes_ragged",
    /// A run ends inside an output channel.
    ChannelCut = "channel_cut",
    /// A layer's rows hold more elements than its shape.
    LayerTooLong = "layer_too_long",
    /// Another layer began before this one was complete.
    LayerInterrupted = "layer_interrupted",
    /// A layer came again after its end.
    LayerRepeated = "layer_repeated",
    /// The stream ended before the layer was complete.
    LayerIncomplete = "layer_incomplete",
    /// One output channel is larger than `message_bytes_max`.
    ChannelTooLarge = "channel_too_large",

    /// A weight is NaN or infinite.
    NonFinite = "non_finite",
    /// A scale is too large for the type in which it is stored.
    ScaleOverflow = "scale_overflow",
    /// The group size does not divide the columns.
    GroupSizeIndivisible = "group_size_indivisible",
    /// The scheme is not defined for a layer of this rank.
    RankUnsupported = "rank_unsupported",

    /// Kept: the recipe's `ignore` names the layer.
    Ignored = "ignored",
    /// Kept: no rule of the recipe matches the layer.
    Unmatched = "unmatched",
    /// Kept: a layer of rank 1 is quantized only where a rule names it.
    Rank1 = "rank_1",
    /// Kept: the layer has no elements.
    Empty = "empty",
    /// Kept: no rung of the ladder reached its thresholds.
    BelowThreshold = "below_threshold",

    /// A kept row came to `dequantize` without its weights.
    KeptWithoutData = "kept_without_data",
    /// A row given to `dequantize` does not hold what its scheme and shape need.
    RowInconsistent = "row_inconsistent",
    /// The checksum of a row given to `dequantize` does not fit its data.
    ChecksumMismatch = "checksum_mismatch",

    /// What must be in memory at once, a span or a row with its results, is over `layer_bytes_max` or half of the budget.
    SpanTooLarge = "span_too_large",
    /// No room in the budget for `stall_seconds`; try again later.
    Busy = "busy",
    /// More streams at once than `streams_max`; try again later.
    StreamsExceeded = "streams_exceeded",
    /// Nothing came for `idle_seconds`.
    Idle = "idle",
    /// The client writes without reading, and its unsent results fill their share of the budget.
    ClientNotReading = "client_not_reading",
    /// The server is stopping.
    Stopping = "stopping",
    /// A fault of the server.
    Internal = "internal",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
