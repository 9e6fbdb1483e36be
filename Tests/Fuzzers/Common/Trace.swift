// Trace: what an input does, in words, for whoever replays one (TARGETD_FUZZER_TRACE=1).
//
// Called by: the fuzzers. Must not know: any of them.

import Glibc

enum Trace {
    private static let isOn = unsafe getenv("TARGETD_FUZZER_TRACE") != nil

    static func note(_ text: @autoclosure () -> String) {
        guard isOn else { return }
        print(text())
        fflush(nil)
    }
}
