// Which commands are allowed in the presence of which reservation: the tables of SPC-4 5.13.1, SBC-4 4.17 and SPC-2
// 5.5.1, and each of their cells sent to the target.

import CoreTestSupport
import Testing

@testable import SCSICore

private typealias CDB = CoreTestSupport.CDB

/// One row of the standards' tables. The columns: A allowed, C conflict.
private struct MatrixRow: Sendable {
    let cdb: [UInt8]
    /// From any nexus but the holder under write exclusive, exclusive access; from a registered one under a type that
    /// admits registrants; from others under such a type, write exclusive, exclusive access.
    let persistent: [Character]
    /// From another nexus than the holder under RESERVE (SPC-2).
    let reserve: Character
    let name: String

    init(_ name: String, _ cdb: [UInt8], _ persistent: String, _ reserve: Character) {
        self.name = name
        self.cdb = cdb
        self.persistent = Array(persistent.filter { $0 != " " })
        self.reserve = reserve
        precondition(self.persistent.count == 5)
    }
}

private func cdb(_ code: UInt8, _ byte1: UInt8 = 0, length: Int, _ more: [Int: UInt8] = [:]) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: length)
    bytes[0] = code
    bytes[1] = byte1
    for (offset, value) in more { bytes[offset] = value }
    return bytes
}

// swift-format-ignore
private let matrix: [MatrixRow] = [
    // SPC-4 5.13.1
    MatrixRow("INQUIRY",                                   cdb(0x12, length: 6),            "A A A A A", "A"),
    MatrixRow("LOG SELECT",                                cdb(0x4c, length: 10),           "C C A C C", "C"),
    MatrixRow("LOG SENSE",                                 cdb(0x4d, length: 10),           "A A A A A", "A"),
    MatrixRow("MODE SELECT(6)",                            cdb(0x15, 0x10, length: 6),      "C C A C C", "C"),
    MatrixRow("MODE SELECT(10)",                           cdb(0x55, 0x10, length: 10),     "C C A C C", "C"),
    MatrixRow("MODE SENSE(6)",                             cdb(0x1a, length: 6, [2: 0x3f]), "A C A A C", "C"),
    MatrixRow("MODE SENSE(10)",                            cdb(0x5a, length: 10, [2: 0x3f]), "A C A A C", "C"),
    MatrixRow("PERSISTENT RESERVE IN, READ KEYS",          cdb(0x5e, 0, length: 10),        "A A A A A", "C"),
    MatrixRow("PERSISTENT RESERVE IN, READ RESERVATION",   cdb(0x5e, 1, length: 10),        "A A A A A", "C"),
    MatrixRow("PERSISTENT RESERVE IN, REPORT CAPABILITIES", cdb(0x5e, 2, length: 10),       "A A A A A", "C"),
    MatrixRow("PERSISTENT RESERVE IN, READ FULL STATUS",   cdb(0x5e, 3, length: 10),        "A A A A A", "C"),
    MatrixRow("PREVENT ALLOW MEDIUM REMOVAL, allow",       cdb(0x1e, length: 6),            "A A A A A", "A"),
    MatrixRow("PREVENT ALLOW MEDIUM REMOVAL, prevent",     cdb(0x1e, length: 6, [4: 1]),    "C C A C C", "C"),
    MatrixRow("READ BUFFER(10)",                           cdb(0x3c, 0x02, length: 10),     "A C A A C", "C"),
    MatrixRow("READ BUFFER(10), descriptor",               cdb(0x3c, 0x03, length: 10),     "A C A A C", "C"),
    MatrixRow("READ BUFFER(10), echo buffer",              cdb(0x3c, 0x0a, length: 10),     "A C A A C", "C"),
    MatrixRow("READ BUFFER(10), echo buffer descriptor",   cdb(0x3c, 0x0b, length: 10),     "A C A A C", "C"),
    MatrixRow("READ BUFFER(16)",                           cdb(0x9b, 0x02, length: 16),     "A C A A C", "C"),
    MatrixRow("READ BUFFER(16), descriptor",               cdb(0x9b, 0x03, length: 16),     "A C A A C", "C"),
    MatrixRow("READ BUFFER(16), echo buffer",              cdb(0x9b, 0x0a, length: 16),     "A C A A C", "C"),
    MatrixRow("READ BUFFER(16), echo buffer descriptor",   cdb(0x9b, 0x0b, length: 16),     "A C A A C", "C"),
    MatrixRow("RECEIVE DIAGNOSTIC RESULTS",                cdb(0x1c, length: 6),            "A C A A C", "C"),
    MatrixRow("REPORT IDENTIFYING INFORMATION",            cdb(0xa3, 0x05, length: 12),     "A A A A A", "A"),
    MatrixRow("REPORT LUNS",                               cdb(0xa0, length: 12),           "A A A A A", "A"),
    MatrixRow("REPORT SUPPORTED OPERATION CODES",          cdb(0xa3, 0x0c, length: 12),     "A C A A C", "C"),
    MatrixRow("REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", cdb(0xa3, 0x0d, length: 12),    "A C A A C", "C"),
    MatrixRow("REPORT TARGET PORT GROUPS",                 cdb(0xa3, 0x0a, length: 12),     "A A A A A", "A"),
    MatrixRow("SET TARGET PORT GROUPS",                    cdb(0xa4, 0x0a, length: 12),     "C C A C C", "C"),
    MatrixRow("REPORT TIMESTAMP",                          cdb(0xa3, 0x0f, length: 12),     "A A A A A", "C"),
    MatrixRow("REQUEST SENSE",                             cdb(0x03, length: 6),            "A A A A A", "A"),
    MatrixRow("SEND DIAGNOSTIC",                           cdb(0x1d, 0x04, length: 6),      "C C A C C", "C"),
    MatrixRow("SET IDENTIFYING INFORMATION",               cdb(0xa4, 0x06, length: 12),     "C C A C C", "C"),
    MatrixRow("SET TIMESTAMP",                             cdb(0xa4, 0x0f, length: 12),     "C C A C C", "C"),
    MatrixRow("TEST UNIT READY",                           cdb(0x00, length: 6),            "A A A A A", "C"),
    MatrixRow("WRITE BUFFER",                              cdb(0x3b, 0x02, length: 10),     "C C A C C", "C"),
    MatrixRow("WRITE BUFFER, echo buffer",                 cdb(0x3b, 0x0a, length: 10),     "C C A C C", "C"),
    // SBC-4 4.17
    MatrixRow("COMPARE AND WRITE",                         cdb(0x89, length: 16),           "C C A C C", "C"),
    MatrixRow("GET LBA STATUS(16)",                        cdb(0x9e, 0x12, length: 16),     "A C A A C", "C"),
    MatrixRow("GET LBA STATUS(32)",                        cdb(0x7f, length: 32, [7: 0x18, 9: 0x12]), "A C A A C", "C"),
    MatrixRow("ORWRITE(16)",                               cdb(0x8b, length: 16),           "C C A C C", "C"),
    MatrixRow("PRE-FETCH(10)",                             cdb(0x34, length: 10),           "A C A A C", "C"),
    MatrixRow("PRE-FETCH(16)",                             cdb(0x90, length: 16),           "A C A A C", "C"),
    MatrixRow("READ(6)",                                   cdb(0x08, length: 6, [4: 1]),    "A C A A C", "C"),
    MatrixRow("READ(10)",                                  cdb(0x28, length: 10),           "A C A A C", "C"),
    MatrixRow("READ(12)",                                  cdb(0xa8, length: 12),           "A C A A C", "C"),
    MatrixRow("READ(16)",                                  cdb(0x88, length: 16),           "A C A A C", "C"),
    MatrixRow("READ CAPACITY(10)",                         cdb(0x25, length: 10),           "A A A A A", "A"),
    MatrixRow("READ CAPACITY(16)",                         cdb(0x9e, 0x10, length: 16),     "A A A A A", "A"),
    MatrixRow("READ DEFECT DATA(10)",                      cdb(0x37, length: 10),           "A C A A C", "C"),
    MatrixRow("READ DEFECT DATA(12)",                      cdb(0xb7, length: 12),           "A C A A C", "C"),
    MatrixRow("START STOP UNIT, start",                    cdb(0x1b, length: 6, [4: 1]),    "A A A A A", "A"),
    MatrixRow("START STOP UNIT, stop",                     cdb(0x1b, length: 6),            "C C A C C", "C"),
    MatrixRow("SYNCHRONIZE CACHE(10)",                     cdb(0x35, length: 10),           "C C A C C", "C"),
    MatrixRow("SYNCHRONIZE CACHE(16)",                     cdb(0x91, length: 16),           "C C A C C", "C"),
    MatrixRow("UNMAP",                                     cdb(0x42, length: 10),           "C C A C C", "C"),
    MatrixRow("VERIFY(10)",                                cdb(0x2f, length: 10),           "A C A A C", "C"),
    MatrixRow("VERIFY(12)",                                cdb(0xaf, length: 12),           "A C A A C", "C"),
    MatrixRow("VERIFY(16)",                                cdb(0x8f, length: 16),           "A C A A C", "C"),
    MatrixRow("WRITE(6)",                                  cdb(0x0a, length: 6, [4: 1]),    "C C A C C", "C"),
    MatrixRow("WRITE(10)",                                 cdb(0x2a, length: 10),           "C C A C C", "C"),
    MatrixRow("WRITE(12)",                                 cdb(0xaa, length: 12),           "C C A C C", "C"),
    MatrixRow("WRITE(16)",                                 cdb(0x8a, length: 16),           "C C A C C", "C"),
    MatrixRow("WRITE AND VERIFY(10)",                      cdb(0x2e, length: 10),           "C C A C C", "C"),
    MatrixRow("WRITE AND VERIFY(12)",                      cdb(0xae, length: 12),           "C C A C C", "C"),
    MatrixRow("WRITE AND VERIFY(16)",                      cdb(0x8e, length: 16),           "C C A C C", "C"),
    MatrixRow("WRITE ATOMIC(16)",                          cdb(0x9c, length: 16),           "C C A C C", "C"),
    MatrixRow("WRITE SAME(10)",                            cdb(0x41, length: 10, [8: 1]),   "C C A C C", "C"),
    MatrixRow("WRITE SAME(16)",                            cdb(0x93, length: 16, [13: 1]),  "C C A C C", "C"),
    // SBC-3, the table of its model of reservations; later editions do not have these commands.
    MatrixRow("XDWRITEREAD(10)",                           cdb(0x53, length: 10),           "C C A C C", "C"),
    MatrixRow("XDWRITEREAD(32)",                           cdb(0x7f, length: 32, [7: 0x18, 9: 0x07]), "C C A C C", "C"),
    MatrixRow("XPWRITE(10)",                               cdb(0x51, length: 10),           "C C A C C", "C"),
    MatrixRow("XPWRITE(32)",                               cdb(0x7f, length: 32, [7: 0x18, 9: 0x06]), "C C A C C", "C"),
]

private func serviceAction(of cdb: [UInt8]) -> UInt16 { UInt16(cdb[0] == 0x7f ? cdb[9] : cdb[1] & 0x1f) }

/// Commands whose rules are not those of a table: the tests of the services, and of RESERVE and RELEASE, have them.
private let withRulesOfTheirOwn: Set<UInt8> = [0x5f, 0x16, 0x17, 0x56, 0x57]

/// A type of persistent reservation: its code (SPC-4 6.15.3.4), whether registrants may do what the holder may, and
/// whether they all hold it.
private let types: [(code: UInt8, admitsRegistrants: Bool, isExclusiveAccess: Bool, allHold: Bool)] = [
    (1, false, false, false), (3, false, true, false), (5, true, false, false), (6, true, true, false),
    (7, true, false, true), (8, true, true, true),
]

private enum Role: String, CaseIterable {
    case holder, registrant, unregistered
}

@Suite("SPC-4 5.13.1, SBC-4 4.17: commands that are allowed in the presence of reservations")
struct ReservationMatrix {
    @Test("every command of the table has its row in the standards' tables here")
    func isComplete() {
        for row in CommandTable(features: .all).all where !withRulesOfTheirOwn.contains(row.operationCode) {
            let found = matrix.contains {
                $0.cdb[0] == row.operationCode
                    && (!row.hasServiceAction || serviceAction(of: $0.cdb) == row.serviceAction)
            }
            #expect(found, "\(row.handler): add a row with what the standard says")
        }
    }

    private static func makeWorld() -> (world: TestTarget, ports: [Role: MockPort]) {
        let world = TestTarget(
            savesState: true, portGroups: [TargetPortGroup(identifier: 1, ports: [1, 2], isExplicit: true)])
        return (world, [.holder: world.a, .registrant: world.addPort("C"), .unregistered: world.b])
    }

    /// The rows of commands that a unit of a test has: another command is INVALID COMMAND OPERATION CODE for all.
    private static func knownRows() -> [MatrixRow] {
        let commands = makeWorld().world.unit.table.all
        return matrix.filter { row in
            commands.contains {
                $0.operationCode == row.cdb[0]
                    && (!$0.hasServiceAction || $0.serviceAction == serviceAction(of: row.cdb))
            }
        }
    }

    /// Sends a row's command; whether it ended with RESERVATION CONFLICT.
    private static func conflicts(_ row: MatrixRow, _ world: TestTarget, _ port: MockPort) -> Bool {
        world.run(row.cdb, dataOut: Array(repeating: 0, count: 512), dataIn: 4096, on: port).status
            == .reservationConflict
    }

    @Test(
        "persistent reservations: each type × each command × holder, registrant, unregistered",
        arguments: types.map(\.code))
    func persistent(code: UInt8) {
        let type = types.first { $0.code == code }!
        for row in Self.knownRows() {
            for role in Role.allCases {
                let (world, ports) = Self.makeWorld()
                #expect(world.reserveOut(.register, 0, 1, on: ports[.holder]) == "good")
                #expect(world.reserveOut(.register, 0, 2, on: ports[.registrant]) == "good")
                #expect(world.reserveOut(.reserve, 1, type: code, on: ports[.holder]) == "good")
                let column =
                    switch role {
                    case .holder: Character("A")
                    case .registrant:
                        type.admitsRegistrants ? row.persistent[2] : row.persistent[type.isExclusiveAccess ? 1 : 0]
                    case .unregistered:
                        row.persistent[(type.admitsRegistrants ? 3 : 0) + (type.isExclusiveAccess ? 1 : 0)]
                    }
                let before = world.backstore.accepted.count
                let conflict = Self.conflicts(row, world, ports[role]!)
                #expect(conflict == (column == "C"), "\(row.name), type \(code), \(role.rawValue)")
                if conflict { #expect(world.backstore.accepted.count == before, "\(row.name) reached the medium") }
            }
        }
    }

    @Test("SPC-2 5.5.1: RESERVE × each command × holder, other nexus")
    func reserve() {
        for row in Self.knownRows() {
            let (world, ports) = Self.makeWorld()
            #expect(world.run([0x16, 0, 0, 0, 0, 0], on: ports[.holder]).summary == "good")
            let isPersistentReserve = row.cdb[0] == 0x5e
            #expect(Self.conflicts(row, world, ports[.holder]!) == isPersistentReserve, "\(row.name), holder")
            // The holder may have stopped the unit, which is not what is asked here.
            _ = world.run([0x1b, 0, 0, 0, 1, 0], on: ports[.holder])
            #expect(Self.conflicts(row, world, ports[.unregistered]!) == (row.reserve == "C"), "\(row.name), other")
        }
    }

    @Test(
        "SPC-4 5.13.1: PERSISTENT RESERVE OUT: each type × each service × holder, registrant, unregistered",
        arguments: types.map(\.code))
    func services(code: UInt8) {
        let type = types.first { $0.code == code }!
        for service in CDB.ReservationService.allCases {
            for role in Role.allCases {
                let (world, ports) = Self.makeWorld()
                world.reserveOut(.register, 0, 1, on: ports[.holder])
                world.reserveOut(.register, 0, 2, on: ports[.registrant])
                world.reserveOut(.reserve, 1, type: code, on: ports[.holder])
                let key: UInt64 = [.holder: 1, .registrant: 2, .unregistered: 0][role]!
                let holds = role == .holder || role == .registrant && type.allHold
                let conflict =
                    switch service {
                    case .register, .registerAndIgnoreExistingKey: false
                    case .clear, .preempt, .preemptAndAbort, .release: role == .unregistered
                    case .reserve: !holds
                    case .registerAndMove: !holds || type.allHold
                    case .replaceLostReservation: role == .unregistered
                    }
                let end: String
                if service == .registerAndMove {
                    let list = ReservationParameters.move(key, 9, to: [6, 0, 0, 0, 1] + Array(repeating: 0, count: 19))
                    end =
                        world.run(
                            CDB.persistentReserveOut(service, listLength: list.count), dataOut: list, on: ports[role]
                        ).summary
                } else {
                    end = world.reserveOut(service, key, 2, type: code, on: ports[role])
                }
                // Nothing is lost: INVALID RELEASE OF PERSISTENT RESERVATION.
                let admitted = service == .replaceLostReservation ? "5/2604" : "good"
                #expect(
                    end == (conflict ? "reservationConflict" : admitted), "\(service), type \(code), \(role.rawValue)")
            }
        }
    }
}
