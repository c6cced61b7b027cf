package io.nybl;

/** What the answer is worth to the user who waits for it, and so how much of the device it may take. */
public enum ExecutionPriority {
    /** Somebody reads along: every core. */
    INTERACTIVE(Native.POWER_FOREGROUND),
    /** Half of the cores. */
    BALANCED(Native.POWER_LOW),
    /** Nobody waits: one thread, the calling one. */
    BACKGROUND(Native.POWER_BACKGROUND);

    final int powerMode;

    ExecutionPriority(int powerMode) {
        this.powerMode = powerMode;
    }

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
