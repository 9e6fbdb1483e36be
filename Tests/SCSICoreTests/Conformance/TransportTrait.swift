// TransportTrait: in this module the conformance suite calls the target, in one way only; VirtioFrontTests have a trait
// of this name that runs each test on several transports.
//
// Called by: the suites. Must not know: transports.

import Testing

/// Runs each test of a suite on each transport of the module: none here.
struct TransportTrait: SuiteTrait, TestTrait {}

extension Trait where Self == TransportTrait {
    /// Each way in which this module brings commands to the target.
    static var onEachTransport: Self { Self() }
}
