"""Every reason of the contract: what it means, which error it raises, and what to do.

The table is that of `proto/SPEC.md`, section Reasons; a test holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from quarrel.errors import (
    BusyError,
    Error,
    IdleError,
    InvalidInputError,
    ServerError,
    UnavailableError,
    UnsupportedError,
)


@dataclass(frozen=True)
class Reason:
    """A reason: `error` is None for those that stand only in rows, as why a layer was kept."""

    meaning: str
    error: type[Error] | None
    advice: str


REASONS: dict[str, Reason] = {
    "command_missing": Reason(
        "No command: the first message has no descriptor, or its descriptor carries no `cmd` bytes.",
        InvalidInputError,
        'Put a command into the descriptor: `{"quantize": {"scheme": "W4A16"}}`.',
    ),
    "command_malformed": Reason(
        "The command is neither a `quarrel.v1.Command` in protobuf nor its proto3 JSON, or names no verb.",
        InvalidInputError,
        "Compare the command with `quarrel/v1/command.proto`; name one verb.",
    ),
    "field_unknown": Reason(
        "The command holds a field that this version does not know.",
        InvalidInputError,
        "Correct the field's name, or leave it out; an older server may not know it.",
    ),
    "option_conflict": Reason(
        "Options that contradict each other, or an option that would have no effect.",
        InvalidInputError,
        "Leave out one of the options that the message names.",
    ),
    "option_invalid": Reason(
        "An option's value is not one of those that SPEC.md lists.",
        InvalidInputError,
        "Use one of the values that the message names.",
    ),
    "scheme_unknown": Reason(
        "No such scheme.",
        InvalidInputError,
        "Ask `schemes.list` for the names that this server knows.",
    ),
    "profile_unknown": Reason(
        "No such profile.",
        InvalidInputError,
        "Use `edge`, `local` or `cloud`.",
    ),
    "recipe_invalid": Reason(
        "A recipe's target, set or pattern cannot be used.",
        InvalidInputError,
        "Correct the target that the message names: an exact name, a glob, `Linear`, or `re:` and a regex.",
    ),
    "verb_unsupported": Reason(
        "The verb is not served here; the message names the one to use.",
        UnsupportedError,
        "Use the verb that the message names.",
    ),
    "schema_missing": Reason(
        "The stream ended, or sent a batch, before its schema.",
        InvalidInputError,
        "Begin the stream with its schema, then batches.",
    ),
    "column_missing": Reason(
        "A required column is missing.",
        InvalidInputError,
        "Add the column.",
    ),
    "column_unexpected": Reason(
        "A column that the contract does not know.",
        InvalidInputError,
        "Leave the column out, or correct its name.",
    ),
    "column_type": Reason(
        "A column has a type that the contract does not allow.",
        InvalidInputError,
        "Cast the column to a type that the message names.",
    ),
    "permuted": Reason(
        "A tensor type with a permutation other than identity.",
        InvalidInputError,
        "Send the tensor row-major, without a permutation.",
    ),
    "frame_invalid": Reason(
        "A message is not valid Arrow IPC.",
        InvalidInputError,
        "Write with an Arrow library, without IPC compression.",
    ),
    "message_too_large": Reason(
        "A message is larger than `message_bytes_max`.",
        InvalidInputError,
        "Send fewer rows in a batch, or a layer in runs of whole channels; or raise `message_bytes_max`.",
    ),
    "batch_rows_exceeded": Reason(
        "A batch has more rows than `batch_rows_max`.",
        InvalidInputError,
        "Send fewer rows in a batch.",
    ),
    "layers_exceeded": Reason(
        "A stream names more layers than `layers_max`.",
        InvalidInputError,
        "Send the layers on several streams, or raise `layers_max`.",
    ),
    "name_too_long": Reason(
        "A layer's name is longer than `name_bytes_max`.",
        InvalidInputError,
        "Shorten the name, or raise `name_bytes_max`.",
    ),
    "name_null": Reason(
        "A row has no layer name.",
        InvalidInputError,
        "Give every row a name.",
    ),
    "weights_null": Reason(
        "A row has no weights.",
        InvalidInputError,
        "Leave the row out, or give it weights.",
    ),
    "element_null": Reason(
        "An element of the weights is null.",
        InvalidInputError,
        "Replace the nulls by numbers.",
    ),
    "dtype_invalid": Reason(
        "The element type is unknown, or missing beside binary weights.",
        InvalidInputError,
        "Convert the weights to f32, f16 or bf16; beside binary weights say which in `dtype`.",
    ),
    "dtype_changed": Reason(
        "The runs of one layer differ in element type.",
        InvalidInputError,
        "Send all runs of a layer with one element type.",
    ),
    "shape_invalid": Reason(
        "The shape is negative, holds a null, has over 32 dimensions, or multiplies out beyond 2^48 elements.",
        InvalidInputError,
        "Send the layer's full shape.",
    ),
    "shape_changed": Reason(
        "The runs of one layer differ in shape.",
        InvalidInputError,
        "Send all runs of a layer with its full shape; give different layers different names.",
    ),
    "importance_invalid": Reason(
        "`importance` holds a null or a number that is not from 0 to 1e15, has another length than the columns, changes within a layer, or comes to a scheme that does not go by it.",
        InvalidInputError,
        "Send one float32 for each column of the layer, or null.",
    ),
    "bytes_ragged": Reason(
        "The row's length is no whole number of elements.",
        InvalidInputError,
        "Check `dtype` and the length of the row.",
    ),
    "channel_cut": Reason(
        "A run ends inside an output channel.",
        InvalidInputError,
        "Cut a layer between output channels only.",
    ),
    "layer_too_long": Reason(
        "A layer's rows hold more elements than its shape.",
        InvalidInputError,
        "Check the shape; give different layers different names.",
    ),
    "layer_interrupted": Reason(
        "Another layer began before this one was complete.",
        InvalidInputError,
        "Send all runs of a layer one after the other.",
    ),
    "layer_repeated": Reason(
        "A layer came again after its end.",
        InvalidInputError,
        "Give every layer a name of its own.",
    ),
    "layer_incomplete": Reason(
        "The stream ended before the layer was complete.",
        InvalidInputError,
        "Send all channels of the layer before the end of the stream; check its shape.",
    ),
    "channel_too_large": Reason(
        "One output channel is larger than `message_bytes_max`.",
        InvalidInputError,
        "Send the layer as `[n, columns]`, or raise `message_bytes_max`.",
    ),
    "non_finite": Reason(
        "A weight is NaN or infinite.",
        InvalidInputError,
        "Repair the layer or ignore it; with `on_error` `continue` the other layers are quantized.",
    ),
    "scale_overflow": Reason(
        "A scale is too large for the type in which it is stored.",
        InvalidInputError,
        "Send the layer as f32 (GGUF types hold f16: use another scheme), or ignore it; with `on_error` `continue` the other layers are quantized.",
    ),
    "amax_exceeded": Reason(
        "A weight's magnitude is greater than the command's `amax`.",
        InvalidInputError,
        "Give the greatest magnitude over all layers that share the global scale, or leave `amax` out.",
    ),
    "group_size_indivisible": Reason(
        "The group size does not divide the columns.",
        InvalidInputError,
        "Use another group size, a scheme of smaller groups or without, or keep such layers with `on_indivisible` `keep`.",
    ),
    "rank_unsupported": Reason(
        "The scheme is not defined for a layer of this rank.",
        InvalidInputError,
        "Use a scheme without blocks for this layer, or ignore it.",
    ),
    "needs_calibration": Reason(
        "The scheme's activations need calibration, so a checkpoint cannot be made of weights alone.",
        InvalidInputError,
        "Use FP8_DYNAMIC or FP8_BLOCK, whose activations are scaled at run time.",
    ),
    "ignored": Reason(
        "Kept: the recipe's `ignore` names the layer.",
        None,
        "Nothing, or take the name off `ignore`.",
    ),
    "unmatched": Reason(
        "Kept: no rule of the recipe matches the layer.",
        None,
        "Nothing, or add a rule whose target matches.",
    ),
    "rank_1": Reason(
        "Kept: a layer of rank 1 is quantized only where a rule names it.",
        None,
        "Nothing, or name the layer in a rule.",
    ),
    "empty": Reason(
        "Kept: the layer has no elements.",
        None,
        "Nothing.",
    ),
    "below_threshold": Reason(
        "Kept: no rung of the ladder reached its thresholds.",
        None,
        "Nothing, or add a finer scheme to the ladder, or lower its threshold.",
    ),
    "not_float": Reason(
        "Kept: the tensor holds no floating-point numbers.",
        None,
        "Nothing.",
    ),
    "not_a_weight": Reason(
        "Kept: in a checkpoint, only tensors named `*.weight` are quantized.",
        None,
        "Nothing, or rename the tensor so that it ends in `.weight`.",
    ),
    "already_quantized": Reason(
        "Kept: the tensor belongs to a layer that is quantized already.",
        None,
        "Nothing, or start from the checkpoint that it was made of.",
    ),
    "kept_without_data": Reason(
        "A kept row came to `dequantize` without its weights.",
        InvalidInputError,
        "Quantize with `return_kept`, or leave kept rows out.",
    ),
    "row_inconsistent": Reason(
        "A row given to `dequantize` does not hold what its scheme and shape need.",
        InvalidInputError,
        "Send all rows of the layer as `quantize` answered them, in order.",
    ),
    "checksum_mismatch": Reason(
        "The checksum of a row given to `dequantize` does not fit its data.",
        InvalidInputError,
        "The codes were damaged on the way: take them again from where they are whole.",
    ),
    "span_too_large": Reason(
        "What must be in memory at once, a span or a row with its results, is over `layer_bytes_max` or half of "
        "the budget.",
        InvalidInputError,
        "Use a scheme with a scale for each channel or group and without double quantization, send smaller runs, or "
        "raise `layer_bytes_max` and `memory_bytes_max`.",
    ),
    "busy": Reason(
        "No room in the budget for `stall_seconds`; try again later.",
        BusyError,
        "Try again later, or raise `memory_bytes_max`.",
    ),
    "streams_exceeded": Reason(
        "More streams at once than `streams_max`, or on one connection than `connection_streams_max`; try again later.",
        BusyError,
        "Try again later, on another connection, or raise the limit.",
    ),
    "header_timeout": Reason(
        "No command came within `header_seconds`.",
        IdleError,
        "Send the command as soon as the stream is open.",
    ),
    "stream_timeout": Reason(
        "The stream took longer than `stream_seconds`.",
        IdleError,
        "Send fewer layers in a stream, or raise `stream_seconds`.",
    ),
    "idle": Reason(
        "Nothing came for `idle_seconds`.",
        IdleError,
        "Go on sending within `idle_seconds`, or raise it.",
    ),
    "client_not_reading": Reason(
        "The client writes without reading, and its unsent results fill their share of the budget.",
        InvalidInputError,
        "Read answers while writing; the clients of Quarrel do.",
    ),
    "uri_invalid": Reason(
        "A URI that is none, or of a kind that is not read or not written.",
        InvalidInputError,
        "Use a URI of `file`, `s3`, `gs` or `az`, or of `https` to read.",
    ),
    "uri_not_allowed": Reason(
        "A URI outside of what the server's operator allows to read or to write.",
        InvalidInputError,
        "Use a URI under a prefix of `server.info`, or have the operator allow it with `--allow-read` or "
        "`--allow-write`.",
    ),
    "source_missing": Reason(
        "There is nothing at the source's URI.",
        InvalidInputError,
        "Check the URI.",
    ),
    "source_malformed": Reason(
        "What is at the source's URI is no checkpoint, or a damaged one.",
        InvalidInputError,
        "Check that it was copied whole, with its index.",
    ),
    "sink_exists": Reason(
        "Something is at the sink's URI.",
        InvalidInputError,
        "Choose another URI, or replace what is there with `replace`.",
    ),
    "sink_taken": Reason(
        "The sink was begun by another job, is being written by one, or is the source or within it.",
        InvalidInputError,
        "Submit the job that began it, wait for the one that writes it, choose another URI, or start over "
        "with `replace`.",
    ),
    "end_missing": Reason(
        "The layers of a DoPut ended without the end that seals them: its client may have been cut off.",
        InvalidInputError,
        'End with the `app_metadata` `{"end": {"layers": N}}`, on the last batch or alone; send all layers again.',
    ),
    "end_invalid": Reason(
        "The end of a DoPut is none, or names another number of layers than came.",
        InvalidInputError,
        'Count the layers; compare the end with SPEC.md, section "DoPut".',
    ),
    "fused_scales_differ": Reason(
        "Layers that inference engines fuse have different global scales (NVFP4).",
        InvalidInputError,
        "Give the layers of each set (q, k and v; gate and up) a rule with their greatest magnitude as `amax`.",
    ),
    "storage_failed": Reason(
        "A store or a disk does not read or write now.",
        UnavailableError,
        "Try again later; the same job goes on where it was.",
    ),
    "storage_denied": Reason(
        "A store or a disk refuses to be read or written: no credentials, or none that it accepts.",
        InvalidInputError,
        "Give the server's environment credentials that may read the source and write the sink.",
    ),
    "quality_missed": Reason(
        "A layer is worse than the job's `sqnr_db_min` or `cosine_min`.",
        InvalidInputError,
        "Choose a scheme of more bits or smaller groups, or ignore the layer.",
    ),
    "job_unknown": Reason(
        "No job has that name; a server forgets jobs when it is started anew, and old ones when there are many.",
        InvalidInputError,
        "Ask `job.list`; a job that was forgotten goes on when it is submitted again.",
    ),
    "jobs_exceeded": Reason(
        "More jobs at once than `jobs_max`.",
        BusyError,
        "Try again later, or raise the limit.",
    ),
    "stopping": Reason(
        "The server is stopping.",
        UnavailableError,
        "Try again: another server, or this one after its restart.",
    ),
    "internal": Reason(
        "A fault of the server.",
        ServerError,
        "Report it, with the server's log.",
    ),
}
