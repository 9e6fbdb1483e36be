// UnitStates: where the daemon's logical units keep what survives power loss.
//
// Called by: the daemon, at its start. Must not know: the units, what they keep.

import Backstores
import Glibc
import Logging

extension Configuration {
    /// The directory that the configuration or the service manager names; `nil`: neither does.
    private var effectiveStateDirectory: String? {
        if let stateDirectory { return stateDirectory }
        // systemd.exec(5): the directories of StateDirectory=, with colons between them.
        guard let list = unsafe getenv("STATE_DIRECTORY") else { return nil }
        return unsafe String(cString: list).split(separator: ":").first.map(String.init)
    }

    /// Opens the directory, and holds it for as long as the result lives.
    func openStateDirectory(_ logger: Logger) throws(ChangeError) -> StateDirectory? {
        guard let path = effectiveStateDirectory else {
            logger.info(
                "no state-directory: reservations, saved mode pages and identifying information end with targetd")
            return nil
        }
        do {
            return try StateDirectory(path: path)
        } catch {
            throw ChangeError(text: "state-directory: \(error)")
        }
    }
}
