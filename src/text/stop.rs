//! Strings that end a text.
//!
//! A stop string may arrive in pieces, so text that could be the beginning of one is held back until it
//! is known not to be. The string that is complete first ends the text, wherever pieces end: the
//! outcome does not depend on how tokens cut the text.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Looks for stop strings in a text that comes in pieces.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    strings: Vec<String>,
    /// The end of the text so far, as long as it may begin a stop string.
    held: String,
}

impl Stops {
    /// A search for these strings, at the beginning of a text.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty string, which would end every text before it began.
    pub fn new(strings: Vec<String>) -> Result<Self> {
        if strings.iter().any(String::is_empty) {
            return Err(Error::InvalidArgument("a stop string is empty".into()));
        }
        Ok(Self { strings, held: String::new() })
    }

    /// Takes the next piece and appends to `out` what is certain not to be a part of a stop string. True
    /// when one is complete: neither it nor what follows it in the piece is passed on, and the search is
    /// at the beginning of a new text.
    pub fn push(&mut self, piece: &str, out: &mut String) -> bool {
        if self.strings.is_empty() {
            out.push_str(piece);
            return false;
        }
        let known = self.held.len();
        self.held.push_str(piece);
        // The one that ends first; of several that end there, the longest.
        let ends = |string: &String| {
            // It ends in the new piece, or it would have been found before.
            let from = self.held.floor_char_boundary((known + 1).saturating_sub(string.len()));
            self.held[from..].find(string).map(|at| (from + at + string.len(), from + at))
        };
        if let Some((_, start)) = self.strings.iter().filter_map(ends).min() {
            out.push_str(&self.held[..start]);
            self.held.clear();
            return true;
        }
        let begins = |at: &usize| {
            let rest = &self.held[*at..];
            self.strings.iter().any(|string| string.starts_with(rest))
        };
        let boundaries = self.held.char_indices().map(|(at, _)| at);
        let keep = boundaries.into_iter().find(begins).unwrap_or(self.held.len());
        out.push_str(&self.held[..keep]);
        self.held.drain(..keep);
        false
    }

    /// Appends what was held back, because no more text comes.
    pub fn flush(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Forgets what was held back: another text begins.
    pub fn restart(&mut self) {
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(strings: &[&str]) -> Stops {
        Stops::new(strings.iter().map(ToString::to_string).collect()).unwrap()
    }

    /// What comes out of `text` cut before the bytes whose bits are set in `cuts`, and whether it stopped.
    fn cut(strings: &[&str], text: &str, cuts: usize) -> (String, bool) {
        let (mut stops, mut out) = (stops(strings), String::new());
        let mut piece = String::new();
        for (at, c) in text.char_indices() {
            if cuts >> at & 1 == 1 {
                if stops.push(&piece, &mut out) {
                    return (out, true);
                }
                piece.clear();
            }
            piece.push(c);
        }
        let stopped = stops.push(&piece, &mut out);
        if !stopped {
            stops.flush(&mut out);
        }
        (out, stopped)
    }

    #[test]
    fn the_outcome_does_not_depend_on_the_pieces() {
        let cases: [(&[&str], &str, &str, bool); 8] = [
            (&["END"], "the END of it", "the ", true),
            (&["END"], "the EEND", "the E", true),
            (&["abcd", "bc"], "xabcdef", "xa", true),
            (&["aab"], "aaaab", "aa", true),
            (&["aab"], "aaaac", "aaaac", false),
            (&["\n\n", "</s>"], "a\nb</s", "a\nb</s", false),
            (&["öß"], "aöößb", "aö", true),
            (&["b", "ab"], "xab", "x", true),
        ];
        for (strings, text, want, stopped) in cases {
            for cuts in (0..1 << text.len()).step_by(if cfg!(miri) { 97 } else { 1 }) {
                assert_eq!(cut(strings, text, cuts), (want.to_owned(), stopped), "{text} {cuts:b}");
            }
        }
    }

    #[test]
    fn nothing_of_a_stop_string_comes_out_before_it_is_known_to_be_none() {
        let (mut stops, mut out) = (stops(&["<end>"]), String::new());
        for piece in ["a<", "e", "nd"] {
            assert!(!stops.push(piece, &mut out));
            assert_eq!(out, "a");
        }
        assert!(!stops.push("s>", &mut out));
        assert_eq!(out, "a<ends>");
        assert!(!stops.push("<en", &mut out));
        stops.flush(&mut out);
        assert_eq!(out, "a<ends><en");
        assert!(stops.push("<end>x", &mut out));
        assert_eq!(out, "a<ends><en");
    }

    #[test]
    fn an_empty_string_is_refused_and_none_stops_nothing() {
        assert!(Stops::new(vec![String::new()]).is_err());
        let mut out = String::new();
        assert!(!Stops::default().push("all of it", &mut out));
        assert_eq!(out, "all of it");
    }
}
