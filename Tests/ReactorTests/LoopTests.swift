// LoopTests: mailbox, descriptors, timers, work sources, sleep.
//
// Called by: swift test. Must not know: the inside of the reactor.

import CLinux
import Glibc
import Reactor
import Synchronization
import Testing

@Suite struct LoopTests {
    @Test(arguments: engines)
    func theForcedEngineIsTheActiveOne(_ engine: Reactor.Configuration.Engine) throws {
        #expect(try makeReactor(engine).engine.rawValue == engine.rawValue)
    }

    @Test func automaticPrefersIOUring() throws {
        #expect(try makeReactor(.automatic).engine == .ioUring)
    }

    @Test func aDepthOutOfRangeIsRefusedWithAReason() {
        #expect(throws: ReactorError.self) { try makeReactor(.automatic, depth: 0) }
        #expect(throws: ReactorError.self) { try makeReactor(.automatic, depth: ReactorLimits.ioDepth + 1) }
    }

    @Test(arguments: engines)
    func messagesRunInOrderOnTheReactorsThread(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let seen = Mutex<[Int]>([])
        withRunningReactor(reactor) {
            withExtendedLifetime(seen) {
                let list = Listing()
                for number in 0..<100 { reactor.post { list.append(number) } }
                #expect(onReactor(reactor) { list.all } == Array(0..<100))
            }
        }
    }

    @Test(arguments: engines)
    func anIdleReactorMakesNoTurns(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        withRunningReactor(reactor) {
            // A message wakes it for a few turns, whatever the time between two messages is.
            let before = onReactor(reactor) { reactor.statistics.turns }
            usleep(20_000)
            let after = onReactor(reactor) { reactor.statistics.turns }
            #expect(after - before <= 6)
        }
    }

    @Test(arguments: engines)
    func aReadyDescriptorIsReportedUntilItIsDrained(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let descriptor = makeEventDescriptor()
        defer { close(descriptor) }
        let counter = Counter()
        // Level-triggered: left ready twice, drained the third time.
        counter.action = { counter.count < 3 || drain(descriptor) }
        let token = try unsafe reactor.watch(
            descriptor, events: EPOLLIN.rawValue, Counter.descriptorHandler, counter.context)
        signal(descriptor)
        turns(reactor) { counter.count == 3 }
        for _ in 0..<100 { reactor.turn(mayWait: false) }
        #expect(counter.count == 3)
        #expect(counter.bits & EPOLLIN.rawValue != 0)
        signal(descriptor)
        turns(reactor) { counter.count == 4 }
        reactor.unwatch(token)
    }

    @Test(arguments: engines)
    func anUnwatchedDescriptorIsNotReportedLaterInTheSameTurn(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let descriptors = [makeEventDescriptor(), makeEventDescriptor()]
        defer { descriptors.forEach { close($0) } }
        let counters = [Counter(), Counter()]
        let tokens = try (0..<2).map {
            try unsafe reactor.watch(
                descriptors[$0], events: EPOLLIN.rawValue, Counter.descriptorHandler, counters[$0].context)
        }
        // Whichever comes first removes both.
        for counter in counters {
            counter.action = {
                for token in tokens { reactor.unwatch(token) }
                return true
            }
        }
        descriptors.forEach { signal($0) }
        turns(reactor) { counters[0].count + counters[1].count > 0 }
        for _ in 0..<100 { reactor.turn(mayWait: false) }
        #expect(counters[0].count + counters[1].count == 1)
    }

    @Test(arguments: engines)
    func moreReadyDescriptorsThanOneBatchAreAllReported(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let descriptors = (0..<200).map { _ in makeEventDescriptor() }
        defer { descriptors.forEach { close($0) } }
        let counters = descriptors.map { descriptor in
            let counter = Counter()
            counter.action = { drain(descriptor) }
            return counter
        }
        let tokens = try zip(descriptors, counters).map {
            try unsafe reactor.watch($0, events: EPOLLIN.rawValue, Counter.descriptorHandler, $1.context)
        }
        for _ in 0..<3 {
            let before = counters.map(\.count)
            descriptors.forEach { signal($0) }
            turns(reactor) { zip(counters, before).allSatisfy { $0.count == $1 + 1 } }
        }
        tokens.forEach { reactor.unwatch($0) }
    }

    @Test(arguments: engines)
    func changedEventsTakeEffect(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let descriptor = makeEventDescriptor()
        defer { close(descriptor) }
        let counter = Counter()
        let token = try unsafe reactor.watch(
            descriptor, events: EPOLLIN.rawValue, Counter.descriptorHandler, counter.context)
        for _ in 0..<100 { reactor.turn(mayWait: false) }
        #expect(counter.count == 0)
        reactor.change(token, events: EPOLLOUT.rawValue)
        turns(reactor) { counter.count > 0 }
        #expect(counter.bits == EPOLLOUT.rawValue)
        reactor.unwatch(token)
    }

    @Test(arguments: engines)
    func timersGoOffInOrderAndCancelledOnesDoNot(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let list = Listing()
        let counters = (0..<5).map { number in
            let counter = Counter()
            counter.action = {
                list.append(number)
                return true
            }
            return counter
        }
        let start = reactor.now
        let delays: [UInt64] = [3_000_000, 1_000_000, 2_000_000, 1_000_000, 1_500_000]
        let tokens = zip(delays, counters).map {
            unsafe reactor.setTimer(at: start + $0, Counter.timerHandler, $1.context)
        }
        reactor.cancel(tokens[4])
        turns(reactor) { counters[0].count == 1 }
        #expect(list.all == [1, 3, 2, 0])
        #expect(reactor.now >= start + 3_000_000)
        reactor.cancel(tokens[0])
    }

    @Test func manyTimersGoOffInTheOrderOfTheirTimes() throws {
        let reactor = try makeReactor(.automatic)
        var generator = SplitMix(seed: 7)
        let list = Listing()
        var expected: [(UInt64, Int)] = []
        var counters: [Counter] = []
        var tokens: [TimerToken] = []
        for number in 0..<1000 {
            let counter = Counter()
            counter.action = {
                list.append(number)
                return true
            }
            counters.append(counter)
            let time = generator.next() % 100 + 1
            expected.append((time, number))
            tokens.append(unsafe reactor.setTimer(at: time, Counter.timerHandler, counter.context))
        }
        for number in stride(from: 0, to: 1000, by: 3) { reactor.cancel(tokens[number]) }
        expected = expected.filter { $0.1 % 3 != 0 }.sorted { $0.0 == $1.0 ? $0.1 < $1.1 : $0.0 < $1.0 }
        reactor.turn(mayWait: false)
        #expect(list.all == expected.map(\.1))
        withExtendedLifetime(counters) {}
    }

    @Test(arguments: engines)
    func sourcesArePolledFlushedAndAskedBeforeSleep(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine, pollMicroseconds: 1)
        let source = CountingSource()
        source.work = 3
        let token = reactor.add(source.workSource)
        let descriptor = makeEventDescriptor()
        defer { close(descriptor) }
        let counter = Counter()
        counter.action = { drain(descriptor) }
        let watched = try unsafe reactor.watch(
            descriptor, events: EPOLLIN.rawValue, Counter.descriptorHandler, counter.context)
        source.whenPreparing = {
            // Work that arrives in the race: it must not sleep.
            source.work = source.preparations == 1 ? 1 : 0
            if source.preparations == 2 { signal(descriptor) }
            return source.preparations == 1
        }
        turns(reactor) { source.preparations == 2 && counter.count == 1 }
        #expect(source.worked == 4)
        #expect(source.flushes == source.polls)
        reactor.remove(token)
        let polls = source.polls
        reactor.turn(mayWait: false)
        #expect(source.polls == polls)
        reactor.unwatch(watched)
    }

    @Test func aSourceMayRemoveItselfAndOthersWhileTheyArePolled() throws {
        let reactor = try makeReactor(.automatic)
        let sources = (0..<3).map { _ in CountingSource() }
        let tokens = sources.map { reactor.add($0.workSource) }
        sources[1].whenPolled = {
            reactor.remove(tokens[1])
            reactor.remove(tokens[2])
        }
        for _ in 0..<3 { reactor.turn(mayWait: false) }
        #expect(sources.map(\.polls) == [3, 1, 0])
        #expect(sources.map(\.flushes) == [3, 0, 0])
        reactor.remove(tokens[0])
    }

    @Test(arguments: engines)
    func aReactorLeavesNoDescriptorOpen(_ engine: Reactor.Configuration.Engine) throws {
        // Other tests of this process open and close descriptors meanwhile; a leak of 3 a round would be seen.
        let before = openDescriptors()
        for _ in 0..<100 { try makeReactor(engine, depth: 1).turn(mayWait: false) }
        #expect(openDescriptors() < before + 250)
    }
}

/// A list that may be filled on another thread.
final class Listing: Sendable {
    private let list = Mutex<[Int]>([])
    func append(_ value: Int) { list.withLock { $0.append(value) } }
    var all: [Int] { list.withLock { $0 } }
}

/// A work source that counts its calls.
final class CountingSource {
    var work = 0
    var worked = 0
    var polls = 0
    var flushes = 0
    var preparations = 0
    var whenPreparing: () -> Bool = { false }
    var whenPolled: () -> Void = {}

    var workSource: Reactor.WorkSource {
        unsafe Reactor.WorkSource(
            poll: { context in
                let source = unsafe Unmanaged<CountingSource>.fromOpaque(context).takeUnretainedValue()
                source.polls += 1
                source.whenPolled()
                guard source.work > 0 else { return false }
                source.work -= 1
                source.worked += 1
                return true
            },
            flush: { unsafe Unmanaged<CountingSource>.fromOpaque($0).takeUnretainedValue().flushes += 1 },
            prepareToSleep: { context in
                let source = unsafe Unmanaged<CountingSource>.fromOpaque(context).takeUnretainedValue()
                source.preparations += 1
                return source.whenPreparing()
            }, context: Unmanaged.passUnretained(self).toOpaque())
    }
}

/// A small generator with a seed.
struct SplitMix: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var value = state
        value = (value ^ value >> 30) &* 0xbf58_476d_1ce4_e5b9
        value = (value ^ value >> 27) &* 0x94d0_49bb_1331_11eb
        return value ^ value >> 31
    }
}
