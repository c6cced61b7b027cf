package io.nybl;

/** What the answer is worth to the user who waits for it, and so how much of the device it may take. */
public enum ExecutionPriority {
    /** Somebody reads along: every core. */
    INTERACTIVE,
    /** Half of the cores. */
    BALANCED,
    /** Nobody waits: one thread, the calling one. */
    BACKGROUND;

    int threads() {
        int cores = Runtime.getRuntime().availableProcessors();
        switch (this) {
            case INTERACTIVE:
                return 0;
            case BALANCED:
                return Math.max(1, cores / 2);
            default:
                return 1;
        }
    }
}
