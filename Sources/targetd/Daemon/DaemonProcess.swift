import Logging
enum DaemonProcess {
    static func run(_ configuration: Configuration) async -> ExitStatus { .startFailed }
}
