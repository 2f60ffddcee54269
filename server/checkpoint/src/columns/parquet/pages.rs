//! The pages of a column, each of no more bytes and values than a row may have.
//!
//! The `parquet` crate's own reader allocates what a page's header says of its size, and undoes compression to whatever comes of it.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use ::parquet::{
    basic::{Compression, Type},
    column::page::{Page, PageMetadata, PageReader},
    errors::{ParquetError, Result},
    file::metadata::ColumnChunkMetaData,
};
use bytes::Bytes;

use super::{
    codec,
    header::{DATA, DATA_V2, DICTIONARY, Header, encoding},
    thrift::Unread,
};
use crate::storage::Opened;

/// Headers of pages hold the least and the greatest value, of which a byte array may be long.
const HEADER_BYTES_MAX: u64 = 1 << 20;
const HEADER_BYTES: u64 = 4 << 10;
/// Of pages in which rows end and begin: writers that cut rows make small ones.
const JOINED_BYTES: u64 = 4 << 20;
/// What is read ahead of a column, which a store is asked for in one request.
const AHEAD_BYTES: u64 = 4 << 20;

const ENCODINGS: &str = "a page has another encoding: expected plain, dictionaries, runs or split bytes";

/// What a file's columns share: the number of the row that is being read, how much may come for it, and why they could not be read. The
/// `parquet` crate passes errors on as texts.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    row: Arc<AtomicU64>,
    bytes_max: u64,
    unread: Arc<Mutex<Option<io::Error>>>,
}

impl Meter {
    pub(super) fn new(bytes_max: u64) -> Meter {
        Meter { row: Arc::default(), bytes_max, unread: Arc::default() }
    }

    /// The next row is being read.
    pub(super) fn next_row(&self) {
        self.row.fetch_add(1, Ordering::Relaxed);
    }

    /// Why the file itself could not be read, if that is what went wrong.
    pub(super) fn unread(&self) -> Option<io::Error> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A column's pages within one row group.
pub(super) struct Pages {
    file: Arc<Opened>,
    column: String,
    codec: Compression,
    /// Bytes of a value, one at least.
    width: u64,
    meter: Meter,
    /// The row that was being read last, and values that came for it.
    row: u64,
    values: u64,
    at: u64,
    end: u64,
    /// What was read ahead, and where in the file that is.
    ahead: (u64, Bytes),
    /// Of the page at `at`, if it was looked at.
    header: Option<Header>,
}

impl Pages {
    pub(super) fn new(file: Arc<Opened>, chunk: &ColumnChunkMetaData, meter: Meter) -> Result<Pages> {
        let column = chunk.column_path().string();
        codec::check(chunk.compression()).map_err(|sentence| wrong(&column, &sentence))?;
        // Some writers say 0 for none.
        let dictionary = chunk.dictionary_page_offset().filter(|at| *at != 0);
        let start = dictionary.map_or(chunk.data_page_offset(), |at| at.min(chunk.data_page_offset()));
        let (start, bytes) = (u64::try_from(start), u64::try_from(chunk.compressed_size()));
        let (Ok(at), Ok(bytes)) = (start, bytes) else { return Err(wrong(&column, "it lies at a negative place")) };
        let end = at.saturating_add(bytes);
        if end > file.bytes() {
            return Err(wrong(&column, &format!("it ends at byte {end}, of {} of the file", file.bytes())));
        }
        let width = match chunk.column_type() {
            Type::BOOLEAN | Type::BYTE_ARRAY => 1,
            Type::INT32 | Type::FLOAT => 4,
            Type::INT64 | Type::DOUBLE => 8,
            Type::INT96 => 12,
            Type::FIXED_LEN_BYTE_ARRAY => u64::try_from(chunk.column_descr().type_length()).unwrap_or(0).max(1),
        };
        Ok(Pages {
            codec: chunk.compression(),
            ahead: (at, Bytes::new()),
            header: None,
            row: 0,
            values: 0,
            file,
            column,
            width,
            meter,
            at,
            end,
        })
    }

    fn wrong(&self, sentence: &str) -> ParquetError {
        wrong(&self.column, sentence)
    }

    /// The header of the next page, which stays the next one; none at the end.
    fn header(&mut self) -> Result<Option<Header>> {
        if self.header.is_some() || self.at == self.end {
            return Ok(self.header);
        }
        let mut bytes = HEADER_BYTES;
        let header = loop {
            let taken = bytes.min(self.end - self.at);
            let data = self.read(self.at, taken)?;
            match Header::read(&data) {
                Ok(header) => break header,
                Err(Unread::CutShort) if taken == bytes && bytes < HEADER_BYTES_MAX => bytes *= 4,
                Err(Unread::CutShort) => return Err(self.wrong("the header of a page is cut short")),
                Err(Unread::Wrong(what)) => return Err(self.wrong(&format!("a page has no header: {what}"))),
            }
        };
        self.look_at(&header)?;
        self.header = Some(header);
        Ok(self.header)
    }

    fn look_at(&self, header: &Header) -> Result<()> {
        let left = self.end - self.at - header.bytes;
        let Header { size, stored, values, .. } = *header;
        if stored < 0 || stored as u64 > left {
            return Err(self.wrong(&format!("a page claims {stored} bytes, of {left} that are left")));
        }
        let most = self.meter.bytes_max;
        let advice = "write smaller pages (pyarrow: `write_batch_size=1`), or rows of fewer channels";
        if size < 0 || size as u64 > most {
            return Err(self.wrong(&format!("a page has {size} bytes: expected at most {most}; {advice}")));
        }
        if values < 0 || values as u64 > most / self.width {
            let most = most / self.width;
            return Err(self.wrong(&format!("a page has {values} values: expected at most {most}; {advice}")));
        }
        Ok(())
    }

    /// Bytes of the file, of which more than that are read at once.
    fn read(&mut self, at: u64, bytes: u64) -> Result<Bytes> {
        let (start, data) = &self.ahead;
        let is_there = at >= *start && at + bytes <= start + data.len() as u64;
        if !is_there {
            let until = at + bytes.max(AHEAD_BYTES).min(self.end - at);
            let data = self.file.read(at..until).map_err(|error| {
                let said = self.wrong(&error.to_string());
                *self.meter.unread.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                said
            })?;
            self.ahead = (at, data);
        }
        let (start, data) = &self.ahead;
        let from = (at - start) as usize;
        let range = from..from + bytes as usize;
        if range.end > data.len() {
            return Err(self.wrong("its file was cut short"));
        }
        Ok(data.slice(range))
    }

    /// Counts the values of a page for the row that is being read.
    fn count(&mut self, values: u64) -> Result<()> {
        let row = self.meter.row.load(Ordering::Relaxed);
        if self.row != row {
            (self.row, self.values) = (row, 0);
        }
        let most = self.meter.bytes_max / self.width;
        // The last page before may have begun this row, and its last page may begin the next.
        if self.values + values > most + JOINED_BYTES.min(self.meter.bytes_max) / self.width {
            return Err(self.wrong(&format!("a row has more than {most} values: write rows of fewer channels")));
        }
        self.values += values;
        Ok(())
    }

    /// The page's bytes, not compressed.
    fn body(&mut self, header: &Header) -> Result<Bytes> {
        let stored = self.read(self.at + header.bytes, header.stored as u64)?;
        if header.crc.is_some_and(|crc| crc as i32 != crc32fast::hash(&stored) as i32) {
            return Err(self.wrong("a page is damaged: its checksum is another one"));
        }
        // Levels of version 2 are never compressed.
        let [nulls, repeats] = header.level_bytes;
        let levels = match header.kind {
            DATA_V2 => usize::try_from(nulls).ok().zip(usize::try_from(repeats).ok()).map(|(a, b)| a.saturating_add(b)),
            _ => Some(0),
        };
        let size = header.size as usize;
        let Some(levels) = levels.filter(|levels| *levels <= stored.len() && *levels <= size) else {
            return Err(self.wrong("the levels of a page take more bytes than it has"));
        };
        if self.codec == Compression::UNCOMPRESSED || header.is_plain {
            if stored.len() != size {
                return Err(self.wrong(&format!("a page has {} bytes, not the {size} that it says", stored.len())));
            }
            return Ok(stored);
        }
        let mut body = vec![0; size];
        body[..levels].copy_from_slice(&stored[..levels]);
        // All of its values may be null.
        if size > levels {
            let undone = codec::undo(self.codec, &stored[levels..], &mut body[levels..]);
            undone.map_err(|sentence| self.wrong(&format!("a page cannot be read: {sentence}")))?;
        }
        Ok(body.into())
    }

    /// The page itself; none if it is of a kind that readers pass over.
    fn page(&mut self, header: &Header) -> Result<Option<Page>> {
        if ![DATA, DATA_V2, DICTIONARY].contains(&header.kind) {
            return Ok(None);
        }
        let buf = self.body(header)?;
        let number =
            |number: i64| u32::try_from(number).map_err(|_| wrong(&self.column, "a page has a negative number"));
        let encoding = |number: i64| encoding(number).ok_or_else(|| wrong(&self.column, ENCODINGS));
        let (num_values, of_values) = (number(header.values)?, encoding(header.encoding)?);
        Ok(Some(match header.kind {
            DATA => Page::DataPage {
                buf,
                num_values,
                encoding: of_values,
                def_level_encoding: encoding(header.levels[0])?,
                rep_level_encoding: encoding(header.levels[1])?,
                statistics: None,
            },
            DATA_V2 => Page::DataPageV2 {
                buf,
                num_values,
                encoding: of_values,
                num_nulls: number(header.nulls)?,
                num_rows: number(header.rows)?,
                def_levels_byte_len: number(header.level_bytes[0])?,
                rep_levels_byte_len: number(header.level_bytes[1])?,
                is_compressed: !header.is_plain,
                statistics: None,
            },
            _ => Page::DictionaryPage { buf, num_values, encoding: of_values, is_sorted: false },
        }))
    }

    fn pass(&mut self, header: &Header) {
        self.at += header.bytes + header.stored as u64;
        self.header = None;
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        while let Some(header) = self.header()? {
            if header.kind != DICTIONARY {
                self.count(header.values as u64)?;
            }
            let page = self.page(&header)?;
            self.pass(&header);
            if page.is_some() {
                return Ok(page);
            }
        }
        Ok(None)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        while let Some(header) = self.header()? {
            let (levels, rows) = (Some(header.values as usize), Some(header.rows.max(0) as usize));
            let page = match header.kind {
                DATA => PageMetadata { num_rows: None, num_levels: levels, is_dict: false },
                DATA_V2 => PageMetadata { num_rows: rows, num_levels: levels, is_dict: false },
                DICTIONARY => PageMetadata { num_rows: None, num_levels: None, is_dict: true },
                _ => {
                    self.pass(&header);
                    continue;
                }
            };
            return Ok(Some(page));
        }
        Ok(None)
    }

    fn skip_next_page(&mut self) -> Result<()> {
        if let Some(header) = self.header()? {
            self.pass(&header);
        }
        Ok(())
    }
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

fn wrong(column: &str, sentence: &str) -> ParquetError {
    ParquetError::General(format!("column `{}`: {sentence}", quarrel_engine::shorten(column, 100)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use ::parquet::{
        arrow::ArrowWriter,
        file::{metadata::ParquetMetaDataReader, properties::WriterProperties},
    };
    use arrow_array::{ArrayRef, Int32Array, RecordBatch};

    use super::*;
    use crate::storage::Location;

    /// The column of a file that has a page for each hundred of its thousand values.
    fn pages(bytes_max: u64) -> (Pages, Meter) {
        let numbers: ArrayRef = Arc::new(Int32Array::from_iter_values(0..1_000));
        let batch = RecordBatch::try_from_iter([("n", numbers)]).unwrap();
        let properties = WriterProperties::builder()
            .set_dictionary_enabled(false)
            .set_data_page_row_count_limit(100)
            .set_write_batch_size(100)
            .build();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n.parquet");
        let mut writer =
            ArrowWriter::try_new(fs::File::create(&path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&fs::File::open(&path).unwrap()).unwrap();
        let file = Location::disk(&path).open().unwrap();
        let meter = Meter::new(bytes_max);
        (Pages::new(Arc::new(file), metadata.row_group(0).column(0), meter.clone()).unwrap(), meter)
    }

    #[test]
    fn a_row_takes_no_more_pages_than_its_bytes() {
        // 250 values, in pages of 100; and as many of the rows before and after.
        let (mut pages, meter) = pages(1_000);
        for _ in 0..5 {
            assert_eq!(pages.get_next_page().unwrap().unwrap().num_values(), 100);
        }
        let said = pages.get_next_page().err().unwrap().to_string();
        assert!(said.contains("`n`") && said.contains("a row has more than 250 values"), "{said}");
        meter.next_row();
        assert!(pages.get_next_page().unwrap().is_some());
    }

    #[test]
    fn a_page_has_no_more_values_than_a_row() {
        let (mut pages, _) = pages(396);
        let said = pages.get_next_page().err().unwrap().to_string();
        assert!(said.contains("400 bytes: expected at most 396"), "{said}");
    }

    #[test]
    fn pages_are_looked_at_before_they_are_taken_or_passed_over() {
        let (mut pages, _) = pages(1 << 20);
        for _ in 0..5 {
            assert_eq!(pages.peek_next_page().unwrap().unwrap().num_levels, Some(100));
            pages.skip_next_page().unwrap();
            assert_eq!(pages.next().unwrap().unwrap().num_values(), 100);
        }
        assert!(pages.peek_next_page().unwrap().is_none() && pages.next().is_none());
    }
}
