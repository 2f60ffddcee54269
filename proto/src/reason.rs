//! The reasons: constant words that say what went wrong or why a layer was kept.
//!
//! A reason stands in the `reason` column of a row, or in brackets at the start of a gRPC status message
//! (`[non_finite] layer ...`). Programs match on it; people read the sentence beside it. SPEC.md lists them all, and a
//! test holds that list and this one equal. Which gRPC code belongs to a reason is decided in `server/flight/status`.

use std::fmt;

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal, $advice:literal;)+) => {
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

            /// What to do about it, in one sentence to the caller: the text of SPEC.md.
            pub const fn advice(self) -> &'static str {
                match self {
                    $(Reason::$name => $advice,)+
                }
            }

            /// The reason of a word, if the contract has it.
            pub fn from_word(word: &str) -> Option<Reason> {
                Reason::ALL.iter().copied().find(|reason| reason.word() == word)
            }
        }
    };
}

reasons! {
    /// No command: the first message has no descriptor, or its descriptor carries no `cmd` bytes.
    CommandMissing = "command_missing",
        "Put a command into the descriptor: `{\"quantize\": {\"scheme\": \"W4A16\"}}`.";
    /// The command is neither a `quarrel.v1.Command` in protobuf nor its proto3 JSON, or names no verb.
    CommandMalformed = "command_malformed",
        "Compare the command with `quarrel/v1/command.proto`; name one verb.";
    /// The command holds a field that this version does not know.
    FieldUnknown = "field_unknown",
        "Correct the field's name, or leave it out; an older server may not know it.";
    /// Options that contradict each other, or an option that would have no effect.
    OptionConflict = "option_conflict",
        "Leave out one of the options that the message names.";
    /// An option's value is not one of those that SPEC.md lists.
    OptionInvalid = "option_invalid",
        "Use one of the values that the message names.";
    /// No such scheme.
    SchemeUnknown = "scheme_unknown",
        "Ask `schemes.list` for the names that this server knows.";
    /// No such profile.
    ProfileUnknown = "profile_unknown",
        "Use `edge`, `local` or `cloud`.";
    /// A recipe's target, set or pattern cannot be used.
    RecipeInvalid = "recipe_invalid",
        "Correct the target that the message names: an exact name, a glob, `Linear`, or `re:` and a regex.";
    /// The verb is not served here; the message names the one to use.
    VerbUnsupported = "verb_unsupported",
        "Use the verb that the message names.";

    /// The stream ended, or sent a batch, before its schema.
    SchemaMissing = "schema_missing",
        "Begin the stream with its schema, then batches.";
    /// A required column is missing.
    ColumnMissing = "column_missing",
        "Add the column.";
    /// A column that the contract does not know.
    ColumnUnexpected = "column_unexpected",
        "Leave the column out, or correct its name.";
    /// A column has a type that the contract does not allow.
    ColumnType = "column_type",
        "Cast the column to a type that the message names.";
    /// A tensor type with a permutation other than identity.
    Permuted = "permuted",
        "Send the tensor row-major, without a permutation.";
    /// A message is not valid Arrow IPC.
    FrameInvalid = "frame_invalid",
        "Write with an Arrow library, without IPC compression.";
    /// A message is larger than `message_bytes_max`.
    MessageTooLarge = "message_too_large",
        "Send fewer rows in a batch, or a layer in runs of whole channels; or raise `message_bytes_max`.";
    /// A batch has more rows than `batch_rows_max`.
    BatchRowsExceeded = "batch_rows_exceeded",
        "Send fewer rows in a batch.";
    /// A stream names more layers than `layers_max`.
    LayersExceeded = "layers_exceeded",
        "Send the layers on several streams, or raise `layers_max`.";
    /// A layer's name is longer than `name_bytes_max`.
    NameTooLong = "name_too_long",
        "Shorten the name, or raise `name_bytes_max`.";

    /// A row has no layer name.
    NameNull = "name_null",
        "Give every row a name.";
    /// A row has no weights.
    WeightsNull = "weights_null",
        "Leave the row out, or give it weights.";
    /// An element of the weights is null.
    ElementNull = "element_null",
        "Replace the nulls by numbers.";
    /// The element type is unknown, or missing beside binary weights.
    DtypeInvalid = "dtype_invalid",
        "Convert the weights to f32, f16 or bf16; beside binary weights say which in `dtype`.";
    /// The runs of one layer differ in element type.
    DtypeChanged = "dtype_changed",
        "Send all runs of a layer with one element type.";
    /// The shape is negative, holds a null, has over 32 dimensions, or multiplies out beyond 2^48 elements.
    ShapeInvalid = "shape_invalid",
        "Send the layer's full shape.";
    /// The runs of one layer differ in shape.
    ShapeChanged = "shape_changed",
        "Send all runs of a layer with its full shape; give different layers different names.";
    /// `importance` holds a null or a number that is not from 0 to 1e15, has another length than the columns, changes within a layer, or comes to a scheme that does not go by it.
    ImportanceInvalid = "importance_invalid",
        "Send one float32 for each column of the layer, or null.";
    /// The row's length is no whole number of elements.
    BytesRagged = "bytes_ragged",
        "Check `dtype` and the length of the row.";
    /// A run ends inside an output channel.
    ChannelCut = "channel_cut",
        "Cut a layer between output channels only.";
    /// A layer's rows hold more elements than its shape.
    LayerTooLong = "layer_too_long",
        "Check the shape; give different layers different names.";
    /// Another layer began before this one was complete.
    LayerInterrupted = "layer_interrupted",
        "Send all runs of a layer one after the other.";
    /// A layer came again after its end.
    LayerRepeated = "layer_repeated",
        "Give every layer a name of its own.";
    /// The stream ended before the layer was complete.
    LayerIncomplete = "layer_incomplete",
        "Send all channels of the layer before the end of the stream; check its shape.";
    /// One output channel is larger than `message_bytes_max`.
    ChannelTooLarge = "channel_too_large",
        "Send the layer as `[n, columns]`, or raise `message_bytes_max`.";

    /// A weight is NaN or infinite.
    NonFinite = "non_finite",
        "Repair the layer or ignore it; with `on_error` `continue` the other layers are quantized.";
    /// A scale is too large for the type in which it is stored.
    ScaleOverflow = "scale_overflow",
        "Send the layer as f32 (GGUF types hold f16: use another scheme), or ignore it; with `on_error` `continue` the other layers are quantized.";
    /// A weight's magnitude is greater than the command's `amax`.
    AmaxExceeded = "amax_exceeded",
        "Give the greatest magnitude over all layers that share the global scale, or leave `amax` out.";
    /// The group size does not divide the columns.
    GroupSizeIndivisible = "group_size_indivisible",
        "Use another group size, a scheme of smaller groups or without, or keep such layers with `on_indivisible` `keep`.";
    /// The scheme is not defined for a layer of this rank.
    RankUnsupported = "rank_unsupported",
        "Use a scheme without blocks for this layer, or ignore it.";
    /// The scheme's activations need calibration, so a checkpoint cannot be made of weights alone.
    NeedsCalibration = "needs_calibration",
        "Use FP8_DYNAMIC or FP8_BLOCK, whose activations are scaled at run time.";

    /// Kept: the recipe's `ignore` names the layer.
    Ignored = "ignored",
        "Nothing, or take the name off `ignore`.";
    /// Kept: no rule of the recipe matches the layer.
    Unmatched = "unmatched",
        "Nothing, or add a rule whose target matches.";
    /// Kept: a layer of rank 1 is quantized only where a rule names it.
    Rank1 = "rank_1",
        "Nothing, or name the layer in a rule.";
    /// Kept: the layer has no elements.
    Empty = "empty",
        "Nothing.";
    /// Kept: no rung of the ladder reached its thresholds.
    BelowThreshold = "below_threshold",
        "Nothing, or add a finer scheme to the ladder, or lower its threshold.";
    /// Kept: the tensor holds no floating-point numbers.
    NotFloat = "not_float",
        "Nothing.";
    /// Kept: in a checkpoint, only tensors named `*.weight` are quantized.
    NotAWeight = "not_a_weight",
        "Nothing, or rename the tensor so that it ends in `.weight`.";
    /// Kept: the tensor belongs to a layer that is quantized already.
    AlreadyQuantized = "already_quantized",
        "Nothing, or start from the checkpoint that it was made of.";

    /// A kept row came to `dequantize` without its weights.
    KeptWithoutData = "kept_without_data",
        "Quantize with `return_kept`, or leave kept rows out.";
    /// A row given to `dequantize` does not hold what its scheme and shape need.
    RowInconsistent = "row_inconsistent",
        "Send all rows of the layer as `quantize` answered them, in order.";
    /// The checksum of a row given to `dequantize` does not fit its data.
    ChecksumMismatch = "checksum_mismatch",
        "The codes were damaged on the way: take them again from where they are whole.";

    /// What must be in memory at once, a span or a row with its results, is over `layer_bytes_max` or half of the budget.
    SpanTooLarge = "span_too_large",
        "Use a scheme with a scale for each channel or group and without double quantization, send smaller runs, or raise `layer_bytes_max` and `memory_bytes_max`.";
    /// No room in the budget for `stall_seconds`; try again later.
    Busy = "busy",
        "Try again later, or raise `memory_bytes_max`.";
    /// More streams at once than `streams_max`, or on one connection than `connection_streams_max`; try again later.
    StreamsExceeded = "streams_exceeded",
        "Try again later, on another connection, or raise the limit.";
    /// No command came within `header_seconds`.
    HeaderTimeout = "header_timeout",
        "Send the command as soon as the stream is open.";
    /// The stream took longer than `stream_seconds`.
    StreamTimeout = "stream_timeout",
        "Send fewer layers in a stream, or raise `stream_seconds`.";
    /// Nothing came for `idle_seconds`.
    Idle = "idle",
        "Go on sending within `idle_seconds`, or raise it.";
    /// The client writes without reading, and its unsent results fill their share of the budget.
    ClientNotReading = "client_not_reading",
        "Read answers while writing; the clients of Quarrel do.";
    /// A URI that is none, or of a kind that is not read or not written.
    UriInvalid = "uri_invalid",
        "Use a URI of `file`, `s3`, `gs` or `az`, or of `https` to read.";
    /// A URI outside of what the server's operator allows to read or to write.
    UriNotAllowed = "uri_not_allowed",
        "Use a URI under a prefix of `server.info`, or have the operator allow it with `--allow-read` or `--allow-write`.";
    /// There is nothing at the source's URI.
    SourceMissing = "source_missing",
        "Check the URI.";
    /// What is at the source's URI is no checkpoint, or a damaged one.
    SourceMalformed = "source_malformed",
        "Check that it was copied whole, with its index.";
    /// Something is at the sink's URI.
    SinkExists = "sink_exists",
        "Choose another URI, or replace what is there with `replace`.";
    /// The sink was begun by another job, is being written by one, or is the source or within it.
    SinkTaken = "sink_taken",
        "Submit the job that began it, wait for the one that writes it, choose another URI, or start over with `replace`.";
    /// The layers of a DoPut ended without the end that seals them: its client may have been cut off.
    EndMissing = "end_missing",
        "End with the `app_metadata` `{\"end\": {\"layers\": N}}`, on the last batch or alone; send all layers again.";
    /// The end of a DoPut is none, or names another number of layers than came.
    EndInvalid = "end_invalid",
        "Count the layers; compare the end with SPEC.md, section \"DoPut\".";
    /// Layers that inference engines fuse have different global scales (NVFP4).
    FusedScalesDiffer = "fused_scales_differ",
        "Give the layers of each set (q, k and v; gate and up) a rule with their greatest magnitude as `amax`.";
    /// A store or a disk does not read or write now.
    StorageFailed = "storage_failed",
        "Try again later; the same job goes on where it was.";
    /// A store or a disk refuses to be read or written: no credentials, or none that it accepts.
    StorageDenied = "storage_denied",
        "Give the server's environment credentials that may read the source and write the sink.";
    /// A layer is worse than the job's `sqnr_db_min` or `cosine_min`.
    QualityMissed = "quality_missed",
        "Choose a scheme of more bits or smaller groups, or ignore the layer.";
    /// No job has that name; a server forgets jobs when it is started anew, and old ones when there are many.
    JobUnknown = "job_unknown",
        "Ask `job.list`; a job that was forgotten goes on when it is submitted again.";
    /// More jobs at once than `jobs_max`.
    JobsExceeded = "jobs_exceeded",
        "Try again later, or raise the limit.";
    /// The server is stopping.
    Stopping = "stopping",
        "Try again: another server, or this one after its restart.";
    /// A fault of the server.
    Internal = "internal",
        "Report it, with the server's log.";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
