//! A footer, written anew before the `parquet` crate reads it.
//!
//! The crate does not look at the types of fields, takes 64 bits for 32, passes over what it does not know by other rules than ours, builds the
//! tree of columns by recursion, and believes how many a node says are below it. So it gets nothing but fields that are known here, each once and
//! of its own type, and a tree that is neither large nor deep.

use super::thrift::{Kind, Thrift, Unread};

/// What a field or an element of a list is.
#[derive(Clone, Copy)]
enum Type {
    Bool,
    Byte,
    I32,
    I64,
    Binary,
    Struct(&'static [(i16, Type)]),
    List(&'static Type),
}

use Type::{Binary, Bool, Byte, I32, I64, List, Struct};

/// What a node of the tree of columns means: strings, lists, halves, and integers of some width.
const MEANING: &[(i16, Type)] =
    &[(1, Struct(&[])), (3, Struct(&[])), (10, Struct(&[(1, Byte), (2, Bool)])), (15, Struct(&[]))];
const NODE: &[(i16, Type)] = &[
    (1, I32),
    (2, I32),
    (3, I32),
    (4, Binary),
    (CHILDREN, I32),
    (6, I32),
    (7, I32),
    (8, I32),
    (9, I32),
    (10, Struct(MEANING)),
];
const CHUNK: &[(i16, Type)] =
    &[(1, I32), (2, List(&I32)), (3, List(&Binary)), (4, I32), (5, I64), (6, I64), (7, I64), (9, I64), (11, I64)];
const GROUP: &[(i16, Type)] = &[(1, List(&Struct(&[(2, I64), (3, Struct(CHUNK))]))), (2, I64), (3, I64)];
/// As `parquet.thrift` numbers them; what else there is says nothing about where values are.
const FOOTER: &[(i16, Type)] = &[
    (1, I32),
    (SCHEMA, List(&Struct(NODE))),
    (3, I64),
    (4, List(&Struct(GROUP))),
    (5, List(&Struct(&[(1, Binary), (2, Binary)]))),
    (6, Binary),
];
/// The tree, each node before those below it.
const SCHEMA: i16 = 2;
const CHILDREN: i16 = 5;

/// Nodes of the tree: more than layers in columns have, with many to spare.
const NODES_MAX: u64 = 1_000;
const DEPTH_MAX: usize = 16;

/// A footer that says the same in nothing but known fields.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub(super) fn anew(footer: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(footer.len());
    let said = |unread| match unread {
        Unread::CutShort => "its footer is cut short".to_owned(),
        Unread::Wrong(what) => format!("its footer is none: {what}"),
    };
    fields(FOOTER, &mut Thrift::new(footer), &mut out).map_err(said)?;
    // What is looked at is what the crate will read.
    tree(&out)?;
    Ok(out)
}

fn kind(of: Type) -> Kind {
    match of {
        Bool => Kind::True,
        Byte => Kind::Byte,
        I32 => Kind::I32,
        I64 => Kind::I64,
        Binary => Kind::Binary,
        Struct(_) => Kind::Struct,
        List(_) => Kind::List,
    }
}

fn fields(known: &'static [(i16, Type)], from: &mut Thrift<'_>, out: &mut Vec<u8>) -> Result<(), Unread> {
    let mut seen = 0u32;
    from.fields(|from, number, found| {
        let Some((_, of)) = known.iter().find(|(known, _)| *known == number) else { return Ok(false) };
        let is_right = found == kind(*of) || matches!((of, found), (Bool, Kind::False));
        if !is_right || seen & 1 << number != 0 {
            return Err(Unread::Wrong("it has a field twice, or of another type than it must be"));
        }
        seen |= 1 << number;
        // The long form: it needs no number before.
        out.push(found as u8);
        number_into(out, zigzag(number.into()));
        copy(*of, from, out)?;
        Ok(true)
    })?;
    out.push(0);
    Ok(())
}

fn copy(of: Type, from: &mut Thrift<'_>, out: &mut Vec<u8>) -> Result<(), Unread> {
    match of {
        // Its kind says it.
        Bool => Ok(()),
        Byte => {
            out.push(from.byte()?);
            Ok(())
        }
        I32 | I64 => {
            let number = from.int()?;
            if matches!(of, I32) && i32::try_from(number).is_err() {
                return Err(Unread::Wrong("it has a number that is too large"));
            }
            number_into(out, zigzag(number));
            Ok(())
        }
        Binary => {
            let bytes = from.binary()?;
            number_into(out, bytes.len() as u64);
            out.extend_from_slice(bytes);
            Ok(())
        }
        Struct(known) => fields(known, from, out),
        List(element) => {
            let (elements, found) = from.list()?;
            if found != kind(*element) {
                return Err(Unread::Wrong("it has a list of another type than it must be"));
            }
            // Each takes a byte at least.
            if elements > from.left() as u64 {
                return Err(Unread::CutShort);
            }
            out.push(0xf0 | found as u8);
            number_into(out, elements);
            (0..elements).try_for_each(|_| copy(*element, from, out))
        }
    }
}

fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> 63) as u64
}

fn number_into(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Refuses a tree of columns that is too large, too deep, or none.
fn tree(footer: &[u8]) -> Result<(), String> {
    let mut sentence = None;
    let read = Thrift::new(footer).fields(|from, number, _| {
        if number != SCHEMA {
            return Ok(false);
        }
        let (nodes, _) = from.list()?;
        if nodes > NODES_MAX {
            sentence = Some(format!("its schema has {nodes} nodes: expected at most {NODES_MAX}"));
            return Err(Unread::Wrong("of that"));
        }
        // How many are missing below each node that is not complete.
        let mut missing = Vec::new();
        for _ in 0..nodes {
            let children = children(from)?;
            if let Some(last) = missing.last_mut() {
                *last -= 1;
            }
            missing.push(children);
            if missing.len() > DEPTH_MAX || children < 0 || children > nodes as i64 {
                sentence =
                    Some(format!("a column nests more than {DEPTH_MAX} deep, or says {children} below it, of {nodes}"));
                return Err(Unread::Wrong("of that"));
            }
            while missing.last() == Some(&0) {
                missing.pop();
            }
        }
        Ok(true)
    });
    match (read, sentence) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some(sentence)) => Err(sentence),
        (Err(_), None) => Err("its footer is none".to_owned()),
    }
}

fn children(from: &mut Thrift<'_>) -> Result<i64, Unread> {
    let mut children = 0;
    from.fields(|from, number, _| {
        if number == CHILDREN {
            children = from.int()?;
        }
        Ok(number == CHILDREN)
    })?;
    Ok(children)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer of nothing but nodes with so many below them.
    fn nodes(children: &[u8]) -> Vec<u8> {
        let nodes = children.iter().flat_map(|children| [0x55, children * 2, 0]);
        let head = [0x29, 0xfc, 0x80 | (children.len() & 0x7f) as u8, (children.len() >> 7) as u8];
        head.into_iter().chain(nodes).chain([0]).collect()
    }

    #[test]
    fn trees_of_columns_pass_and_towers_do_not() {
        assert!(anew(&nodes(&[3, 0, 1, 0, 2, 0, 0])).is_ok());
        assert!(anew(&nodes(&[1; 15])).is_ok());
        assert!(anew(&nodes(&[1; 17])).is_err_and(|said| said.contains("deep")));
        assert!(anew(&nodes(&[3, 60, 0])).is_err_and(|said| said.contains("says 60")));
        assert!(anew(&nodes(&[0; 1_001])).is_err_and(|said| said.contains("1001 nodes")));
    }

    #[test]
    fn what_is_known_is_said_again_and_nothing_else() {
        // Version 2, the tree, and a field 40 of booleans that claim to be many.
        let footer = [&[0x15, 4, 0x19, 0x1c, 0x55, 2, 0][..], &[0x09, 80, 0x31, 1, 2, 1], &[0]].concat();
        let anew = anew(&footer);
        assert_eq!(anew, Ok(vec![5, 2, 4, 9, 4, 0xfc, 1, 5, 10, 2, 0, 0]));
        assert_eq!(super::anew(&anew.unwrap_or_default()), Ok(vec![5, 2, 4, 9, 4, 0xfc, 1, 5, 10, 2, 0, 0]));
    }

    #[test]
    fn fields_of_other_types_are_refused() {
        let tower = |of: u8, number: &[u8]| {
            let node = [&[0x50 | of][..], number, &[0]].concat();
            [&[0x29, 0x1c][..], &node, &[0]].concat()
        };
        assert!(anew(&tower(5, &[0])).is_ok());
        // As 64 bits; as a number that is 1 in its lower 32 bits; as a set of nodes; twice.
        assert!(anew(&tower(6, &[2])).is_err_and(|said| said.contains("another type")));
        assert!(anew(&tower(5, &[0xfd, 0xff, 0xff, 0xff, 0x1f])).is_err_and(|said| said.contains("too large")));
        assert!(anew(&[0x2a, 0x1c, 0x55, 2, 0, 0]).is_err_and(|said| said.contains("another type")));
        assert!(anew(&[0x15, 4, 0x05, 2, 4, 0]).is_err_and(|said| said.contains("twice")));
        let many = [0x29, 0xfc, 0xff, 0xff, 0xff, 0xff, 0x07, 0];
        assert!(anew(&many).is_err_and(|said| said.contains("cut short")), "2^31 nodes");
    }
}
