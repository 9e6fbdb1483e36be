// swift-tools-version: 6.2
// targetd: a SCSI target for virtual machines. What each target may import is checked by Tests/TidyTests.

import PackageDescription

/// Every Swift target: strict memory safety, no warning tolerated, the upcoming language defaults.
let settings: [SwiftSetting] = [
    .strictMemorySafety(),
    .treatAllWarnings(as: .error),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableUpcomingFeature("NonisolatedNonsendingByDefault"),
]

let package = Package(
    name: "targetd",
    products: [
        .library(name: "SCSICore", targets: ["SCSICore"]),
        .library(name: "Reactor", targets: ["Reactor"]),
        .library(name: "Backstores", targets: ["Backstores"]),
        .library(name: "VirtioFront", targets: ["VirtioFront"]),
        .library(name: "XenFront", targets: ["XenFront"]),
        .executable(name: "targetd", targets: ["targetd"]),
        .executable(name: "targetctl", targets: ["targetctl"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
        .package(url: "https://github.com/apple/swift-nio", from: "2.101.2"),
        .package(url: "https://github.com/jpsim/Yams", from: "6.2.2"),
        .package(url: "https://github.com/swift-server/swift-service-lifecycle", from: "2.13.0"),
    ],
    targets: [
        // The two seams, and what Swift cannot import: headers only.
        .systemLibrary(name: "CIOVector"),
        .systemLibrary(name: "CBackstore"),
        .systemLibrary(name: "CTarget"),
        .systemLibrary(name: "CLinux"),
        .target(name: "CMemoryGuard"),

        .target(
            name: "SCSICore", dependencies: ["CBackstore", "CTarget", "CIOVector"], exclude: ["README.md"],
            swiftSettings: settings),
        .target(name: "Reactor", dependencies: ["CLinux", "CIOVector"], swiftSettings: settings),
        .target(
            name: "Backstores", dependencies: ["SCSICore", "Reactor", "CBackstore", "CLinux", "CIOVector"],
            swiftSettings: settings),
        .target(
            name: "VirtioFront",
            dependencies: ["SCSICore", "Reactor", "CTarget", "CLinux", "CIOVector", "CMemoryGuard"],
            swiftSettings: settings),
        // What the control API says, for both of its ends.
        .target(name: "ControlAPI", swiftSettings: settings),
        .executableTarget(
            name: "targetctl",
            dependencies: [
                "ControlAPI", "Xenbus", .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            swiftSettings: settings),
        .executableTarget(
            name: "targetd",
            dependencies: [
                "SCSICore", "Reactor", "Backstores", "VirtioFront", "XenFront", "ControlAPI",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOHTTP1", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
                .product(name: "Yams", package: "Yams"),
                .product(name: "ServiceLifecycle", package: "swift-service-lifecycle"),
                .product(name: "UnixSignals", package: "swift-service-lifecycle"),
            ],
            swiftSettings: settings),

        // Test support: a vhost-user-scsi front-end in userspace, the load generator over it, mock ports and media.
        .target(
            name: "VhostUserInitiator", dependencies: ["CLinux", "CIOVector"], path: "Tests/Support/VhostUserInitiator",
            swiftSettings: settings),
        .target(
            name: "CoreTestSupport", dependencies: ["SCSICore", "CBackstore", "CTarget", "CIOVector"],
            path: "Tests/Support/CoreTestSupport", swiftSettings: settings),
        .executableTarget(
            name: "vhost-user-load",
            dependencies: [
                "VhostUserInitiator", .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            path: "Tests/Benchmarks/vhost-user-load", swiftSettings: settings),

        .executableTarget(
            name: "core-bench", dependencies: ["SCSICore", "CBackstore", "CTarget", "CIOVector"],
            path: "Tests/Benchmarks/core-bench", swiftSettings: settings),
        .executableTarget(
            name: "media-bench", dependencies: ["Backstores", "Reactor", "SCSICore", "CBackstore", "CIOVector"],
            path: "Tests/Benchmarks/media-bench", swiftSettings: settings),

        .testTarget(
            name: "SCSICoreTests", dependencies: ["SCSICore", "CoreTestSupport", "CBackstore", "CTarget", "CIOVector"],
            swiftSettings: settings),
        .testTarget(
            name: "SimulationTests",
            dependencies: ["SCSICore", "CoreTestSupport", "CBackstore", "CTarget", "CIOVector"],
            swiftSettings: settings),
        .testTarget(name: "ReactorTests", dependencies: ["Reactor", "CLinux", "CIOVector"], swiftSettings: settings),
        .testTarget(
            name: "BackstoresTests",
            dependencies: [
                "Backstores", "Reactor", "SCSICore", "CoreTestSupport", "CBackstore", "CLinux", "CIOVector",
            ],
            swiftSettings: settings),
        .testTarget(
            name: "VirtioFrontTests",
            dependencies: [
                "VirtioFront", "VhostUserInitiator", "CoreTestSupport", "Backstores", "Reactor", "SCSICore",
                "CBackstore", "CTarget",
                "CLinux", "CIOVector",
            ],
            swiftSettings: settings),
        .testTarget(
            name: "targetdTests",
            dependencies: [
                "targetd", "targetctl", "ControlAPI", "VhostUserInitiator",
                .product(name: "Logging", package: "swift-log"),
                .product(name: "Yams", package: "Yams"),
            ],
            swiftSettings: settings),
        .testTarget(name: "TidyTests", swiftSettings: settings),

        // What xenstore says of vscsi, for both sides of it; the Xen front (Debian: libxen-dev).
        .systemLibrary(name: "CXenStore"),
        .systemLibrary(name: "CXen"),
        .target(name: "Xenbus", dependencies: ["CXenStore"], swiftSettings: settings),
        .target(
            name: "XenFront", dependencies: ["SCSICore", "Reactor", "Xenbus", "CTarget", "CLinux", "CXen"],
            swiftSettings: settings),
        // SCSI commands by hand, at a vhost-user socket or at an sg node: two initiators for one disk.
        .executableTarget(
            name: "scsi-command", dependencies: ["VhostUserInitiator", "CLinux"], path: "Tests/Support/scsi-command",
            swiftSettings: settings),
        .testTarget(
            name: "XenFrontTests",
            dependencies: [
                "XenFront", "Xenbus", "SCSICore", "CoreTestSupport", "Reactor", "CTarget", "CLinux", "CXen",
                "CIOVector",
            ],
            swiftSettings: settings),
    ]
)

// One test target and what it needs, for builds of their own (the sanitizers'): all of it would take ten times as long.
if let only = Context.environment["TARGETD_TEST_TARGET"] {
    var needed: Set = [only]
    var before = 0
    while needed.count != before {
        before = needed.count
        for target in package.targets where needed.contains(target.name) {
            needed.formUnion(target.dependencies.compactMap { if case .byNameItem(let name, _) = $0 { name } else { nil } })
        }
    }
    package.targets.removeAll { !needed.contains($0.name) }
    package.products = []
}
