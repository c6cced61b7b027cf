// swift-tools-version:6.0
import PackageDescription

// Builds over a libnybl that is installed where the linker looks, or found by pkg-config; an app's package takes
// an xcframework of the static library as a binary target in place of CNybl.
let package = Package(
    name: "Nybl",
    platforms: [.iOS(.v15), .macOS(.v12)],
    products: [.library(name: "Nybl", targets: ["Nybl"])],
    targets: [
        .systemLibrary(name: "CNybl", pkgConfig: "nybl"),
        .target(name: "Nybl", dependencies: ["CNybl"]),
        .testTarget(name: "NyblTests", dependencies: ["Nybl"]),
    ]
)
