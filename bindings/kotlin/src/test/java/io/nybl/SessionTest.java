package io.nybl;

import java.nio.FloatBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.atomic.AtomicInteger;

/** What the package promises, against a real library and model: SessionTest MODEL. */
public final class SessionTest {
    private static final String PROMPT = "Once upon a time";

    private static void expect(boolean holds, String what) {
        if (!holds) {
            throw new AssertionError(what);
        }
    }

    private static NyblException refused(Runnable call) {
        try {
            call.run();
        } catch (NyblException refused) {
            return refused;
        }
        throw new AssertionError("the call was not refused");
    }

    private static LlmConfig.Builder config(String path) {
        return new LlmConfig.Builder()
                .setModelPath(path)
                .setExecutionPriority(ExecutionPriority.BALANCED)
                .setContextWindow(200);
    }

    private static String story(Session session, int tokens) {
        StringBuilder story = new StringBuilder();
        session.generate(PROMPT, tokens, text -> {
            story.append(text);
            return true;
        });
        return story.toString();
    }

    private static void generates(Llm llm) {
        try (Session session = llm.newSession()) {
            String whole = story(session, 40);
            expect(whole.length() > 50, whole);
            session.reset();
            expect(whole.equals(story(session, 40)), "another text after reset()");
            session.reset();
            // Pulled one by one, the same.
            StringBuilder pulled = new StringBuilder();
            session.append(PROMPT);
            for (int i = 0; i < 40; i++) {
                pulled.append(session.next());
            }
            expect(whole.contentEquals(pulled), pulled.toString());
            FloatBuffer logits = session.logits();
            expect(logits.isDirect() && logits.remaining() > 100 && !Float.isNaN(logits.get(0)), "logits");
            String text;
            int more = 0;
            while ((text = session.next()) != null) {
                more += text.length();
            }
            expect(more > 0 && session.next() == null, "the text has an end, and stays there");
        }
        int[] ids = llm.tokenize(PROMPT, true);
        expect(llm.detokenize(ids).equals(PROMPT), llm.detokenize(ids));
        expect(llm.contextLength() > 200, "context");
    }

    private static void refuses(Llm llm) {
        expect(refused(() -> Llm.open(config("/nowhere").build())).status() == NyblException.IO, "IO");
        expect(refused(() -> Llm.open(config("/nowhere").build())).getMessage().contains("/nowhere"), "where");
        LlmConfig strange = config("/nowhere").setInstructionSet("mmx").build();
        expect(refused(() -> Llm.open(strange)).status() == NyblException.INVALID_ARGUMENT, "isa");
        try (Session session = llm.newSession()) {
            expect(refused(session::next).status() == NyblException.INVALID_ARGUMENT, "an empty session");
            String endless = "word ".repeat(1000);
            expect(refused(() -> session.append(endless)).status() == NyblException.CONTEXT_FULL, "full");
            session.close();
            session.close();
            try {
                session.append("more");
                throw new AssertionError("a closed session was used");
            } catch (IllegalStateException expected) {
                expect(expected.getMessage().contains("closed"), expected.getMessage());
            }
        }
        // The callback may cancel, close, and throw.
        try (Session session = llm.newSession()) {
            expect(session.generate(PROMPT, t -> { session.cancel(); return true; }) == Session.End.CANCELLED, "cancel");
            try {
                session.generate(PROMPT, t -> { throw new IllegalArgumentException("mine"); });
                throw new AssertionError("the exception is lost");
            } catch (IllegalArgumentException mine) {
                expect(mine.getMessage().equals("mine"), "mine");
            }
            expect(session.generate(PROMPT, t -> { session.close(); return true; }) == Session.End.CANCELLED, "close");
        }
    }

    private static void followsTheDevice(Llm llm) {
        try (Session session = llm.newSession()) {
            String whole = story(session, 40);
            session.reset();
            // THERMAL_STATUS_EMERGENCY, and then THERMAL_STATUS_NONE.
            llm.reportHeat(5, Float.NaN);
            expect(refused(() -> story(session, 40)).status() == NyblException.THERMAL_PAUSE, "heat");
            llm.reportHeat(0, 0.5f);
            llm.setPriority(ExecutionPriority.BACKGROUND);
            llm.reportHeat(-1, Float.NaN);
            expect(whole.equals(story(session, 40)), "another text in the background");
            llm.setPriority(ExecutionPriority.BALANCED);
            expect(llm.trimMemory(80) > 100_000, "the pages of the weights");
            session.reset();
            expect(whole.equals(story(session, 40)), "another text after pressure");
        }
    }

    private static long resident() throws Exception {
        for (String line : Files.readAllLines(Path.of("/proc/self/status"))) {
            if (line.startsWith("VmRSS:")) {
                return Long.parseLong(line.replaceAll("[^0-9]", ""));
            }
        }
        return 0;
    }

    /** Sessions that are begun, and cancelled or closed by another thread a moment later. */
    private static void startsAndCancels(Llm llm, int cycles) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(16);
        AtomicInteger ended = new AtomicInteger();
        List<Future<?>> all = new ArrayList<>();
        for (int i = 0; i < cycles; i++) {
            boolean close = i % 2 == 0;
            all.add(pool.submit((Callable<Void>) () -> {
                Session session = llm.newSession();
                Future<?> other = pool.submit((Callable<Void>) () -> {
                    Thread.sleep(ThreadLocalRandom.current().nextInt(5));
                    if (close) {
                        session.close();
                    } else {
                        session.cancel();
                    }
                    return null;
                });
                try {
                    session.generate(PROMPT, text -> true);
                } catch (IllegalStateException closedBeforeItBegan) {
                    expect(close, "only close() ends a session for good");
                }
                session.close();
                ended.incrementAndGet();
                return null;
            }));
        }
        for (Future<?> one : all) {
            one.get();
        }
        pool.shutdown();
        expect(ended.get() == cycles, ended + " cycles");
    }

    public static void main(String[] arguments) throws Exception {
        Llm llm = Llm.open(config(arguments[0]).build());
        generates(llm);
        refuses(llm);
        followsTheDevice(llm);
        startsAndCancels(llm, 200);
        System.gc();
        long before = resident();
        startsAndCancels(llm, 200);
        System.gc();
        long grown = resident() - before;
        // A session holds more than a megabyte: had each been kept, this would be hundreds.
        expect(grown < 40_000, "400 cycles: " + grown + " kB more are resident after the last 200");
        Session last = llm.newSession();
        llm.close();
        expect(!story(last, 10).isEmpty(), "a session outlives its model's handle");
        last.close();
        System.out.println("JVM " + System.getProperty("java.version") + ", nybl " + Llm.version()
                + ": all as documented; " + grown + " kB after 200 cycles");
    }
}
