//! The shape of a layer.

use std::fmt;

/// A layer's full shape: no negative dimension, and a number of elements that fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    dims: Vec<i64>,
    elements: usize,
}

/// More than any tensor has; shapes are repeated in every row and in messages.
const RANK_MAX: usize = 32;
/// More than any memory holds, and small enough that bytes and bits of it do not overflow.
const ELEMENTS_MAX: i64 = 1 << 48;

impl Shape {
    /// The shape of those dimensions, or what is wrong with them.
    ///
    /// # Errors
    /// A sentence that names the dimension.
    pub fn new(dims: Vec<i64>) -> Result<Shape, String> {
        if dims.len() > RANK_MAX {
            return Err(format!("it has {} dimensions, expected at most {RANK_MAX}", dims.len()));
        }
        if let Some(at) = dims.iter().position(|dim| *dim < 0) {
            return Err(format!("dimension {at} is {}, expected 0 or more", dims[at]));
        }
        // A zero makes the product zero whatever the other dimensions are.
        let product = match dims.contains(&0) {
            true => Some(0),
            false => dims.iter().try_fold(1i64, |product, dim| product.checked_mul(*dim)),
        };
        match product.filter(|product| *product <= ELEMENTS_MAX) {
            Some(elements) => Ok(Shape { dims, elements: elements as usize }),
            None => Err(format!("its dimensions multiply out beyond {ELEMENTS_MAX} elements")),
        }
    }

    /// The shape of one row without a `shape`: one channel.
    pub fn flat(elements: usize) -> Shape {
        Shape { dims: vec![elements as i64], elements }
    }

    /// Its dimensions.
    pub fn dims(&self) -> &[i64] {
        &self.dims
    }

    /// Elements in all.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// How many dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.dims).finish()
    }
}
