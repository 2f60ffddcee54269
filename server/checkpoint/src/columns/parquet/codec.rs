//! What pages are compressed with, each undone into exactly the bytes that its header says.

use std::io::Read;

use ::parquet::basic::Compression;
use flate2::read::MultiGzDecoder;

/// Whether a column's pages can be read.
///
/// # Errors
/// A sentence that says what can.
pub(super) fn check(codec: Compression) -> Result<(), String> {
    match codec {
        Compression::UNCOMPRESSED
        | Compression::SNAPPY
        | Compression::GZIP(_)
        | Compression::ZSTD(_)
        | Compression::LZ4_RAW => Ok(()),
        other => Err(format!("a column is compressed as {other}: expected none, snappy, gzip, zstd or lz4_raw")),
    }
}

/// Fills `to`.
///
/// # Errors
/// A sentence if the bytes are damaged, or of another size.
pub(super) fn undo(codec: Compression, data: &[u8], to: &mut [u8]) -> Result<(), String> {
    let size = to.len();
    let filled = match codec {
        Compression::UNCOMPRESSED => {
            to.get_mut(..data.len()).ok_or("it is not compressed, and longer than it says")?.copy_from_slice(data);
            data.len()
        }
        Compression::SNAPPY => snap::raw::Decoder::new().decompress(data, to).map_err(|error| error.to_string())?,
        Compression::LZ4_RAW => lz4_flex::block::decompress_into(data, to).map_err(|error| error.to_string())?,
        Compression::ZSTD(_) => zstd::bulk::decompress_to_buffer(data, to).map_err(|error| error.to_string())?,
        Compression::GZIP(_) => {
            let mut decoder = MultiGzDecoder::new(data);
            decoder.read_exact(to).map_err(|error| error.to_string())?;
            match decoder.read(&mut [0]) {
                Ok(0) => size,
                Ok(_) => return Err(format!("it has more bytes than the {size} that it says")),
                Err(error) => return Err(error.to_string()),
            }
        }
        other => return check(other),
    };
    if filled != size {
        return Err(format!("it has {filled} bytes, not the {size} that it says"));
    }
    Ok(())
}
