// Placement: which reactor does what.
//
// Owns: the rule. Called by: the daemon. Must not know: reactors themselves.

/// The reactor of each target and each socket, by index.
///
/// A logical unit's task set is touched by one thread only, so whatever shares a unit is on one reactor: a target
/// with its units, a socket with its targets, unless the socket is spread. Such groups are dealt out to the reactors
/// in turn.
struct Placement: Equatable, Sendable {
    private(set) var targets: [NAAName: Int] = [:]
    private(set) var sockets: [String: Int] = [:]
    /// Of the backstores that have a logical unit: where its target is.
    private(set) var backstores: [String: Int] = [:]

    /// Where a group cannot be on one reactor, because two of its members are on different ones already.
    struct Conflict: Error, Equatable {
        /// The member that was found last, as a key of the file.
        let key: String
    }

    /// Nothing is placed.
    init() {}

    /// Places what is in a configuration. The same configuration gives the same placement.
    init(_ configuration: Configuration) {
        // Nothing is placed yet, so nothing can be in conflict.
        guard case .success(let placement) = Self.extending(Placement(), to: configuration) else {
            preconditionFailure()
        }
        self = placement
    }

    /// Places what is in a configuration and not placed yet, beside what it shares units with.
    static func extending(_ placed: Placement, to configuration: Configuration) -> Result<Placement, Conflict> {
        var groups = Groups(configuration)
        var reactors: [Member: Int] = [:]
        for (target, reactor) in placed.targets.sorted(by: { $0.key < $1.key })
        where configuration.targets[target] != nil {
            let known = reactors.updateValue(reactor, forKey: groups.representative(of: .target(target)))
            guard known ?? reactor == reactor else { return .failure(Conflict(key: "targets.\(target)")) }
        }
        for (index, front) in configuration.vhostUserFronts.enumerated() {
            guard let reactor = placed.sockets[front.socket] else { continue }
            let known = reactors.updateValue(reactor, forKey: groups.representative(of: .socket(front.socket)))
            guard known ?? reactor == reactor else { return .failure(Conflict(key: "vhost-user-scsi[\(index)]")) }
        }

        var load = [Int](repeating: 0, count: configuration.reactors)
        for reactor in reactors.values { load[reactor] += 1 }
        func reactor(of member: Member) -> Int {
            let group = groups.representative(of: member)
            if let reactor = reactors[group] { return reactor }
            // The first of those with the fewest groups: with nothing placed, each in turn.
            let next = load.indices.min { load[$0] < load[$1] }!
            load[next] += 1
            reactors[group] = next
            return next
        }
        var placement = Placement()
        // Sockets first and in the order of the file, so that those which do work are spread evenly.
        for front in configuration.vhostUserFronts {
            placement.sockets[front.socket] = reactor(of: .socket(front.socket))
        }
        for (name, target) in configuration.targets.sorted(by: { $0.key < $1.key }) {
            placement.targets[name] = reactor(of: .target(name))
            for unit in target.logicalUnits.values { placement.backstores[unit.backstore] = placement.targets[name] }
        }
        return .success(placement)
    }

    private typealias Groups = DisjointSets<Member>

    fileprivate enum Member: Hashable {
        case socket(String)
        case target(NAAName)
        case backstore(String)
    }
}

extension DisjointSets where Element == Placement.Member {
    /// The groups of what shares logical units.
    fileprivate init(_ configuration: Configuration) {
        for (name, target) in configuration.targets {
            insert(.target(name))
            for unit in target.logicalUnits.values { join(.target(name), .backstore(unit.backstore)) }
        }
        for front in configuration.vhostUserFronts {
            insert(.socket(front.socket))
            for target in front.targets.values where !front.isSpread { join(.socket(front.socket), .target(target)) }
        }
    }
}

/// Sets of things without common members, which can be joined (union-find).
struct DisjointSets<Element: Hashable> {
    private var parents: [Element: Element] = [:]

    /// Adds a set of one element, if the element is in none yet.
    mutating func insert(_ element: Element) {
        if parents[element] == nil { parents[element] = element }
    }

    /// Makes one set of the sets of two elements.
    mutating func join(_ left: Element, _ right: Element) {
        insert(left)
        insert(right)
        parents[representative(of: left)] = representative(of: right)
    }

    /// The one element that stands for the set: two elements are in the same set if theirs is the same.
    mutating func representative(of element: Element) -> Element {
        var root = element
        while let parent = parents[root], parent != root { root = parent }
        var step = element
        while let parent = parents[step], parent != root {
            parents[step] = root
            step = parent
        }
        return root
    }
}
