// The simulator's runs, and the bugs that it must find.

import CoreTestSupport
import Glibc
import Testing

@Suite("Simulation", .serialized)
struct SimulationTests {
    /// Seeds to run: the one of TARGETD_SIM_SEED, or TARGETD_SIM_RUNS from 1 on.
    private static var seeds: [UInt64] {
        if let seed = environment("TARGETD_SIM_SEED") { return [seed] }
        let first = environment("TARGETD_SIM_FIRST") ?? 1
        return Array(first..<first + (environment("TARGETD_SIM_RUNS") ?? 2000))
    }

    private static func environment(_ name: String) -> UInt64? {
        unsafe getenv(name).flatMap { unsafe UInt64(String(cString: $0)) }
    }

    @Test("Every step of every run equals the reference model")
    func runs() {
        var commands = 0
        let isVerbose = unsafe getenv("TARGETD_SIM_VERBOSE") != nil
        for seed in Self.seeds {
            if isVerbose { print("simulation of seed \(seed)") }
            let simulation = Simulation(seed: seed, isVerbose: isVerbose && Self.seeds.count == 1)
            simulation.run()
            commands += simulation.commands
            #expect(
                simulation.failures.isEmpty,
                "TARGETD_SIM_SEED=\(seed) replays this: \(simulation.failures.prefix(3))")
            if !simulation.failures.isEmpty { break }
        }
        print("simulated \(commands) commands in \(Self.seeds.count) runs")
    }

    @Test("The same seed gives the same run")
    func replays() {
        let runs = (0..<2).map { _ in
            let simulation = Simulation(seed: 7)
            simulation.run()
            return simulation.trace
        }
        #expect(runs[0].count > 10)
        #expect(runs[0] == runs[1])
    }

    @Test("A planted bug is found", arguments: PlantedBug.allCases)
    func plantedBug(bug: PlantedBug) {
        let found = (1...200 as ClosedRange<UInt64>).contains { seed in
            let simulation = Simulation(seed: seed, planted: bug)
            simulation.run()
            return !simulation.failures.isEmpty
        }
        #expect(found, "\(bug) was not found in 200 runs")
    }

    @Test("A task set that follows another rule is told from the engine's", arguments: ModelMistake.allCases)
    func mistake(mistake: ModelMistake) {
        let found = (1...200 as ClosedRange<UInt64>).contains { seed in
            let simulation = Simulation(seed: seed, mistake: mistake)
            simulation.run()
            return !simulation.failures.isEmpty
        }
        #expect(found, "\(mistake) was not told apart in 200 runs")
    }
}
