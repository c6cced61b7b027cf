package io.nybl;

import java.nio.ByteBuffer;

/** The functions of the C interface, one to one. A failure is a {@link NyblException}. */
final class Native {
    static final int EVENT_TOKEN = 1;
    static final int EVENT_END = 2;
    static final int TOKENIZE_ADD_SPECIAL = 1;
    // Constants, so that an enum may use them before the library is loaded.
    static final int POWER_FOREGROUND = 0;
    static final int POWER_BACKGROUND = 1;
    static final int POWER_LOW = 2;
    static final int PRESSURE_MODERATE = 1;
    static final int PRESSURE_HIGH = 2;
    static final int PRESSURE_CRITICAL = 3;

    static {
        // A test or a desktop program may name the file; an app has it in its libraries.
        String path = System.getProperty("io.nybl.library");
        if (path != null) {
            System.load(path);
        } else {
            System.loadLibrary("nybl");
        }
    }

    private Native() {}

    static native String version();

    static native long runtimeCreate(int threads, String isa);

    static native void runtimeDestroy(long runtime);

    static native void runtimeReportHeat(long runtime, int level, float headroom, float celsius);

    static native void runtimeSetPowerMode(long runtime, int mode);

    static native long runtimeRelieve(long runtime, int pressure);

    static native long modelOpen(long runtime, String path);

    static native void modelRelease(long model);

    static native int modelContext(long model);

    static native int[] tokenize(long model, String text, int flags);

    static native String detokenize(long model, int[] ids);

    static native long sessionCreate(
            long model, int context, float temperature, int topK, float topP, float minP, long seed);

    static native void sessionDestroy(long session);

    static native void sessionAppend(long session, int[] ids);

    static native String sessionNext(long session, int[] event);

    static native void sessionTruncate(long session, int count);

    static native void sessionReset(long session);

    static native ByteBuffer sessionLogits(long session);
}
