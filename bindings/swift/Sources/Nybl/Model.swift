import CNybl

/// An opened model. Any task may use it, several at a time.
public final class Model: @unchecked Sendable {
    let handle: OpaquePointer
    private let runtime: OpaquePointer

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
        var model: OpaquePointer?
        var path = path
        do {
            try path.withUTF8 { utf8 in
                try utf8.withMemoryRebound(to: CChar.self) {
                    try check(nybl_model_open(runtime, $0.baseAddress, $0.count, &model))
                }
            }
        } catch {
            nybl_runtime_destroy(runtime)
            throw error
        }
        handle = model!
        self.runtime = runtime!
    }

    deinit {
        nybl_model_release(handle)
        nybl_runtime_destroy(runtime)
    }

    /// How hot the system says it is: the cases of `ProcessInfo.ThermalState`.
    public enum ThermalState: Int32, Sendable {
        case nominal = 1, fair, serious, critical
    }

    /// Reports heat, whenever it changes and every few seconds while sessions work: drafts become shorter, threads fewer
    /// and rests longer as it gets warmer, and calls throw with the status of a thermal pause when nothing else
    /// helps.
    public func reportHeat(_ state: ThermalState) throws {
        var heat = nybl_heat()
        heat.struct_size = UInt32(MemoryLayout<nybl_heat>.size)
        heat.level = state.rawValue
        try check(nybl_runtime_report_heat(runtime, &heat))
    }

    /// How much of the machine sessions may use.
    public enum PowerMode: Int32, Sendable {
        /// Somebody is waiting for the text.
        case foreground
        /// Nobody is waiting: a quarter of the threads, half the time.
        case background
        /// The battery is low: half the threads, no drafts.
        case low
    }

    public func setPowerMode(_ mode: PowerMode) throws {
        try check(nybl_runtime_set_power_mode(runtime, mode.rawValue))
    }

    /// How badly the system wants memory.
    public enum MemoryPressure: Int32, Sendable {
        /// Cached prompts go.
        case moderate = 1
        /// Keys and values that have a file to go to as well: for a memory warning.
        case high
        /// The pages of weights as well, which are read again when they are used.
        case critical
    }

    /// Gives memory back, waiting for no session; how many bytes it was, at most.
    @discardableResult
    public func relieve(_ pressure: MemoryPressure) throws -> Int {
        var freed = nybl_freed()
        freed.struct_size = UInt32(MemoryLayout<nybl_freed>.size)
        try check(nybl_runtime_relieve(runtime, pressure.rawValue, &freed))
        return Int(freed.prefix_bytes + freed.spilled_bytes + freed.page_bytes)
    }

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
