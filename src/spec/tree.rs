//! Which draft follows which: a chain, or a tree of alternatives checked in the same pass.
//!
//! Rows are numbered as the target model sees them: row 0 is the last settled token, row `i + 1` is
//! draft `i`. A parent is a row, and always a lower one, so rows in order are also an order in which
//! every token comes after those it depends on (the topological order of SpecInfer, Miao et al.,
//! 2305.09781).
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Drafted tokens and what each of them follows.
#[derive(Clone, Copy, Debug)]
pub struct Drafts<'a> {
    tokens: &'a [u32],
    parents: Option<&'a [u32]>,
}

impl<'a> Drafts<'a> {
    /// A chain: every draft follows the one before it, the first one follows the settled tokens.
    #[must_use]
    pub fn chain(tokens: &'a [u32]) -> Self {
        Self { tokens, parents: None }
    }

    /// A tree: draft `i` follows row `parents[i]`. Drafts with the same parent are alternatives.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is not one parent for each token, or a parent is not a
    /// lower row than its draft.
    pub fn tree(tokens: &'a [u32], parents: &'a [u32]) -> Result<Self> {
        if tokens.len() != parents.len() {
            return Err(Error::InvalidArgument(format!(
                "{} drafts with {} parents",
                tokens.len(),
                parents.len()
            )));
        }
        match parents.iter().enumerate().find(|(draft, parent)| **parent as usize > *draft) {
            Some((draft, parent)) => Err(Error::InvalidArgument(format!(
                "draft {draft} is row {} and follows row {parent}: must be a lower one",
                draft + 1
            ))),
            None => Ok(Self { tokens, parents: Some(parents) }),
        }
    }

    /// The drafted tokens.
    #[must_use]
    pub fn tokens(&self) -> &'a [u32] {
        self.tokens
    }

    /// Rows of the target's pass: one more than there are drafts.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.tokens.len() + 1
    }

    /// The row that a row above 0 follows.
    ///
    /// # Panics
    /// For row 0, and for rows that there are not.
    #[must_use]
    pub fn parent(&self, row: usize) -> usize {
        assert!(row > 0 && row <= self.tokens.len(), "row {row} has no parent");
        self.parents.map_or(row - 1, |parents| parents[row - 1] as usize)
    }

    /// Rows and tokens of the drafts that follow `row`, in order.
    pub fn children(&self, row: usize) -> impl Iterator<Item = (usize, u32)> {
        let drafts = *self;
        let after = self.tokens.iter().enumerate().skip(row);
        after
            .map(|(draft, token)| (draft + 1, *token))
            .filter(move |(child, _)| drafts.parent(*child) == row)
    }

    /// Tokens between each row and row 0: the position of row `i` is that of the last settled token
    /// plus `depths()[i]`.
    #[must_use]
    pub fn depths(&self) -> Vec<u32> {
        let mut depths = vec![0; self.rows()];
        for row in 1..self.rows() {
            depths[row] = depths[self.parent(row)] + 1;
        }
        depths
    }

    /// The attention mask among the rows, `[rows][rows]`: true where the row may see the column, which
    /// is itself and its ancestors. Everything settled before row 0 is seen by all.
    #[must_use]
    pub fn mask(&self) -> Vec<bool> {
        let rows = self.rows();
        let mut mask = vec![false; rows * rows];
        mask[0] = true;
        for row in 1..rows {
            let parent = self.parent(row) * rows;
            mask.copy_within(parent..parent + rows, row * rows);
            mask[row * rows + row] = true;
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_sees_itself_and_its_ancestors() {
        // 0 - 1 - 3
        //   \ 2 - 4 - 5
        let drafts = Drafts::tree(&[7, 8, 7, 9, 9], &[0, 0, 1, 2, 4]).unwrap();
        assert_eq!(drafts.depths(), [0, 1, 1, 2, 2, 3]);
        assert_eq!(drafts.children(0).collect::<Vec<_>>(), [(1, 7), (2, 8)]);
        assert_eq!(drafts.children(4).collect::<Vec<_>>(), [(5, 9)]);
        assert_eq!(drafts.children(5).count(), 0);
        let seen = |row: usize| {
            let mask = drafts.mask();
            (0..6).filter(|column| mask[row * 6 + column]).collect::<Vec<_>>()
        };
        assert_eq!(seen(0), [0]);
        assert_eq!(seen(3), [0, 1, 3]);
        assert_eq!(seen(5), [0, 2, 4, 5]);
    }

    #[test]
    fn a_chain_is_the_tree_without_branches() {
        let tokens = [5, 6, 7];
        let (chain, tree) = (Drafts::chain(&tokens), Drafts::tree(&tokens, &[0, 1, 2]).unwrap());
        assert_eq!(chain.mask(), tree.mask());
        assert_eq!(chain.depths(), [0, 1, 2, 3]);
        assert_eq!(chain.children(1).collect::<Vec<_>>(), [(2, 6)]);
        assert_eq!(Drafts::chain(&[]).mask(), [true]);
    }

    #[test]
    fn parents_that_cannot_be() {
        assert!(Drafts::tree(&[1, 2], &[0]).is_err());
        assert!(Drafts::tree(&[1, 2], &[0, 2]).is_err());
        assert!(Drafts::tree(&[1], &[u32::MAX]).is_err());
    }
}
