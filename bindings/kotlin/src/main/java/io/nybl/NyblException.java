package io.nybl;

/** A call of the library failed. */
public final class NyblException extends RuntimeException {
    private static final long serialVersionUID = 1;

    /** An argument is outside what the function documents. */
    public static final int INVALID_ARGUMENT = 0x0101;
    /** The system refused memory. */
    public static final int OUT_OF_MEMORY = 0x0201;
    /** The system refused to open, read or map a file. */
    public static final int IO = 0x0202;
    /** A file contradicts its own format. */
    public static final int CORRUPT = 0x0301;
    /** The session holds as many tokens as its context allows. */
    public static final int CONTEXT_FULL = 0x0401;
    /** Another thread is inside a call on this session. */
    public static final int BUSY = 0x0403;
    /** The device is too hot to go on; nothing has changed. Try again after another report. */
    public static final int THERMAL_PAUSE = 0x0405;

    private final int status;

    NyblException(int status, String message) {
        super(message);
        this.status = status;
    }

    /** The status of the C interface, NYBL_ERR_*; its second byte is its class. */
    public int status() {
        return status;
    }
}
