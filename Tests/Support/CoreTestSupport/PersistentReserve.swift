// PersistentReserve: the PERSISTENT RESERVE commands as tests send them.
//
// Called by: tests and the simulator. Must not know: the core's reservation table.

extension CDB {
    /// A service action of PERSISTENT RESERVE OUT (SPC-4 6.16.2).
    public enum ReservationService: UInt8, CaseIterable, Sendable {
        case register, reserve, release, clear, preempt, preemptAndAbort, registerAndIgnoreExistingKey, registerAndMove
        case replaceLostReservation
    }

    /// PERSISTENT RESERVE OUT. `type` is the whole of byte 2: SCOPE and TYPE.
    public static func persistentReserveOut(
        _ service: ReservationService, type: UInt8 = 0, listLength: Int = 24
    ) -> [UInt8] {
        [0x5f, service.rawValue, type, 0, 0] + bytes(UInt64(listLength), 4) + [0]
    }

    /// PERSISTENT RESERVE IN: READ KEYS 0, READ RESERVATION 1, REPORT CAPABILITIES 2, READ FULL STATUS 3.
    public static func persistentReserveIn(_ service: UInt8, allocationLength: UInt64 = 0xffff) -> [UInt8] {
        [0x5e, service, 0, 0, 0, 0, 0] + bytes(allocationLength, 2) + [0]
    }
}

/// The parameter list of PERSISTENT RESERVE OUT.
public struct ReservationParameters: Sendable {
    /// RESERVATION KEY and SERVICE ACTION RESERVATION KEY.
    public var key: UInt64 = 0, actionKey: UInt64 = 0
    /// Byte 20: SPEC_I_PT 08h, ALL_TG_PT 04h, APTPL 01h.
    public var flags: UInt8 = 0
    /// TransportIDs for SPEC_I_PT.
    public var transportIdentifiers: [[UInt8]] = []

    /// Two keys and flags.
    public init(_ key: UInt64 = 0, _ actionKey: UInt64 = 0, flags: UInt8 = 0, transportIdentifiers: [[UInt8]] = []) {
        self.key = key
        self.actionKey = actionKey
        self.flags = flags
        self.transportIdentifiers = transportIdentifiers
    }

    /// The bytes.
    public var bytes: [UInt8] {
        var list = CDB.bytes(key, 8) + CDB.bytes(actionKey, 8) + [0, 0, 0, 0, flags, 0, 0, 0]
        if flags & 0x08 != 0 {
            let all = transportIdentifiers.flatMap { $0 }
            list += CDB.bytes(UInt64(all.count), 4) + all
        }
        return list
    }

    /// The parameter list of REGISTER AND MOVE. `flags` is byte 17: UNREG 02h, APTPL 01h.
    public static func move(
        _ key: UInt64, _ actionKey: UInt64, flags: UInt8 = 0, targetPort: UInt64 = 1, to transportIdentifier: [UInt8]
    ) -> [UInt8] {
        CDB.bytes(key, 8) + CDB.bytes(actionKey, 8) + [0, flags] + CDB.bytes(targetPort, 2)
            + CDB.bytes(UInt64(transportIdentifier.count), 4) + transportIdentifier
    }
}

/// What READ FULL STATUS says of one registered nexus.
public struct FullStatus: Equatable, Sendable {
    /// The reservation key.
    public let key: UInt64
    /// SCOPE and TYPE of a holder, `nil` of others.
    public let heldType: UInt8?
    /// The relative target port identifier.
    public let targetPort: UInt64
    /// The TransportID.
    public let transportIdentifier: [UInt8]
}

extension TestTarget {
    /// Sends a service of PERSISTENT RESERVE OUT and gives its end in short.
    @discardableResult
    public func reserveOut(
        _ service: CDB.ReservationService, _ key: UInt64 = 0, _ actionKey: UInt64 = 0, type: UInt8 = 0,
        flags: UInt8 = 0, transportIdentifiers: [[UInt8]] = [], on port: MockPort? = nil
    ) -> String {
        let list = ReservationParameters(key, actionKey, flags: flags, transportIdentifiers: transportIdentifiers).bytes
        return run(
            CDB.persistentReserveOut(service, type: type, listLength: list.count), dataOut: list, on: port
        ).summary
    }

    private func number(_ bytes: ArraySlice<UInt8>) -> UInt64 { bytes.reduce(0) { $0 << 8 | UInt64($1) } }

    private func reserveIn(_ service: UInt8, _ port: MockPort?) -> [UInt8] {
        let end = run(CDB.persistentReserveIn(service), dataIn: 0x1_0000, on: port)
        precondition(end.summary == "good", "PERSISTENT RESERVE IN: \(end.summary)")
        return end.data
    }

    /// READ KEYS: PRGENERATION and the keys.
    public func readKeys(on port: MockPort? = nil) -> (generation: UInt64, keys: [UInt64]) {
        let data = reserveIn(0, port)
        let keys = stride(from: 8, to: data.count, by: 8).map { number(data[$0..<$0 + 8]) }
        precondition(number(data[4..<8]) == keys.count * 8)
        return (generation: number(data[..<4]), keys: keys)
    }

    /// READ RESERVATION: the key and the byte with SCOPE and TYPE, `nil` if there is no reservation.
    public func readReservation(on port: MockPort? = nil) -> (key: UInt64, type: UInt8)? {
        let data = reserveIn(1, port)
        return data.count == 8 ? nil : (key: number(data[8..<16]), type: data[21])
    }

    /// READ FULL STATUS.
    public func readFullStatus(on port: MockPort? = nil) -> [FullStatus] {
        let data = reserveIn(3, port)
        var all: [FullStatus] = []
        var offset = 8
        while offset < data.count {
            let length = Int(number(data[offset + 20..<offset + 24]))
            all.append(
                FullStatus(
                    key: number(data[offset..<offset + 8]),
                    heldType: data[offset + 12] & 1 == 1 ? data[offset + 13] : nil,
                    targetPort: number(data[offset + 18..<offset + 20]),
                    transportIdentifier: Array(data[offset + 24..<offset + 24 + length])))
            offset += 24 + length
        }
        return all
    }

    /// One more initiator.
    public func addPort(_ name: String) -> MockPort {
        let port = MockPort(name: name, target: target, journal: journal, violations: violations)
        port.connect()
        _ = run(CDB.requestSense(), dataIn: 18, on: port)
        return port
    }

    /// The next unit attention condition of a nexus, which is cleared by it; "none" if there is none.
    public func attention(_ port: MockPort) -> String {
        let sense = Sense(run(CDB.requestSense(), dataIn: 18, on: port).data)?.description ?? "?"
        return sense == "0/0000" ? "none" : sense
    }
}
