import CNybl
import Dispatch

/// How tokens are chosen; the default is always the likeliest one.
public struct Sampling: Sendable {
    public var temperature: Float = 0
    public var topK = 0
    public var topP: Float = 0
    public var minP: Float = 0
    /// The same seed gives the same text on every device.
    public var seed: UInt64 = 0

    public init() {}
}

/// One sequence of tokens on a model. Calls from several tasks take turns.
public final class Session: @unchecked Sendable {
    public let model: Model
    private let handle: OpaquePointer
    /// Computing blocks its thread, so it has one that is not of Swift's own pool.
    private let queue = DispatchQueue(label: "nybl.session", qos: .userInitiated)
    private var begun = false

    /// An empty session that can hold so many tokens (0: as many as the model was trained for).
    public init(_ model: Model, context: Int = 0, sampling: Sampling = Sampling()) throws {
        var config = nybl_session_config()
        config.struct_size = UInt32(MemoryLayout<nybl_session_config>.size)
        config.context = UInt32(clamping: context)
        config.temperature = sampling.temperature
        config.top_k = UInt32(clamping: sampling.topK)
        config.top_p = sampling.topP
        config.min_p = sampling.minP
        config.seed = sampling.seed
        var session: OpaquePointer?
        try check(nybl_session_create(model.handle, &config, &session))
        self.model = model
        handle = session!
    }

    deinit { nybl_session_destroy(handle) }

    /// Adds a prompt to the sequence.
    public func append(_ prompt: String) throws {
        try queue.sync { try add(prompt) }
    }

    /// Adds a prompt, and gives what follows it as it comes, at most so many tokens (0: no limit). It computes ahead
    /// of whoever reads by what the stream buffers; to stop reading, or to cancel the task that does, stops it after
    /// the token it is at.
    public func generate(_ prompt: String, maxTokens: Int = 0) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let cancelled = Flag()
            continuation.onTermination = { _ in cancelled.set() }
            queue.async { [self] in
                do {
                    if cancelled.isSet { return continuation.finish() }
                    try add(prompt)
                    var made = 0
                    while !cancelled.isSet, maxTokens == 0 || made < maxTokens, let text = try step() {
                        made += 1
                        if !text.isEmpty { continuation.yield(text) }
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
        }
    }

    /// The text that the next token completes, perhaps none; nil when the text or the context has ended.
    public func next() throws -> String? {
        try queue.sync { try step() }
    }

    /// The logits after the last token, where they lie: `body` must not keep the buffer.
    public func withLogits<R>(_ body: (UnsafeBufferPointer<Float>) throws -> R) throws -> R {
        try queue.sync {
            var logits: UnsafePointer<Float>?
            var count = 0
            try check(nybl_session_get_logits(handle, &logits, &count))
            return try body(UnsafeBufferPointer(start: logits, count: count))
        }
    }

    /// Keeps the first so many tokens.
    public func truncate(_ count: Int) throws {
        try queue.sync {
            try check(nybl_session_truncate(handle, count))
            begun = count > 0
        }
    }

    /// Forgets all tokens.
    public func reset() throws {
        try queue.sync {
            try check(nybl_session_reset(handle))
            begun = false
        }
    }

    // What runs on the queue.

    private func add(_ prompt: String) throws {
        let ids = try model.tokenize(prompt, begins: !begun)
        try check(nybl_session_append(handle, ids, ids.count))
        begun = true
    }

    private func step() throws -> String? {
        var event = nybl_event()
        event.struct_size = UInt32(MemoryLayout<nybl_event>.size)
        try check(nybl_session_next(handle, &event))
        let bytes = UnsafeRawBufferPointer(start: event.text, count: event.text_len)
        let text = String(decoding: bytes, as: UTF8.self)
        return event.kind == NYBL_EVENT_TOKEN || !text.isEmpty ? text : nil
    }
}

/// Set once, by whoever stops reading; read by the session's thread.
private final class Flag: @unchecked Sendable {
    private let queue = DispatchQueue(label: "nybl.flag")
    private var value = false
    var isSet: Bool { queue.sync { value } }
    func set() { queue.sync { value = true } }
}
