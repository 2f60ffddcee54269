//! Thrift's compact protocol, as far as the headers of Parquet need it: nothing is allocated, nothing is believed.

/// What is left of the bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Thrift<'a>(&'a [u8]);

/// Why bytes are no header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// It goes on behind them.
    CutShort,
    /// It says what cannot be.
    Wrong(&'static str),
}

/// Deeper than any header nests.
const DEPTH_MAX: usize = 16;

/// Of a field or an element, as they are numbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    True = 1,
    False = 2,
    Byte = 3,
    I16 = 4,
    I32 = 5,
    I64 = 6,
    Double = 7,
    Binary = 8,
    List = 9,
    Set = 10,
    Map = 11,
    Struct = 12,
}

impl Kind {
    fn of(number: u8) -> Result<Kind, Unread> {
        use Kind::*;
        let kinds = [True, False, Byte, I16, I32, I64, Double, Binary, List, Set, Map, Struct];
        let at = usize::from(number).wrapping_sub(1);
        kinds.get(at).copied().ok_or(Unread::Wrong("it has a field of an unknown type"))
    }
}

impl<'a> Thrift<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Thrift<'a> {
        Thrift(bytes)
    }

    /// How many bytes are left.
    pub(super) fn left(&self) -> usize {
        self.0.len()
    }

    /// The fields of a struct, each given to `take` with its number, which reads it or says that it did not.
    pub(super) fn fields(
        &mut self,
        mut take: impl FnMut(&mut Thrift<'a>, i16, Kind) -> Result<bool, Unread>,
    ) -> Result<(), Unread> {
        let mut number = 0i16;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            let kind = Kind::of(head & 0xf)?;
            number = match head >> 4 {
                0 => i16::try_from(self.int()?).map_err(|_| Unread::Wrong("it has a field of an impossible number"))?,
                more => number.checked_add(i16::from(more)).ok_or(Unread::Wrong("it has too many fields"))?,
            };
            if !take(self, number, kind)? {
                self.skip(kind, 0)?;
            }
        }
    }

    /// The head of a list: how many elements follow, and their kind.
    pub(super) fn list(&mut self) -> Result<(u64, Kind), Unread> {
        let head = self.byte()?;
        let elements = match head >> 4 {
            15 => self.number()?,
            few => u64::from(few),
        };
        // Each takes a byte at least, and nothing more is read to know it.
        Ok((elements, Kind::of(head & 0xf)?))
    }

    /// A signed number.
    pub(super) fn int(&mut self) -> Result<i64, Unread> {
        let number = self.number()?;
        Ok((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    fn number(&mut self) -> Result<u64, Unread> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Unread::Wrong("it has a number of more than 64 bits"))
    }

    /// Bytes of which the length stands before them.
    pub(super) fn binary(&mut self) -> Result<&'a [u8], Unread> {
        let bytes = self.number()?;
        let all = self.0;
        self.pass(bytes)?;
        Ok(&all[..all.len() - self.0.len()])
    }

    pub(super) fn byte(&mut self) -> Result<u8, Unread> {
        let (first, rest) = self.0.split_first().ok_or(Unread::CutShort)?;
        self.0 = rest;
        Ok(*first)
    }

    fn pass(&mut self, bytes: u64) -> Result<(), Unread> {
        let bytes = usize::try_from(bytes).map_err(|_| Unread::CutShort)?;
        self.0 = self.0.get(bytes..).ok_or(Unread::CutShort)?;
        Ok(())
    }

    fn skip(&mut self, kind: Kind, depth: usize) -> Result<(), Unread> {
        if depth > DEPTH_MAX {
            return Err(Unread::Wrong("its fields nest too deep"));
        }
        match kind {
            // In a struct the kind is the value.
            Kind::True | Kind::False => Ok(()),
            Kind::Byte => self.pass(1),
            Kind::I16 | Kind::I32 | Kind::I64 => self.number().map(drop),
            Kind::Double => self.pass(8),
            Kind::Binary => self.binary().map(drop),
            Kind::List | Kind::Set => {
                let (elements, kind) = self.list()?;
                self.elements(elements, &[kind], depth)
            }
            Kind::Map => {
                let elements = self.number()?;
                if elements == 0 {
                    return Ok(());
                }
                let kinds = self.byte()?;
                self.elements(elements, &[Kind::of(kinds >> 4)?, Kind::of(kinds & 0xf)?], depth)
            }
            Kind::Struct => {
                let mut inner = *self;
                inner.fields_of(depth + 1)?;
                *self = inner;
                Ok(())
            }
        }
    }

    fn elements(&mut self, elements: u64, kinds: &[Kind], depth: usize) -> Result<(), Unread> {
        if elements > self.left() as u64 {
            return Err(Unread::CutShort);
        }
        for _ in 0..elements {
            for kind in kinds {
                match kind {
                    Kind::True | Kind::False => self.pass(1)?,
                    other => self.skip(*other, depth + 1)?,
                }
            }
        }
        Ok(())
    }

    fn fields_of(&mut self, depth: usize) -> Result<(), Unread> {
        self.fields(|thrift, _, kind| thrift.skip(kind, depth).map(|()| true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields 1 (i32, 5), 3 (binary `ab`), 4 (a list of two structs of nothing), and the end.
    const STRUCT: [u8; 11] = [0x15, 10, 0x28, 2, b'a', b'b', 0x19, 0x2c, 0, 0, 0];

    fn first(bytes: &[u8]) -> Result<(i64, usize), Unread> {
        let (mut thrift, mut first) = (Thrift::new(bytes), 0);
        thrift.fields(|thrift, number, _| {
            if number == 1 {
                first = thrift.int()?;
            }
            Ok(number == 1)
        })?;
        Ok((first, thrift.left()))
    }

    #[test]
    fn fields_are_read_or_passed_over() {
        assert_eq!(first(&STRUCT), Ok((5, 0)));
        let longer = [&STRUCT[..], &[7]].concat();
        assert_eq!(first(&longer), Ok((5, 1)));
        for cut in 0..STRUCT.len() {
            assert_eq!(first(&STRUCT[..cut]), Err(Unread::CutShort), "{cut} bytes");
        }
    }

    #[test]
    fn what_cannot_be_is_told() {
        let deep = [0x1c].repeat(100);
        assert!(matches!(first(&deep), Err(Unread::Wrong(_))), "structs in structs");
        assert!(matches!(first(&[0x1d]), Err(Unread::Wrong(_))), "a kind of 13");
        let lists = [&[0x29][..], &[0x19].repeat(100)].concat();
        assert!(matches!(first(&lists), Err(Unread::Wrong(_))), "lists in lists");
        let long = [&[0x15][..], &[0xff].repeat(20)].concat();
        assert!(matches!(first(&long), Err(Unread::Wrong(_))), "a number without an end");
        let many = [0x29, 0xfc, 0xff, 0xff, 0xff, 0xff, 0x0f, 0];
        assert_eq!(first(&many), Err(Unread::CutShort), "a list of 2^32 structs");
    }
}
