package io.nybl;

import java.nio.ByteOrder;
import java.nio.FloatBuffer;

/**
 * One sequence of tokens. One thread at a time, but for {@link #cancel()} and {@link #close()}, which any thread may
 * call at any time.
 */
public final class Session implements AutoCloseable {
    /** Receives text as it comes, on the thread that called. */
    public interface Callback {
        /** More text, whole characters. Returns whether to go on. */
        boolean onText(String text);
    }

    /** Why generating came to an end. */
    public enum End {
        /** The model ended its text. */
        COMPLETE,
        /** The context is full, or as many tokens were made as were asked for. */
        LIMIT,
        /** {@link #cancel()}, {@link #close()} or the callback ended it. */
        CANCELLED
    }

    private final Llm llm;
    private final Handle session;
    private volatile boolean cancelled;
    private boolean begun;
    /** Of the last event; that of a token while there may be more. */
    private int kind = Native.EVENT_TOKEN;

    Session(Llm llm, Handle session) {
        this.llm = llm;
        this.session = session;
    }

    /** Adds a prompt to the sequence. */
    public void append(String prompt) {
        session.with(s -> {
            Native.sessionAppend(s, llm.tokenizeForSession(prompt, !begun));
            return null;
        });
        begun = true;
        kind = Native.EVENT_TOKEN;
    }

    /** The text that the next token completes, perhaps none; null when the text or the context has ended. */
    public String next() {
        return session.with(s -> {
            if (kind != Native.EVENT_TOKEN) {
                return null;
            }
            int[] event = new int[2];
            String text = Native.sessionNext(s, event);
            kind = event[0];
            return kind == Native.EVENT_TOKEN || !text.isEmpty() ? text : null;
        });
    }

    /** Adds a prompt and passes on what follows it, up to so many tokens (0: no limit). */
    public End generate(String prompt, int maxTokens, Callback callback) {
        cancelled = false;
        append(prompt);
        for (int made = 0; maxTokens == 0 || made < maxTokens; made++) {
            if (isCancelled()) {
                return End.CANCELLED;
            }
            String text;
            try {
                text = next();
            } catch (IllegalStateException closed) {
                return End.CANCELLED;
            }
            if (text != null && !text.isEmpty() && !callback.onText(text)) {
                return End.CANCELLED;
            }
            if (kind != Native.EVENT_TOKEN) {
                return kind == Native.EVENT_END ? End.COMPLETE : End.LIMIT;
            }
        }
        return End.LIMIT;
    }

    /** As above, without a limit. */
    public End generate(String prompt, Callback callback) {
        return generate(prompt, 0, callback);
    }

    /** Ends a generation that is in progress, after the token it is at. */
    public void cancel() {
        cancelled = true;
    }

    boolean isCancelled() {
        return cancelled || session.isClosed();
    }

    /** Keeps the first so many tokens. */
    public void truncate(int tokens) {
        session.with(s -> {
            Native.sessionTruncate(s, tokens);
            return null;
        });
        begun = tokens > 0;
        kind = Native.EVENT_TOKEN;
    }

    /** Forgets all tokens. */
    public void reset() {
        session.with(s -> {
            Native.sessionReset(s);
            return null;
        });
        begun = false;
        kind = Native.EVENT_TOKEN;
    }

    /**
     * The logits after the last token, where they lie: not a copy, and not to be touched after the next call on
     * this session or its close().
     */
    public FloatBuffer logits() {
        return session.with(s ->
                Native.sessionLogits(s).order(ByteOrder.nativeOrder()).asFloatBuffer().asReadOnlyBuffer());
    }

    @Override
    public void close() {
        session.close();
    }
}
