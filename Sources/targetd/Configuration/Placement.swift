// Placement: which reactor does what.
//
// Owns: the rule. Called by: the daemon. Must not know: reactors themselves.

/// The reactor of each target and each socket, by index.
///
/// A logical unit's task set is touched by one thread only, so whatever shares a unit is on one reactor: a target with
/// its units, a socket with its targets. Such groups are dealt out to the reactors in turn.
struct Placement: Equatable {
    private(set) var targets: [NAAName: Int] = [:]
    private(set) var sockets: [String: Int] = [:]

    /// Places what is in a configuration. The same configuration gives the same placement.
    init(_ configuration: Configuration) {
        var groups = DisjointSets<Member>()
        for name in configuration.targets.keys { groups.insert(.target(name)) }
        for (name, target) in configuration.targets {
            for unit in target.logicalUnits.values { groups.join(.target(name), .backstore(unit.backstore)) }
        }
        for front in configuration.vhostUserFronts {
            groups.insert(.socket(front.socket))
            for target in front.targets.values { groups.join(.socket(front.socket), .target(target)) }
        }

        var reactors: [Member: Int] = [:]
        func reactor(of member: Member) -> Int {
            let group = groups.representative(of: member)
            if let reactor = reactors[group] { return reactor }
            let next = reactors.count % configuration.reactors
            reactors[group] = next
            return next
        }
        // Sockets first and in the order of the file, so that those which do work are spread evenly.
        for front in configuration.vhostUserFronts { sockets[front.socket] = reactor(of: .socket(front.socket)) }
        for name in configuration.targets.keys.sorted() { targets[name] = reactor(of: .target(name)) }
    }

    private enum Member: Hashable {
        case socket(String)
        case target(NAAName)
        case backstore(String)
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
