//! What a runtime tells its host: a function of the host's, one for each runtime and none for the process.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

/// How much a message matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something went wrong that no call reports.
    Error,
    /// Something is not as it should be, and work goes on.
    Warn,
    /// What was opened, and what changed.
    Info,
    /// Details for whoever looks for a fault.
    Debug,
}

/// Where messages go: nowhere, unless a host says so.
#[derive(Clone, Default)]
pub struct Log(Option<(Level, Arc<Sink>)>);

type Sink = dyn Fn(Level, &str) + Send + Sync;

impl Log {
    /// Messages up to `most` go to `sink`, on whichever thread has something to say. It must not call the
    /// runtime.
    pub fn to(most: Level, sink: impl Fn(Level, &str) + Send + Sync + 'static) -> Self {
        Self(Some((most, Arc::new(sink))))
    }

    /// Says what `message` makes, if anybody listens.
    pub fn say(&self, level: Level, message: impl FnOnce() -> String) {
        if let Some((most, sink)) = &self.0
            && level <= *most
        {
            sink(level, &message());
        }
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Log").field(&self.0.as_ref().map(|(most, _)| most)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn messages_beyond_the_level_are_not_even_made() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ears = Arc::clone(&heard);
        let log = Log::to(Level::Info, move |level, text| {
            ears.lock().unwrap().push((level, text.to_owned()));
        });
        log.say(Level::Warn, || "hot".into());
        log.say(Level::Debug, || unreachable!("nobody asked"));
        Log::default().say(Level::Error, || unreachable!("nobody listens"));
        assert_eq!(*heard.lock().unwrap(), [(Level::Warn, "hot".to_owned())]);
    }
}
