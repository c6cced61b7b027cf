package io.nybl;

import java.util.function.LongConsumer;
import java.util.function.LongFunction;

/**
 * A native handle that cannot be used after it is gone: it is given back when it has been closed and the last
 * call that uses it has returned, so close() never waits and may come from any thread, also from a callback.
 */
final class Handle {
    private final LongConsumer destroy;
    private final String name;
    private long value;
    private int users;
    private boolean closed;

    Handle(String name, long value, LongConsumer destroy) {
        this.name = name;
        this.value = value;
        this.destroy = destroy;
    }

    <T> T with(LongFunction<T> call) {
        enter();
        try {
            return call.apply(value);
        } finally {
            leave();
        }
    }

    /** As with(), for a caller that holds it: it may have been closed in the meantime. */
    <T> T whileHeld(LongFunction<T> call) {
        return call.apply(value);
    }

    /** Keeps it from being given back until let go. */
    void hold() {
        enter();
    }

    void letGo() {
        leave();
    }

    private synchronized void enter() {
        if (closed) {
            throw new IllegalStateException("the " + name + " is closed");
        }
        users++;
    }

    private void leave() {
        long last = 0;
        synchronized (this) {
            if (--users == 0 && closed) {
                last = take();
            }
        }
        if (last != 0) {
            destroy.accept(last);
        }
    }

    void close() {
        long last = 0;
        synchronized (this) {
            closed = true;
            if (users == 0) {
                last = take();
            }
        }
        if (last != 0) {
            destroy.accept(last);
        }
    }

    synchronized boolean isClosed() {
        return closed;
    }

    private long take() {
        long taken = value;
        value = 0;
        return taken;
    }
}
