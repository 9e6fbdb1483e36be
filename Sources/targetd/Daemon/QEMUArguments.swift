// QEMUArguments: how a guest is attached to a socket, in QEMU's words.
//
// Called by: the daemon at start. Must not know: sockets themselves.

/// The arguments for one socket.
enum QEMUArguments {
    /// Lines for a shell, joined by backslashes.
    ///
    /// - Parameters:
    ///   - front: The socket.
    ///   - index: Its place among the sockets: identifiers in QEMU must differ when a guest attaches to several.
    static func lines(for front: VhostUserFrontConfiguration, index: Int) -> String {
        // The guest's memory must be a file that QEMU can hand to targetd, and SIZE must be that of -m.
        let arguments = [
            "-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem",
            "-chardev socket,id=targetd\(index),path=\(quoted(optionValue(front.socket)))"
                // QEMU waits there until targetd has connected.
                + (front.mode == .client ? ",server=on" : ""),
            "-device vhost-user-scsi-pci,chardev=targetd\(index),num_queues=\(front.queues)",
        ]
        return arguments.joined(separator: " \\\n    ")
    }

    /// A value inside a QEMU option: commas are doubled.
    private static func optionValue(_ text: String) -> String { text.replacing(",", with: ",,") }

    private static func quoted(_ text: String) -> String {
        let isPlain = text.allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || "/._-+:@%,".contains($0)) }
        return isPlain ? text : "'" + text.replacing("'", with: "'\\''") + "'"
    }
}
