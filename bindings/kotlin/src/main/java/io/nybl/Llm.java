package io.nybl;

/** An opened model. Any thread may use it. Close it when no more sessions are wanted; those there are go on. */
public final class Llm implements AutoCloseable {
    private final LlmConfig config;
    private final Handle model;

    private Llm(LlmConfig config, Handle model) {
        this.config = config;
        this.model = model;
    }

    /** Opens the model; blocks while its file is read. */
    public static Llm open(LlmConfig config) {
        long runtime = Native.runtimeCreate(config.threads, config.instructionSet);
        try {
            long model = Native.modelOpen(runtime, config.modelPath);
            return new Llm(config, new Handle("model", model, Native::modelRelease));
        } finally {
            // The model keeps what it needs of it.
            Native.runtimeDestroy(runtime);
        }
    }

    /** The version of the library. */
    public static String version() {
        return Native.version();
    }

    /** Tokens that the model was trained to see. */
    public int contextLength() {
        return model.with(Native::modelContext);
    }

    /** The ids of a text, begun as the model wants a sequence to begin if `begins`. */
    public int[] tokenize(String text, boolean begins) {
        return model.with(m -> tokenize(m, text, begins));
    }

    /** For a session, which keeps the model open. */
    int[] tokenizeForSession(String text, boolean begins) {
        return model.whileHeld(m -> tokenize(m, text, begins));
    }

    private static int[] tokenize(long model, String text, boolean begins) {
        return Native.tokenize(model, text, begins ? Native.TOKENIZE_ADD_SPECIAL : 0);
    }

    /** The text of ids. */
    public String detokenize(int[] ids) {
        return model.with(m -> Native.detokenize(m, ids));
    }

    /** A new, empty sequence. */
    public Session newSession() {
        LlmConfig c = config;
        model.hold();
        try {
            long session = model.whileHeld(m -> Native.sessionCreate(
                    m, c.contextWindow, c.temperature, c.topK, c.topP, c.minP, c.seed));
            return new Session(this, new Handle("session", session, s -> {
                Native.sessionDestroy(s);
                model.letGo();
            }));
        } catch (RuntimeException refused) {
            model.letGo();
            throw refused;
        }
    }

    @Override
    public void close() {
        model.close();
    }
}
