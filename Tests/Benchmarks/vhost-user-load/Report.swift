// Report: a result as text or as JSON.
//
// Called by: LoadCommand. Must not know: how the numbers came about.

/// A result, ready to print.
struct Report {
    private let result: LoadResult
    private let requestLength: Int

    init(_ result: LoadResult, _ requestLength: Int) {
        self.result = result
        self.requestLength = requestLength
    }

    private var operationsPerSecond: Double { Double(result.operations) / result.seconds }
    private var bytesPerSecond: Double { operationsPerSecond * Double(requestLength) }
    private var processorPerOperation: Double? {
        result.processorMicroseconds.map { $0 / Double(max(1, result.operations)) }
    }
    private var percentiles: [(name: String, microseconds: Double)] {
        [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)].map { name, fraction in
            (name, Double(result.latency.percentile(fraction)) / 1000)
        }
    }

    var json: String {
        let latency =
            [("mean", result.latency.mean / 1000)] + percentiles + [("max", Double(result.latency.maximum) / 1000)]
        var fields = [
            "\"operations\": \(result.operations)", "\"reads\": \(result.reads)", "\"writes\": \(result.writes)",
            "\"seconds\": \(Self.decimal(result.seconds, 3))", "\"iops\": \(Self.decimal(operationsPerSecond, 1))",
            "\"bytesPerSecond\": \(Self.decimal(bytesPerSecond, 0))",
            "\"latencyMicroseconds\": {"
                + latency.map { "\"\($0.0)\": \(Self.decimal($0.1, 3))" }.joined(separator: ", ") + "}",
        ]
        if let processorPerOperation {
            fields.append("\"targetProcessorMicrosecondsPerOperation\": \(Self.decimal(processorPerOperation, 4))")
        }
        if let bytes = result.residentBytes { fields.append("\"targetResidentBytes\": \(bytes)") }
        if let blocks = result.verifiedBlocks { fields.append("\"verifiedBlocks\": \(blocks)") }
        return "{\(fields.joined(separator: ", "))}"
    }

    var text: String {
        var lines = [
            "\(result.reads) reads, \(result.writes) writes of \(requestLength) bytes "
                + "in \(Self.decimal(result.seconds, 2)) s",
            "\(Self.decimal(operationsPerSecond, 0)) I/O per second, \(Self.decimal(bytesPerSecond / 1e6, 1)) MB/s",
            "latency in us: mean \(Self.decimal(result.latency.mean / 1000, 1)), "
                + percentiles.map { "\($0.name) \(Self.decimal($0.microseconds, 1))" }.joined(separator: ", ")
                + ", max \(Self.decimal(Double(result.latency.maximum) / 1000, 1))",
        ]
        if let processorPerOperation {
            lines.append("target: \(Self.decimal(processorPerOperation, 2)) us of processor time for each I/O")
        }
        if let bytes = result.residentBytes { lines.append("target: \(bytes >> 10) KiB resident") }
        if let blocks = result.verifiedBlocks { lines.append("\(blocks) blocks compared with what was written") }
        return lines.joined(separator: "\n")
    }

    /// A number with so many places behind the point; Foundation's formats are not needed for that.
    static func decimal(_ value: Double, _ places: Int) -> String {
        let factor = (0..<places).reduce(1) { result, _ in result * 10 }
        let scaled = Int((abs(value) * Double(factor)).rounded())
        let sign = value < 0 && scaled > 0 ? "-" : ""
        guard places > 0 else { return sign + String(scaled) }
        let digits = String(scaled % factor)
        return sign + String(scaled / factor) + "." + String(repeating: "0", count: places - digits.count) + digits
    }
}
