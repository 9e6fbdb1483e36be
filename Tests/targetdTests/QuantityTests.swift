// QuantityTests: how sizes, times and names are read and written. Must not know: who uses them.

import Testing

@testable import targetd

@Suite struct QuantityTests {
    @Test(
        arguments: [
            ("0", 0), ("4096", 4096), ("1B", 1), ("1KiB", 1024), ("512 MiB", 512 << 20), ("10GiB", 10 << 30),
            ("3TiB", 3 << 40), ("2PiB", 2 << 50), ("1kB", 1000), ("5MB", 5_000_000), ("10GB", 10_000_000_000),
            ("1TB", 1_000_000_000_000), ("1PB", 1_000_000_000_000_000), ("16383PiB", 16383 << 50),
        ] as [(String, UInt64)])
    func sizeIsRead(text: String, bytes: UInt64) throws {
        #expect(try Size.parse(text) == bytes)
    }

    @Test(arguments: [
        ("10G", "write 10GiB (powers of 1024) or 10GB (powers of 1000)"), ("1k", "write 1KiB"), ("5Gib", "write 5GiB"),
        ("7K", "or 7kB"), ("1mib", "write 1MiB"), ("", "is not a size"), ("GiB", "is not a size"),
        ("-1GiB", "is not a size"), ("1.5GiB", "is not a size"), ("1 XiB", "is not a size"), ("1GiB!", "is not a size"),
        ("ten", "is not a size"), ("٣GiB", "is not a size"), ("16384PiB", "64 bits"),
        ("99999999999999999999", "64 bits"), ("18446744073709551615KiB", "64 bits"),
    ])
    func whatIsNoSizeIsRefusedWithWhatIsAllowed(text: String, reason: String) {
        let error = #expect(throws: QuantityError.self) { try Size.parse(text) }
        #expect(error?.text.contains(reason) == true, "\(error?.text ?? "no error")")
    }

    @Test(
        arguments: [
            (0, "0B"), (1, "1B"), (512, "512B"), (1024, "1KiB"), (1025, "1025B"), (1 << 30, "1GiB"),
            (3 << 29, "1536MiB"),
            (1 << 62, "4096PiB"), (.max, "18446744073709551615B"),
        ] as [(UInt64, String)])
    func sizeIsWrittenSoThatItReadsBack(bytes: UInt64, text: String) throws {
        #expect(Size.format(bytes) == text)
        #expect(try Size.parse(text) == bytes)
    }

    @Test(
        arguments: [
            ("0", 0), ("20us", 20_000), ("500ms", 500_000_000), ("10s", 10_000_000_000), ("2min", 120_000_000_000),
            ("1h", 3_600_000_000_000), ("7ns", 7),
        ] as [(String, UInt64)])
    func timeIsRead(text: String, nanoseconds: UInt64) throws {
        #expect(try TimeSpan.parse(text) == nanoseconds)
        #expect(try TimeSpan.parse(TimeSpan.format(nanoseconds)) == nanoseconds)
    }

    @Test(arguments: ["10", "", "s", "1.5s", "-1s", "10 parsecs", "99999999999999h"])
    func whatIsNoTimeIsRefused(text: String) {
        #expect(throws: QuantityError.self) { try TimeSpan.parse(text) }
    }
}

@Suite struct NAANameTests {
    @Test func nameIsReadAndWrittenBack() throws {
        let name = try NAAName(parsing: "naa.60014054AC780582", kinds: 2...6)
        #expect(name.value == 0x6001_4054_ac78_0582)
        #expect(name.description == "naa.60014054ac780582")
    }

    @Test func leadingZerosAreKept() {
        #expect(NAAName(0x0123).hexadecimal == "0000000000000123")
    }

    @Test(arguments: [
        "60014054ac780582", "naa.60014054ac78058", "naa.60014054ac7805822", "naa.g0014054ac780582", "naa.", "",
        "iqn.2003-01.org.example:x", "naa.+0014054ac780582", "NAA.60014054ac780582",
    ])
    func whatIsNoNameIsRefused(text: String) {
        #expect(throws: QuantityError.self) { try NAAName(parsing: text, kinds: 2...6) }
    }

    @Test func kindOutsideOfTheAllowedOnesIsRefusedWithThem() {
        let error = #expect(throws: QuantityError.self) {
            try NAAName(parsing: "naa.60014054ac780582", kinds: 2...3, 5...5)
        }
        #expect(error?.text.hasSuffix("can be 2, 3, 5") == true)
    }

    // The numbers are what units of existing configurations are called. A change here renames guests' disks.
    @Test func derivedNamesNeverChange() {
        #expect(
            NAAName.derived(from: "logical unit", "naa.60014054ac780582", "root").description == "naa.35407c3c9b3587a1")
        #expect(NAAName.derived(from: "target", "ram", "/run/vm1.sock").description == "naa.3067244b109bb051")
    }

    @Test func derivedNamesAreLocallyAssignedAndDifferByEachPart() {
        let names = [
            NAAName.derived(from: "a", "b"), .derived(from: "a", "c"), .derived(from: "b", "b"), .derived(from: "ab"),
            .derived(from: "ab", ""), .derived(from: "", "ab"), .derived(from: "a", "b", ""),
        ]
        #expect(Set(names).count == names.count)
        #expect(names.allSatisfy { $0.value >> 60 == 3 })
    }

    @Test func derivedNamesOfManyUnitsDiffer() {
        var names: Set<NAAName> = []
        for index in 0..<50_000 { names.insert(.derived(from: "logical unit", "naa.60014054ac780582", "disk\(index)")) }
        #expect(names.count == 50_000)
    }
}

@Suite struct SuggestionTests {
    @Test(arguments: [
        ("backstore", "backstores"), ("bakcstores", "backstores"), ("Reactors", "reactors"), ("taregts", "targets"),
    ])
    func typingErrorIsRecognized(word: String, meant: String) {
        #expect(nearest(word, in: ["reactors", "backstores", "targets"]) == meant)
    }

    @Test func farWordGetsNoSuggestion() {
        #expect(nearest("colour", in: ["reactors", "backstores", "targets"]) == nil)
        #expect(nearest(String(repeating: "x", count: 10_000), in: ["reactors"]) == nil)
    }

    @Test func distanceCountsInsertionsRemovalsReplacementsAndSwaps() {
        #expect(editDistance("", "abc") == 3)
        #expect(editDistance("abc", "abc") == 0)
        #expect(editDistance("abc", "acb") == 1)
        #expect(editDistance("kitten", "sitting") == 3)
    }
}
