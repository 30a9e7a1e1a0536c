//! The part of each segment that lies in a range of rows.

use std::ops::Range;

use crate::batch::Segment;

/// Segments that have tokens among `rows`, each with the tokens (counted from its first) that do. Segments lie one behind the
/// other.
pub(crate) fn within(segments: &[Segment], rows: Range<usize>) -> impl Iterator<Item = (&Segment, Range<usize>)> {
    let first = segments.partition_point(|s| s.rows().end <= rows.start);
    let overlapping = segments[first..].iter().take_while(move |s| s.first_row < rows.end);
    overlapping.filter_map(move |s| {
        let tokens = rows.start.max(s.first_row) - s.first_row..rows.end.min(s.rows().end) - s.first_row;
        (!tokens.is_empty()).then_some((s, tokens))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_take_every_token_once() {
        let mut segments = Vec::new();
        let mut first_row = 0;
        for (slot, len) in [0, 3, 0, 0, 5, 1, 0].into_iter().enumerate() {
            segments.push(Segment { first_row, len, slot, phase: 0 });
            first_row += len;
        }
        for block in 1..=9 {
            let mut seen = Vec::new();
            for start in (0..9).step_by(block) {
                for (segment, tokens) in within(&segments, start..(start + block).min(9)) {
                    seen.extend(tokens.map(|t| (segment.slot, t)));
                }
            }
            let want: Vec<_> = segments.iter().flat_map(|s| (0..s.len).map(|t| (s.slot, t))).collect();
            assert_eq!(seen, want, "blocks of {block}");
        }
    }
}
