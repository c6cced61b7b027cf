import CNybl

/// A call of the library failed.
public struct NyblError: Error, CustomStringConvertible, Sendable {
    /// NYBL_ERR_*; its second byte is its class.
    public let status: Int32
    /// What nybl_last_error() says.
    public let message: String

    public var description: String { "\(String(cString: nybl_status_name(status))): \(message)" }

    /// Whether the system or a file is at fault, the caller, or the state of a session.
    public var isContextFull: Bool { status == NYBL_ERR_CONTEXT_FULL }
    public var isBusy: Bool { status == NYBL_ERR_BUSY }

    init(_ status: nybl_status) {
        self.status = status
        let length = nybl_last_error(nil, 0)
        message = String(unsafeUninitializedCapacity: length + 1) { bytes in
            bytes.withMemoryRebound(to: CChar.self) { nybl_last_error($0.baseAddress, $0.count) }
        }
    }
}

func check(_ status: nybl_status) throws {
    if status != NYBL_OK { throw NyblError(status) }
}
