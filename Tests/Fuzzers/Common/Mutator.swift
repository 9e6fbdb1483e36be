// Mutator: a second thread that writes into shared memory all the time while a fuzzer's input runs: between any two
// reads of the code under test there may be a write. What it writes is the input's; when, is not.
//
// Owns: the thread. Called by: the fuzzers of rings. Must not know: whose memory it is.

import CFuzzer
import Glibc
import Synchronization

/// Memory that can be written to from another thread.
protocol SharedWithMutator: AnyObject {
    /// Writes a value at the mutation's place.
    ///
    /// - Returns: What was there.
    func exchange(_ mutation: Mutation, _ value: UInt64) -> UInt64
}

/// One store.
struct Mutation {
    /// Which place, in whatever way the memory's owner counts them.
    let place: UInt8
    let offset: Int
    /// 1, 2, 4 or 8 bytes.
    let width: Int
    let value: UInt64
    /// How long the thread waits before it.
    let pause: Int
    /// Whether what was there comes back at once: what is checked is right then, and what is used is not.
    let isUndone: Bool

    init(_ input: inout FuzzInput) {
        place = input.byte()
        offset = Int(input.number(UInt16.self))
        let choice = input.byte()
        width = 1 << Int(choice & 3)
        pause = [0, 10, 100, 1000][Int(choice >> 2 & 3)]
        isUndone = choice & 0x20 == 0
        value = choice & 0x10 != 0 ? input.number() : UInt64(input.byte())
    }
}

@safe
final class Mutator: @unchecked Sendable {
    static let shared = Mutator()

    private var mutations: [Mutation] = []
    private var memory: (any SharedWithMutator)?
    private let isRunning = Atomic(false)
    private let begun = eventfd(0, Int32(EFD_CLOEXEC)), ended = eventfd(0, Int32(EFD_CLOEXEC))

    private init() {
        var thread = pthread_t()
        let code = unsafe pthread_create(
            &thread, nil,
            { context in
                unsafe Unmanaged<Mutator>.fromOpaque(context!).takeUnretainedValue().loop()
                return nil
            }, Unmanaged.passUnretained(self).toOpaque())
        precondition(code == 0)
    }

    /// Begins to carry the mutations out, one after the other and from the beginning again.
    func begin(_ mutations: [Mutation], _ memory: any SharedWithMutator) {
        self.mutations = mutations
        self.memory = memory
        isRunning.store(true, ordering: .releasing)
        _ = eventfd_write(begun, 1)
    }

    /// Returns when nothing is written any more.
    func end() {
        isRunning.store(false, ordering: .releasing)
        var count: eventfd_t = 0
        _ = unsafe eventfd_read(ended, &count)
        memory = nil
    }

    private func loop() {
        var count: eventfd_t = 0
        while unsafe eventfd_read(begun, &count) == 0 {
            while isRunning.load(ordering: .acquiring) { runOnce() }
            _ = eventfd_write(ended, 1)
        }
    }

    private func runOnce() {
        for mutation in mutations {
            for _ in 0..<mutation.pause where !isRunning.load(ordering: .relaxed) { return }
            let old = memory!.exchange(mutation, mutation.value)
            if mutation.isUndone { _ = memory!.exchange(mutation, old) }
        }
    }
}
