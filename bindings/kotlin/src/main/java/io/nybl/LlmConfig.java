package io.nybl;

import java.util.Objects;

/** Which model, and how it runs. */
public final class LlmConfig {
    final String modelPath;
    final String instructionSet;
    final int threads;
    final int contextWindow;
    final float temperature;
    final int topK;
    final float topP;
    final float minP;
    final long seed;

    private LlmConfig(Builder builder) {
        modelPath = Objects.requireNonNull(builder.modelPath, "setModelPath() was not called");
        instructionSet = builder.instructionSet;
        threads = builder.threads > 0 ? builder.threads : builder.priority.threads();
        contextWindow = builder.contextWindow;
        temperature = builder.temperature;
        topK = builder.topK;
        topP = builder.topP;
        minP = builder.minP;
        seed = builder.seed;
    }

    /** Sets what differs from the defaults: all the cores, the model's own context, the likeliest token. */
    public static final class Builder {
        private String modelPath;
        private String instructionSet;
        private ExecutionPriority priority = ExecutionPriority.INTERACTIVE;
        private int threads;
        private int contextWindow;
        private float temperature;
        private int topK;
        private float topP;
        private float minP;
        private long seed;

        /** The .nybl or GGUF file. */
        public Builder setModelPath(String path) {
            modelPath = path;
            return this;
        }

        /** How much of the device the model may take. */
        public Builder setExecutionPriority(ExecutionPriority value) {
            priority = Objects.requireNonNull(value);
            return this;
        }

        /** Tokens a session can hold; 0 for as many as the model was trained for. */
        public Builder setContextWindow(int tokens) {
            contextWindow = notNegative("context window", tokens);
            return this;
        }

        /** Threads to compute with, instead of what the priority says. */
        public Builder setThreads(int count) {
            threads = notNegative("threads", count);
            return this;
        }

        /** The strongest instruction set to use, such as "dotprod"; null for all the CPU has. */
        public Builder setInstructionSet(String name) {
            instructionSet = name;
            return this;
        }

        /** Divides the logits before sampling; 0 always takes the likeliest token. */
        public Builder setTemperature(float value) {
            temperature = value;
            return this;
        }

        /** Keep the likeliest tokens, so many; 0 keeps all. */
        public Builder setTopK(int count) {
            topK = notNegative("top-k", count);
            return this;
        }

        /** Keep the likeliest tokens that together reach this probability; 0 keeps all. */
        public Builder setTopP(float probability) {
            topP = probability;
            return this;
        }

        /** Keep tokens at least this much as probable as the likeliest; 0 keeps all. */
        public Builder setMinP(float ratio) {
            minP = ratio;
            return this;
        }

        /** Where the random numbers start: the same seed gives the same text on every device. */
        public Builder setSeed(long value) {
            seed = value;
            return this;
        }

        /** The configuration. */
        public LlmConfig build() {
            return new LlmConfig(this);
        }

        private static int notNegative(String what, int value) {
            if (value < 0) {
                throw new IllegalArgumentException(what + ": " + value);
            }
            return value;
        }
    }
}
