//! IQ4_NL: values that are not evenly spaced.

use super::{
    Block, IQ4_NL, layout,
    search::{Found, Lanes, nearest_of, uneven},
    stored,
    superblock::{Groups, Searched},
    weighted::Weighed,
};
use crate::{
    coder::{Coded, Coder},
    simd::Simd,
};

/// With weights of the columns' importance, or without.
pub(super) struct Iq4Nl<const WEIGHED: bool>;

/// A block's elements to the values' indices.
#[derive(Clone, Copy, Default)]
pub(super) struct Indexed {
    by: f32,
    scale: f32,
}

impl Coder for Indexed {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let exact = S::mul(values, S::splat(self.by));
        let (index, value) = nearest_of::<S>(exact, &IQ4_NL);
        let near = S::min(S::max(exact, S::splat(f32::from(IQ4_NL[0]))), S::splat(f32::from(IQ4_NL[15])));
        Coded { codes: S::truncated(index), decoded: S::mul(S::splat(self.scale), value), exact, near }
    }

    fn decode(&self, code: u8) -> f32 {
        self.scale * f32::from(IQ4_NL[usize::from(code & 15)])
    }
}

impl<const WEIGHED: bool> Searched<32> for Iq4Nl<WEIGHED> {
    const BLOCK: Block = Block::Iq4Nl;
    const WEIGHED: Option<Weighed> =
        if WEIGHED { Some(Weighed::WithMeanOf { elements: 32, times: 2.0 }) } else { None };
    type Coder = Indexed;

    #[inline(always)]
    fn search<R: Simd>(lanes: &Lanes<'_, 32>) -> Found<32> {
        uneven::<R, 32>(lanes.rows, WEIGHED.then_some(lanes.weights), lanes.groups.len(), &IQ4_NL, 7)
    }

    fn coders(groups: Groups<'_>, coders: &mut [Indexed], out: &mut [u8]) {
        let found = groups.scales[0];
        let by = if found == 0.0 { 0.0 } else { 1.0 / found };
        let (bits, scale) = stored(found);
        out[..2].copy_from_slice(&bits);
        coders[0] = Indexed { by, scale };
    }

    fn write(codes: &[u8], out: &mut [u8]) {
        layout::nibbles::<32, 16>(codes, &mut out[2..]);
    }
}
