//! What a row of codes says of its layer, before its codes are looked at.

use std::{fmt, sync::Arc};

use quarrel_kernels::{Arith, Dtype};
use quarrel_proto::{Reason, column::status};

use crate::{
    coded_columns::CodedBatch,
    coded_rows::CodedLayer,
    layer::{LayerError, Rung, note},
    scheme::Scheme,
    shape::Shape,
};

/// What a row says of its layer.
pub(crate) struct Head {
    shape: Shape,
    dtype: Dtype,
    /// `None` if kept.
    scheme: Option<Scheme>,
}

impl Head {
    pub(crate) fn read(rows: &CodedBatch, at: usize, name: &str) -> Result<Head, LayerError> {
        let wrong = |what: fmt::Arguments<'_>| LayerError(note(Reason::RowInconsistent, name, what));
        let shape = match rows.shapes.dims(at) {
            Some(dims) => dims
                .and_then(Shape::new)
                .map_err(|what| LayerError(note(Reason::ShapeInvalid, name, format_args!("shape: {what}"))))?,
            None => return Err(wrong(format_args!("`shape` is null, expected the layer's full shape"))),
        };
        let word = rows.dtypes.get(at).unwrap_or_default();
        let dtype = Dtype::named(word).ok_or_else(|| {
            let what = format_args!("unknown dtype `{}`", crate::shorten(word, 50));
            LayerError(note(Reason::DtypeInvalid, name, what))
        })?;
        let scheme = match rows.statuses.get(at) {
            Some(status::QUANTIZED) => {
                let text =
                    rows.schemes.get(at).ok_or_else(|| wrong(format_args!("`scheme` is null, expected a scheme")))?;
                Some(
                    text.parse::<Scheme>()
                        .map_err(|error| LayerError(note(error.reason(), name, format_args!("{error}"))))?,
                )
            }
            Some(status::KEPT) => None,
            Some(status::FAILED) => {
                return Err(wrong(format_args!("the row failed to quantize, so there is nothing to decode")));
            }
            other => {
                let other = crate::shorten(other.unwrap_or("null"), 50);
                return Err(wrong(format_args!("status `{other}`: expected quantized or kept")));
            }
        };
        Ok(Head { shape, dtype, scheme })
    }

    pub(crate) fn layer(self, name: &str) -> Result<Arc<CodedLayer>, LayerError> {
        let rung = match self.scheme {
            Some(scheme) if self.shape.elements() > 0 => {
                Some(Rung::new(scheme, Arith::F32, None, self.dtype, name, &self.shape).map_err(LayerError)?)
            }
            Some(_) | None => None,
        };
        Ok(Arc::new(CodedLayer { name: name.to_owned(), shape: self.shape, dtype: self.dtype, rung }))
    }

    pub(crate) fn check_same(&self, layer: &CodedLayer) -> Result<(), LayerError> {
        if self.shape != layer.shape {
            let what = format_args!("a run of shape {} follows runs of shape {}", self.shape, layer.shape);
            return Err(LayerError(note(Reason::ShapeChanged, &layer.name, what)));
        }
        if self.dtype != layer.dtype {
            let what = format_args!("a run of {} follows runs of {}", self.dtype.name(), layer.dtype.name());
            return Err(LayerError(note(Reason::DtypeChanged, &layer.name, what)));
        }
        if self.scheme != layer.rung.as_ref().map(|rung| rung.scheme) {
            let what = format_args!("its runs differ in scheme");
            return Err(LayerError(note(Reason::RowInconsistent, &layer.name, what)));
        }
        Ok(())
    }
}
