// The runs of the simulation of several shards, and the mistakes that it must find.

import Glibc
import Testing

@Suite("Simulation of several shards", .serialized)
struct ShardSimulationTests {
    /// Seeds to run: the one of TARGETD_SIM_SEED, or TARGETD_SIM_RUNS from TARGETD_SIM_FIRST (1) on.
    private static var seeds: [UInt64] {
        if let seed = environment("TARGETD_SIM_SEED") { return [seed] }
        let first = environment("TARGETD_SIM_FIRST") ?? 1
        return Array(first..<first + (environment("TARGETD_SIM_RUNS") ?? 300))
    }

    private static func environment(_ name: String) -> UInt64? {
        unsafe getenv(name).flatMap { unsafe UInt64(String(cString: $0)) }
    }

    @Test("Nothing is lost, doubled or overtaken between shards, and no thread sleeps over work")
    func runs() {
        var commands = 0
        for seed in Self.seeds {
            let simulation = ShardSimulation(seed: seed)
            simulation.run()
            commands += simulation.commands
            #expect(
                simulation.failures.isEmpty,
                "TARGETD_SIM_SEED=\(seed) replays this: \(simulation.failures.prefix(3))")
            if !simulation.failures.isEmpty { break }
        }
        print("simulated \(commands) commands between shards in \(Self.seeds.count) runs")
    }

    @Test("A planted mistake is found", arguments: PlantedCrossing.allCases)
    func planted(mistake: PlantedCrossing) {
        let found = (1...300 as ClosedRange<UInt64>).contains { seed in
            let simulation = ShardSimulation(seed: seed, planted: mistake)
            simulation.run()
            return !simulation.failures.isEmpty
        }
        #expect(found, "\(mistake) was not found in 300 runs")
    }
}
