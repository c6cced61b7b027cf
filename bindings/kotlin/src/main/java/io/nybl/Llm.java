package io.nybl;

/** An opened model. Any thread may use it. Close it when no more sessions are wanted; those there are go on. */
public final class Llm implements AutoCloseable {
    private final LlmConfig config;
    private final Handle model;
    private final Handle runtime;

    private Llm(LlmConfig config, Handle model, Handle runtime) {
        this.config = config;
        this.model = model;
        this.runtime = runtime;
    }

    /** Opens the model; blocks while its file is read. */
    public static Llm open(LlmConfig config) {
        long runtime = Native.runtimeCreate(config.threads, config.instructionSet);
        try {
            long model = Native.modelOpen(runtime, config.modelPath);
            return new Llm(
                    config,
                    new Handle("model", model, Native::modelRelease),
                    new Handle("model", runtime, Native::runtimeDestroy));
        } catch (RuntimeException refused) {
            Native.runtimeDestroy(runtime);
            throw refused;
        }
    }

    /**
     * Reports heat, every few seconds while sessions work: drafts become shorter, threads fewer and rests longer as it
     * gets warmer, and a call throws with the status THERMAL_PAUSE when nothing else helps. On Android:
     * {@code PowerManager.getCurrentThermalStatus()} or what its listener tells, or -1 where that is not known, and
     * {@code getThermalHeadroom(10)}, or NaN.
     */
    public void reportHeat(int thermalStatus, float headroom) {
        // NONE, LIGHT and MODERATE; from SEVERE on nothing should run.
        int level = thermalStatus < 0 ? 0 : Math.min(thermalStatus, 3) + 1;
        float known = Float.isNaN(headroom) ? 0 : headroom;
        runtime.with(r -> {
            Native.runtimeReportHeat(r, level, known, 0);
            return null;
        });
    }

    /** How much of the machine sessions may use from now on, of the threads that the configuration gave them. */
    public void setPriority(ExecutionPriority priority) {
        runtime.with(r -> {
            Native.runtimeSetPowerMode(r, priority.powerMode);
            return null;
        });
    }

    /**
     * Gives memory back and returns how many bytes it was, at most: for {@code ComponentCallbacks2.onTrimMemory(level)}.
     * Cached prompts go at every level; keys and values that have a file to go to when the app is in the background; the
     * pages of weights, which are read again when they are used, when it is next to be ended.
     */
    public long trimMemory(int level) {
        // TRIM_MEMORY_BACKGROUND is 40 and TRIM_MEMORY_COMPLETE 80; TRIM_MEMORY_RUNNING_CRITICAL is 15.
        int pressure = level >= 80 || level == 15
                ? Native.PRESSURE_CRITICAL
                : level >= 40 || level == 10 ? Native.PRESSURE_HIGH : Native.PRESSURE_MODERATE;
        return runtime.with(r -> Native.runtimeRelieve(r, pressure));
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
        runtime.close();
    }
}
