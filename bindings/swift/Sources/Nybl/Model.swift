import CNybl

/// An opened model. Any task may use it, several at a time.
public final class Model: @unchecked Sendable {
    let handle: OpaquePointer

    public struct Info: Sendable {
        /// Tokens in the vocabulary.
        public let vocab: Int
        /// Tokens the model was trained to see.
        public let context: Int
        /// Bytes that a token costs in the KV cache.
        public let kvTokenBytes: Int
        /// Bytes of weights in the mapping of the file: clean, shared, reclaimable.
        public let mappedBytes: Int
        /// Bytes of weights in private memory.
        public let privateBytes: Int
    }

    /// Opens the .nybl or GGUF file at `path`, to compute on so many threads (0: one on each core).
    public init(path: String, threads: Int = 0) throws {
        var config = nybl_runtime_config()
        config.struct_size = UInt32(MemoryLayout<nybl_runtime_config>.size)
        config.threads = UInt32(clamping: threads)
        var runtime: OpaquePointer?
        try check(nybl_runtime_create(&config, &runtime))
        // The model keeps what it needs of it.
        defer { nybl_runtime_destroy(runtime) }
        var model: OpaquePointer?
        var path = path
        try path.withUTF8 { utf8 in
            try utf8.withMemoryRebound(to: CChar.self) {
                try check(nybl_model_open(runtime, $0.baseAddress, $0.count, &model))
            }
        }
        handle = model!
    }

    deinit { nybl_model_release(handle) }

    public func info() throws -> Info {
        var info = nybl_model_info()
        info.struct_size = UInt32(MemoryLayout<nybl_model_info>.size)
        try check(nybl_model_get_info(handle, &info))
        return Info(
            vocab: Int(info.vocab), context: Int(info.context), kvTokenBytes: Int(info.kv_token_bytes),
            mappedBytes: Int(info.mapped_bytes), privateBytes: Int(info.private_bytes))
    }

    /// The ids of a text, begun as the model wants a sequence to begin if `begins`.
    public func tokenize(_ text: String, begins: Bool = true) throws -> [UInt32] {
        var text = text
        let flags = begins ? UInt32(NYBL_TOKENIZE_ADD_SPECIAL) : 0
        return try text.withUTF8 { utf8 in
            try utf8.withMemoryRebound(to: CChar.self) { bytes in
                // No vocabulary has more tokens for a text than it has bytes, but for one at each end.
                try [UInt32](unsafeUninitializedCapacity: bytes.count + 2) { ids, count in
                    try check(nybl_tokenize(
                        handle, bytes.baseAddress, bytes.count, flags, ids.baseAddress, ids.count, &count))
                }
            }
        }
    }

    /// The text of ids.
    public func detokenize(_ ids: [UInt32]) throws -> String {
        var length = 0
        let status = nybl_detokenize(handle, ids, ids.count, nil, 0, &length)
        if status != NYBL_ERR_BUFFER_TOO_SMALL { try check(status) }
        return try String(unsafeUninitializedCapacity: length) { bytes in
            try bytes.withMemoryRebound(to: CChar.self) {
                try check(nybl_detokenize(handle, ids, ids.count, $0.baseAddress, $0.count, &length))
            }
            return length
        }
    }
}
