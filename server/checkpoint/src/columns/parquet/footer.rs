//! What is looked at of a footer before the `parquet` crate reads it: it builds the tree of columns by recursion, and believes how
//! many of them a node says that it has.

use super::thrift::{Kind, Thrift, Unread};

/// Nodes of the tree: more than layers in columns have, with many to spare.
const NODES_MAX: u64 = 1_000;
const DEPTH_MAX: usize = 16;

/// Number 2 of a footer's fields: the tree, each node before those below it.
const SCHEMA: i16 = 2;
/// Number 5 of a node's fields.
const CHILDREN: i16 = 5;

/// Refuses a tree of columns that is too large, too deep, or none.
///
/// # Errors
/// A sentence that says what is wrong with the footer.
pub(super) fn check(footer: &[u8]) -> Result<(), String> {
    let mut sentence = None;
    let read = Thrift::new(footer).fields(|thrift, number, kind| {
        if number != SCHEMA || kind != Kind::List {
            return Ok(false);
        }
        let (nodes, kind) = thrift.list()?;
        if kind != Kind::Struct || nodes > NODES_MAX {
            sentence = Some(format!("its schema has {nodes} nodes: expected at most {NODES_MAX}"));
            return Err(Unread::Wrong("of that"));
        }
        // How many are missing below each node that is not complete.
        let mut missing = Vec::new();
        for _ in 0..nodes {
            let children = children(thrift)?;
            if let Some(last) = missing.last_mut() {
                *last -= 1;
            }
            missing.push(children);
            if missing.len() > DEPTH_MAX || children > nodes as i64 {
                sentence =
                    Some(format!("a column nests more than {DEPTH_MAX} deep, or says {children} below it, of {nodes}"));
                return Err(Unread::Wrong("of that"));
            }
            while missing.last().is_some_and(|missing| *missing <= 0) {
                missing.pop();
            }
        }
        Ok(true)
    });
    match (read, sentence) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some(sentence)) => Err(sentence),
        (Err(Unread::CutShort), None) => Err("its footer is cut short".to_owned()),
        (Err(Unread::Wrong(what)), None) => Err(format!("its footer is none: {what}")),
    }
}

fn children(thrift: &mut Thrift<'_>) -> Result<i64, Unread> {
    let mut children = 0;
    thrift.fields(|thrift, number, kind| {
        let is_it = number == CHILDREN && kind == Kind::I32;
        if is_it {
            children = thrift.int()?;
        }
        Ok(is_it)
    })?;
    Ok(children)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer of nothing but nodes with so many below them.
    fn footer(children: &[u8]) -> Vec<u8> {
        let nodes = children.iter().flat_map(|children| [0x55, children * 2, 0]);
        let head = [0x29, 0xfc, 0x80 | (children.len() & 0x7f) as u8, (children.len() >> 7) as u8];
        head.into_iter().chain(nodes).chain([0]).collect()
    }

    #[test]
    fn trees_of_columns_pass_and_towers_do_not() {
        assert_eq!(check(&footer(&[3, 0, 1, 0, 2, 0, 0])), Ok(()));
        assert_eq!(check(&footer(&[1; 15])), Ok(()));
        assert!(check(&footer(&[1; 17])).is_err_and(|said| said.contains("deep")));
        assert!(check(&footer(&[3, 60, 0])).is_err_and(|said| said.contains("says 60")));
        assert!(check(&footer(&[0; 1_001])).is_err_and(|said| said.contains("1001 nodes")));
    }
}
