// InformationalExceptions: what a logical unit's log and error counters tell initiators of (SPC-4 7.3.2, 7.3.8): a
// medium that has failed and will again, a threshold that is met.
//
// Called by: LogicalUnit (errors of the medium), LOG SELECT, MODE SELECT, REQUEST SENSE. Must not know: the format of
// log pages.

extension LogicalUnit {
    /// LOG SELECT has changed something; everybody else learns of it (SPC-4 6.7).
    func setLog(_ log: LogState, by nexus: UInt16) {
        self.log = log
        establish(.logParametersChanged, exceptFor: nexus)
    }

    /// A request of a command, or of the unit for one, was given up because of the medium.
    func mediumErrorOccurred(_ page: ErrorCounterPage) {
        unsafe counters.pointee[keyPath: page.counters].uncorrected += 1
        errorCountersChanged(page)
        guard !log.failurePredicted else { return }
        log.failurePredicted = true
        if !modePages.informationalExceptions.isTest { informationalExceptionOccurred() }
    }

    /// The informational exception condition that there is, reported or not (SPC-4 7.3.8): the test of one, or a
    /// medium that has failed once and will again.
    var informationalException: UnitAttention? {
        if modePages.informationalExceptions.isTest { return .failurePredictedFalsely }
        return log.failurePredicted ? .failurePredicted : nil
    }

    /// What REQUEST SENSE tells of it (MRIE 6).
    var exceptionOnRequest: AdditionalSense? {
        let control = modePages.informationalExceptions
        return control.isEnabled && control.method == .onRequest ? informationalException?.code : nil
    }

    /// There is an informational exception condition that was not there before (MRIE 2).
    func informationalExceptionOccurred() {
        let control = modePages.informationalExceptions
        guard control.isEnabled, control.method == .unitAttention, let exception = informationalException else {
            return
        }
        establish(exception, exceptFor: nil)
    }

    /// Establishes THRESHOLD CONDITION MET if a counter that has changed meets its threshold and RLEC says to report
    /// it (SPC-4 7.3.2, 7.5.8).
    func errorCountersChanged(_ page: ErrorCounterPage) {
        guard modePages.reportLogExceptions, log.meetsThreshold(page, statistics) else { return }
        establish(.thresholdConditionMet, exceptFor: nil)
    }
}
