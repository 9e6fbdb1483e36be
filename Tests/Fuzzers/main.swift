// main: runs the fuzzer that TARGETD_FUZZER names, with libFuzzer's own arguments (Docs/TESTING.md).
//
// Called by: Scripts/test fuzz, people. Must not know: what the fuzzers do.

import CFuzzer
import Glibc

/// A fuzzer: what it makes of an input, once. Whatever goes wrong ends the process.
typealias Fuzzer = (FuzzInput) -> Void

private let fuzzers: [String: Fuzzer] = [
    "scsi": CommandFuzzer.run, "state": StateFuzzer.run, "rings": RingFuzzer.run, "messages": MessageFuzzer.run,
    "xen-ring": XenRingFuzzer.run, "xenstore": XenStoreFuzzer.run,
]

/// libFuzzer's callback can carry no context.
private enum Chosen {
    nonisolated(unsafe) static var fuzzer: Fuzzer?
}

private let name = unsafe getenv("TARGETD_FUZZER").map { unsafe String(cString: $0) } ?? ""
guard let fuzzer = fuzzers[name] else {
    print(
        "No fuzzer is called '\(name)'. Set TARGETD_FUZZER to one of: \(fuzzers.keys.sorted().joined(separator: ", "))."
    )
    exit(2)
}
unsafe Chosen.fuzzer = fuzzer
private var count = CommandLine.argc
private var words: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>? = unsafe CommandLine.unsafeArgv
exit(
    unsafe LLVMFuzzerRunDriver(&count, &words) { bytes, length in
        unsafe Chosen.fuzzer!(FuzzInput(Array(UnsafeBufferPointer(start: bytes, count: length))))
        return 0
    })
