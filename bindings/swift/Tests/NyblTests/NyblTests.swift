import Foundation
import XCTest

@testable import Nybl

private func story(_ session: Session, _ most: Int) async throws -> String {
    var story = ""
    for try await text in session.generate("Once upon a time", maxTokens: most) { story += text }
    return story
}

/// Against a real library; NYBL_MODEL names the model.
final class NyblTests: XCTestCase {
    private func model() throws -> Model {
        let path = try XCTUnwrap(ProcessInfo.processInfo.environment["NYBL_MODEL"], "NYBL_MODEL is not set")
        return try Model(path: path, threads: 2)
    }

    func testAStreamTellsAStory() async throws {
        let session = try Session(model())
        let whole = try await story(session, 40)
        XCTAssertGreaterThan(whole.count, 50)
        try session.reset()
        let again = try await story(session, 40)
        XCTAssertEqual(whole, again)
        try session.reset()
        try session.append("Once upon a time")
        var pulled = ""
        for _ in 0..<40 { pulled += try XCTUnwrap(session.next()) }
        XCTAssertEqual(whole, pulled)
    }

    func testTextAndTokens() throws {
        let model = try model()
        let ids = try model.tokenize("Once upon a time")
        XCTAssertEqual(try model.detokenize(ids), "Once upon a time")
        XCTAssertGreaterThan(try model.info().vocab, 100)
    }

    func testTheDeviceIsFollowed() async throws {
        let model = try model()
        let session = try Session(model)
        let whole = try await story(session, 40)
        try session.reset()
        try model.reportHeat(.critical)
        XCTAssertThrowsError(try session.append("Once")) { error in
            XCTAssertTrue("\(error)".contains("NYBL_ERR_THERMAL_PAUSE"), "\(error)")
        }
        try model.reportHeat(.nominal)
        try model.setPowerMode(.background)
        XCTAssertGreaterThan(try model.relieve(.critical), 100_000)
        let again = try await story(session, 40)
        XCTAssertEqual(whole, again)
    }

    func testLogitsAreBorrowed() throws {
        let model = try model()
        let session = try Session(model)
        try session.append("Once")
        let (count, finite) = try session.withLogits { ($0.count, $0.allSatisfy(\.isFinite)) }
        XCTAssertEqual(count, try model.info().vocab)
        XCTAssertTrue(finite)
    }

    func testFailuresHaveWords() throws {
        XCTAssertThrowsError(try Model(path: "/nowhere")) { error in
            XCTAssertTrue("\(error)".contains("NYBL_ERR_IO") && "\(error)".contains("/nowhere"), "\(error)")
        }
        let session = try Session(model(), context: 4)
        XCTAssertThrowsError(try session.append("far too long for so small a context")) { error in
            XCTAssertTrue((error as? NyblError)?.isContextFull == true, "\(error)")
        }
    }

    func testReadersMayLeave() async throws {
        let model = try model()
        for round in 0..<50 {
            let session = try Session(model)
            let reader = Task { try await story(session, 0) }
            if round % 2 == 0 { try await Task.sleep(nanoseconds: UInt64(round) * 100_000) }
            reader.cancel()
            _ = try? await reader.value
            var texts = 0
            for try await _ in session.generate(" and", maxTokens: 10) {
                texts += 1
                if texts == 2 { break }
            }
        }
    }
}
