//! What a query row of attention sees: where it stands, in a chain or a tree, and which positions count.
#![forbid(unsafe_code)]

/// Where the query rows stand: row `i` was written at place `first + i`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The tokens before them.
    pub first: usize,
    /// None for rows that follow each other. Otherwise row 0 is the root of a tree and `parents[i]`, at
    /// most `i`, the row that row `i + 1` follows: a row sees the sequence, its ancestors and itself.
    pub parents: Option<&'a [u32]>,
}

impl Rows<'_> {
    /// Rows that follow each other.
    #[must_use]
    pub fn chain(first: usize) -> Self {
        Self { first, parents: None }
    }

    /// The row that a row follows.
    fn parent(&self, row: usize) -> Option<usize> {
        match self.parents {
            None => row.checked_sub(1),
            Some(parents) => row.checked_sub(1).map(|row| parents[row] as usize),
        }
    }

    /// How many rows are before a row on its path.
    #[must_use]
    pub fn depth(&self, row: usize) -> usize {
        match self.parents {
            None => row,
            Some(_) => std::iter::successors(self.parent(row), |row| self.parent(*row)).count(),
        }
    }

    /// The position of a row's token in its text.
    #[must_use]
    pub fn position(&self, row: usize) -> usize {
        self.first + self.depth(row)
    }

    /// The place of a position in the path of `row`.
    pub(super) fn place(&self, row: usize, position: usize) -> usize {
        let Some(depth) = position.checked_sub(self.first) else { return position };
        let up = self.depth(row) - depth;
        let path = std::iter::successors(Some(row), |row| self.parent(*row));
        self.first + path.take(up + 1).last().unwrap_or(row)
    }
}

/// A sequence without an end (StreamingLLM, Xiao et al. 2023): every token looks at the first `sinks`
/// tokens and at the last `window`, its own included, and everything between is given back.
///
/// Keys stay rotated to the positions they were written at. Within the window only distances count, and
/// those are right. For the sinks a row has a second query, rotated to position `sinks + window - 1`: the
/// one it would have if the cache held nothing but sinks and window. So no distance is ever longer than
/// what the cache holds, however many tokens have gone by, and no key is rotated twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streaming {
    /// First tokens that are kept.
    pub sinks: usize,
    /// Last tokens that are kept.
    pub window: usize,
}

/// What a query row looks at and how it scores it.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// Multiplied onto each score.
    pub scale: f32,
    /// Scores are bent to lie within this of zero (Gemma 2); 0 leaves them alone.
    pub softcap: f32,
    /// Positions that a row sees, its own included; `usize::MAX` for all.
    pub window: usize,
    /// First positions of the sequence that are seen besides the window, as attention sinks (Xiao et
    /// al. 2023, StreamingLLM).
    pub sinks: usize,
    /// The queries for the sinks of rows whose window has left them: rotated for position
    /// `sinks + window - 1`, their place inside the cache, so that keys need never be rotated again. In the
    /// shape of the queries; none to use those.
    pub sink_q: Option<&'a [f32]>,
}

impl Sight<'_> {
    /// All positions up to the row's own.
    #[must_use]
    pub fn causal(scale: f32) -> Self {
        Self { scale, softcap: 0.0, window: usize::MAX, sinks: 0, sink_q: None }
    }

    /// Where the window of the row at `position` starts: 0 as long as nothing lies between the sinks and
    /// the window.
    #[must_use]
    pub fn start(&self, position: usize) -> usize {
        let start = (position + 1).saturating_sub(self.window);
        if start <= self.sinks { 0 } else { start }
    }
}
