//! Codes to weights: pure, parallel on the rayon pool in which it is called, if it is called in one.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, LargeBinaryArray, LargeListArray, RecordBatch, StringArray};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, SchemaRef};
use quarrel_kernels::{Coded, Decoded, Grid, Level, TILE, convert, dequantize, packed_bytes};
use quarrel_proto::column::status;
use quarrel_shelf::{Room, Shelf};

use crate::{
    answer::{Answer, shapes},
    coded_rows::{CodedPiece, CodedUnit, Content},
    execute::{Cancel, Cancelled},
    parallel, schemas,
    tally::Tally,
};

/// Columns that one thread decodes at a time.
const STRETCH: usize = (1 << 18) / TILE * TILE;

/// The values of a unit.
#[derive(Debug)]
pub struct DecodedUnit {
    pieces: Vec<CodedPiece>,
    /// As they are answered, one after the other.
    values: Room,
}

/// Makes the answers of a stream, unit after unit.
#[derive(Debug)]
pub struct DecodedAnswers {
    decoded: Decoded,
    schema: SchemaRef,
    tally: Tally,
}

/// Decodes a unit into memory of `shelf`.
///
/// # Errors
/// [`Cancelled`] within about 1 MiB of the flag being set.
pub fn decode(
    level: Level,
    unit: CodedUnit,
    decoded: Decoded,
    cancel: &Cancel,
    shelf: &Shelf,
) -> Result<DecodedUnit, Cancelled> {
    let pieces = unit.pieces;
    let elements: usize = pieces.iter().map(|piece| piece.elements).sum();
    let mut values = shelf.room(elements * decoded.bytes());
    let mut rest = &mut *values;
    let mut slots = Vec::new();
    for piece in &pieces {
        let (head, tail) = rest.split_at_mut(piece.elements * decoded.bytes());
        slots.push((piece, head));
        rest = tail;
    }
    parallel::for_each(slots, |(piece, out)| decode_piece(level, piece, decoded, out, cancel))?;
    Ok(DecodedUnit { pieces, values })
}

impl DecodedAnswers {
    /// Before the first unit. `schema` is [`schemas::dequantized_schema`] with the reply's metadata.
    pub fn new(decoded: Decoded, schema: SchemaRef) -> DecodedAnswers {
        DecodedAnswers { decoded, schema, tally: Tally::default() }
    }

    /// The totals of the stream so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// The answer of the next unit: a row for each layer in it.
    pub fn take(&mut self, unit: DecodedUnit) -> Answer {
        let width = self.decoded.bytes();
        let mut rows: Vec<(&CodedPiece, usize)> = Vec::new();
        for piece in &unit.pieces {
            let word = if piece.layer.rung.is_some() { status::QUANTIZED } else { status::KEPT };
            self.tally.add_decoded(word, piece.completes, piece.bytes_in, piece.elements * width);
            match rows.last_mut() {
                Some((last, elements)) if Arc::ptr_eq(&last.layer, &piece.layer) => *elements += piece.elements,
                _ => rows.push((piece, piece.elements)),
            }
        }
        let lengths = rows.iter().map(|(_, elements)| *elements);
        let values = unit.values.lent();
        let weights: ArrayRef = match self.decoded {
            Decoded::F32 => {
                let values = Float32Array::new(ScalarBuffer::from(values), None);
                let item = schemas::item(DataType::Float32);
                Arc::new(LargeListArray::new(item, OffsetBuffer::from_lengths(lengths), Arc::new(values), None))
            }
            Decoded::Bf16 | Decoded::F16 => {
                let offsets = OffsetBuffer::from_lengths(lengths.map(|elements| elements * width));
                Arc::new(LargeBinaryArray::new(offsets, values, None))
            }
        };
        let names = StringArray::from_iter_values(rows.iter().map(|(piece, _)| piece.layer.name.as_str()));
        let mut columns: Vec<ArrayRef> = vec![Arc::new(names), weights];
        if self.decoded != Decoded::F32 {
            columns.push(Arc::new(StringArray::from_iter_values(rows.iter().map(|_| self.decoded.name()))));
        }
        columns.push(Arc::new(shapes(rows.iter().map(|(piece, _)| piece.layer.shape.dims()))));
        let batch =
            RecordBatch::try_new(Arc::clone(&self.schema), columns).expect("columns follow `dequantized_schema`");
        Answer { batch, progress: self.tally.progress() }
    }
}

fn decode_piece(
    level: Level,
    piece: &CodedPiece,
    decoded: Decoded,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<(), Cancelled> {
    cancel.check()?;
    let (rung, channels, codes, scales, zero_points, global) = match (&piece.content, &piece.layer.rung) {
        (Content::Codes { channels, codes, scales, zero_points, global }, Some(rung)) => {
            (rung, channels, codes, scales, zero_points, *global)
        }
        (Content::Weights(bytes), _) => {
            convert(level, piece.layer.dtype, bytes, decoded, out);
            return Ok(());
        }
        (Content::Codes { .. }, None) => unreachable!("codes have a scheme"),
    };
    let (groups, first_span) = (rung.groups(), rung.span_of(channels.start));
    let rows = codes.chunks_exact(rung.packed_bytes()).zip(out.chunks_exact_mut(rung.columns * decoded.bytes()));
    for (channel, (codes, out)) in channels.clone().zip(rows) {
        let from = (rung.span_of(channel) - first_span) * groups;
        let scales = &scales[from..from + groups];
        let zero_points = if zero_points.is_empty() { &[][..] } else { &zero_points[from..from + groups] };
        let stretch_bytes = packed_bytes(rung.codes(), STRETCH);
        // One short channel, or stretches of a long one side by side.
        let stretches = out.chunks_mut(STRETCH * decoded.bytes()).enumerate().collect();
        parallel::for_each(stretches, |(index, out)| {
            cancel.check()?;
            let packed = &codes[index * stretch_bytes..];
            let column = index * STRETCH;
            let grid = Grid { scales, magnitudes: &[], zero_points, global };
            let coded = Coded { codes: rung.codes(), packed, column, group: rung.group, grid };
            dequantize(level, &coded, decoded, out);
            Ok(())
        })?;
    }
    Ok(())
}
