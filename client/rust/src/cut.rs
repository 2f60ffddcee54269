//! Layers to rows: runs of whole output channels, at most 2 MiB each where channels allow.

use std::ops::Range;

/// Bytes of one run. Large enough that a message's fixed costs do not count, small enough that a stream holds little and that one
/// is sent while the server computes another: 4 MiB are a twentieth slower, 1 MiB cost a tenth more CPU.
pub(crate) const RUN_BYTES_MAX: u64 = 2 << 20;

/// How one layer is cut: the same rows whenever it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    channels: u64,
    /// Channels of each row but the last.
    step: u64,
}

impl Cut {
    /// `channels` of `channel_bytes` each, for a server that takes messages of so many bytes.
    pub(crate) fn new(channels: u64, channel_bytes: u64, message_bytes_max: u64) -> Cut {
        // Half of a message: names, shapes and scales want their part.
        let run_bytes = RUN_BYTES_MAX.min(message_bytes_max / 2);
        let step = run_bytes.checked_div(channel_bytes).unwrap_or(u64::MAX);
        Cut { channels, step: step.clamp(1, channels.max(1)) }
    }

    /// How many channels there are.
    pub(crate) fn total(self) -> u64 {
        self.channels
    }

    /// A layer of no channels is one row too: somebody must say what became of it.
    pub(crate) fn rows(self) -> u64 {
        self.channels.div_ceil(self.step).max(1)
    }

    /// The channels of a row.
    pub(crate) fn channels(self, row: u64) -> Range<u64> {
        let start = row * self.step;
        start..self.channels.min(start + self.step)
    }
}

/// The product of dimensions, if it is a number that a layer can have.
pub(crate) fn product(dimensions: &[u64]) -> Option<u64> {
    dimensions.iter().try_fold(1u64, |product, dimension| product.checked_mul(*dimension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_cover_every_channel_once_and_stay_small() {
        for (channels, channel_bytes, message) in [
            (4096, 16384, MIB64),
            (1, 1 << 30, MIB64),
            (10, 5 << 20, MIB64),
            (0, 4, MIB64),
            (7, 0, MIB64),
            (1000, 32768, 1 << 20),
        ] {
            let cut = Cut::new(channels, channel_bytes, message);
            let mut next = 0;
            for row in 0..cut.rows() {
                let range = cut.channels(row);
                assert_eq!(range.start, next);
                next = range.end;
                assert!((range.end - range.start) * channel_bytes <= RUN_BYTES_MAX.min(message / 2).max(channel_bytes));
            }
            assert_eq!(next, channels);
        }
    }

    const MIB64: u64 = 64 << 20;
}
