//! The header of a page.

use ::parquet::basic::Encoding;

use super::thrift::{Kind, Thrift, Unread};

/// What a page says of itself.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Header {
    /// Its own.
    pub(super) bytes: u64,
    pub(super) kind: i64,
    pub(super) size: i64,
    pub(super) stored: i64,
    pub(super) values: i64,
    pub(super) encoding: i64,
    /// Version 1 of a data page.
    pub(super) levels: [i64; 2],
    /// Version 2 of a data page.
    pub(super) nulls: i64,
    pub(super) rows: i64,
    pub(super) level_bytes: [i64; 2],
    pub(super) is_plain: bool,
    /// Of the page as it is stored, if its writer took one.
    pub(super) crc: Option<i64>,
}

pub(super) const DATA: i64 = 0;
pub(super) const DICTIONARY: i64 = 2;
pub(super) const DATA_V2: i64 = 3;

impl Header {
    /// The numbers are those of `parquet.thrift`.
    pub(super) fn read(bytes: &[u8]) -> Result<Header, Unread> {
        let (mut thrift, mut header) = (Thrift::new(bytes), Header::default());
        thrift.fields(|thrift, number, kind| match (number, kind) {
            (1, Kind::I32) => into(thrift, &mut header.kind),
            (2, Kind::I32) => into(thrift, &mut header.size),
            (3, Kind::I32) => into(thrift, &mut header.stored),
            (4, Kind::I32) => into(thrift, header.crc.insert(0)),
            (5 | 7 | 8, Kind::Struct) => {
                let page = number;
                thrift.fields(|thrift, number, kind| match (page, number, kind) {
                    (_, 1, Kind::I32) => into(thrift, &mut header.values),
                    (5 | 7, 2, Kind::I32) | (8, 4, Kind::I32) => into(thrift, &mut header.encoding),
                    (5, 3, Kind::I32) => into(thrift, &mut header.levels[0]),
                    (5, 4, Kind::I32) => into(thrift, &mut header.levels[1]),
                    (8, 2, Kind::I32) => into(thrift, &mut header.nulls),
                    (8, 3, Kind::I32) => into(thrift, &mut header.rows),
                    (8, 5, Kind::I32) => into(thrift, &mut header.level_bytes[0]),
                    (8, 6, Kind::I32) => into(thrift, &mut header.level_bytes[1]),
                    (8, 7, Kind::False) => {
                        header.is_plain = true;
                        Ok(true)
                    }
                    _ => Ok(false),
                })?;
                Ok(true)
            }
            _ => Ok(false),
        })?;
        header.bytes = (bytes.len() - thrift.left()) as u64;
        Ok(header)
    }
}

fn into(thrift: &mut Thrift<'_>, number: &mut i64) -> Result<bool, Unread> {
    *number = thrift.int()?;
    Ok(true)
}

/// An encoding of values or levels by its number in `parquet.thrift`; none that is not read. Those of deltas say within a page how many
/// values it has, and the crate believes them.
pub(super) fn encoding(number: i64) -> Option<Encoding> {
    Some(match number {
        0 => Encoding::PLAIN,
        2 => Encoding::PLAIN_DICTIONARY,
        3 => Encoding::RLE,
        8 => Encoding::RLE_DICTIONARY,
        9 => Encoding::BYTE_STREAM_SPLIT,
        _ => return None,
    })
}
