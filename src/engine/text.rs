//! A session whose tokens come with their text, and whose text may end at a string.
//!
//! What streams to a reader is whole characters, and nothing of a stop string, however tokens cut them.
#![forbid(unsafe_code)]

use super::session::Next;
use super::speculate::Speculator;
use crate::error::Result;
use crate::text::stop::Stops;
use crate::text::tokenizer::Detokenizer;
use std::sync::Arc;

/// A session with the text of what it generates.
pub struct TextSession {
    session: Speculator,
    /// Made when the first token is generated after tokens that came from the caller.
    stream: Option<Detokenizer>,
    stops: Stops,
    text: String,
}

/// What a call of [`TextSession::next`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A token, which now belongs to the sequence.
    Token(u32),
    /// The same, and with it a stop string is complete.
    Stop(u32),
    /// The model ended its text with this token, which does not belong to the sequence.
    End(u32),
    /// The context is full.
    ContextFull,
}

impl TextSession {
    /// Text for `session`. Without a tokenizer in its model every text is empty.
    #[must_use]
    pub fn new(session: Speculator) -> Self {
        Self { session, stream: None, stops: Stops::default(), text: String::new() }
    }

    /// The session, to look at and to speculate with. What is added to it, taken from it or made in it directly
    /// needs [`TextSession::restart`].
    pub fn session(&mut self) -> &mut Speculator {
        &mut self.session
    }

    /// The session, to look at.
    #[must_use]
    pub fn as_session(&self) -> &Speculator {
        &self.session
    }

    /// These strings end a text from now on, instead of those before.
    ///
    /// # Errors
    /// [`crate::Error::InvalidArgument`] for an empty one; nothing has changed then.
    pub fn stop_at(&mut self, strings: Vec<String>) -> Result<()> {
        self.stops = Stops::new(strings)?;
        Ok(())
    }

    /// The next text begins with the next token. What was held back of the last one is gone.
    pub fn restart(&mut self) {
        self.stream = None;
        self.stops.restart();
    }

    /// As [`Speculator::append`]. The text of what the caller adds is the caller's: the stream begins after
    /// it.
    ///
    /// # Errors
    /// As [`Speculator::append`].
    pub fn append(&mut self, tokens: &[u32]) -> Result<()> {
        self.session.append(tokens)?;
        self.restart();
        Ok(())
    }

    /// As [`Speculator::truncate`].
    pub fn truncate(&mut self, len: usize) {
        self.session.truncate(len);
        self.restart();
    }

    /// As [`Speculator::reset`].
    pub fn reset(&mut self) {
        self.session.reset();
        self.restart();
    }

    /// A second session with the same tokens and settings, whose text goes on as that of this one, without the drafter
    /// and the smaller model.
    ///
    /// # Errors
    /// As [`Speculator::fork`].
    pub fn fork(&mut self) -> Result<Self> {
        let session = self.session.fork()?;
        let (stream, stops) = (self.stream.clone(), self.stops.clone());
        Ok(Self { session, stream, stops, text: String::new() })
    }

    /// The next token and the text that became certain with it, possibly none. What could begin a stop string
    /// is held back and comes with a later event, at the latest with the one that ends the text. After
    /// [`Event::Stop`] the sequence ends with the token that completed the string, also with
    /// speculation, and the next call goes on behind it.
    ///
    /// # Errors
    /// As [`Speculator::next`].
    #[expect(clippy::should_implement_trait, reason = "fallible, and named so in the C interface")]
    pub fn next(&mut self) -> Result<(Event, &str)> {
        let Self { session, stream, stops, text } = self;
        text.clear();
        let model = Arc::clone(session.model());
        let tokenizer = model.tokenizer().ok();
        if let (None, Some(tokenizer)) = (&stream, tokenizer) {
            *stream = Some(tokenizer.stream_after(session.tokens())?);
        }
        let mut event = match session.next()? {
            Next::Token(id) => Event::Token(id),
            Next::End(id) => Event::End(id),
            Next::ContextFull => Event::ContextFull,
        };
        if let (Some(mut open), Some(tokenizer)) = (stream.take(), tokenizer) {
            if let Event::Token(id) = event {
                if stops.push(&open.push(tokenizer, id)?, text) {
                    event = Event::Stop(id);
                }
                *stream = Some(open);
            } else if !stops.push(&open.finish(tokenizer)?, text) {
                stops.flush(text);
            }
        }
        Ok((event, text))
    }
}
