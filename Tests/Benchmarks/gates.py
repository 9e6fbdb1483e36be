# gates: what one I/O may cost, in numbers that do not depend on the clock.
#
# Owns: the comparison with Tests/Benchmarks/costs.json. Called by: Scripts/run_tests.py, and a developer who records
# new numbers. Must not know: how the measured program works.

"""Measures instructions, heap allocations and calls of Swift's runtime for each I/O, under valgrind.

The instructions must be those that are recorded; allocations and calls of the runtime (retain, release, exclusivity
checks) must not be there at all.

The measured program, core-bench, is run twice with different counts of I/O: the difference is what the I/O costs,
whatever its start costs. `gates.py --record` writes the numbers of this machine's build into costs.json.
"""

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [os.path.join(ROOT, "Tests", "EndToEnd")]

from harness import report  # noqa: E402

COSTS = os.path.join(HERE, "costs.json")
PROGRAM = os.path.join(ROOT, ".build", "release", "core-bench")
PROGRAM_MODULE = "core_bench"  # in its functions' symbols
# Enough that a change of one instruction shows, few enough that valgrind is done in seconds. Multiples of the program's
# queue depth, 32.
FEW, MANY = 3_200, 35_200
VALGRIND_SECONDS = 300
ATTEMPTS = 5  # at counting allocations


class MeasurementFailed(Exception):
    """valgrind or the measured program failed; the text shows what they said."""


@dataclass
class Profile:
    """What callgrind has counted in one run."""

    instructions: int
    calls: collections.Counter  # by caller and callee


def read_calls(path: str) -> collections.Counter:
    """Who calls whom how often, of callgrind's file. It writes a function's name once, then its number only."""
    names: dict[str, str] = {}
    calls: collections.Counter = collections.Counter()
    caller = callee = ""

    def named(text: str) -> str:
        number, _, name = text.strip().partition(" ")
        return names.setdefault(number, name)

    with open(path) as file:
        for line in file:
            if line.startswith("fn="):
                caller = named(line[3:])
            elif line.startswith("cfn="):
                callee = named(line[4:])
            elif line.startswith("calls="):
                calls[caller, callee] += int(line[6:].split()[0])
    return calls


class Measurement:
    """A program, copied and stripped: valgrind cannot read the debug information of Swift's compiler."""

    def __init__(self, program: str = PROGRAM) -> None:
        self._directory = tempfile.mkdtemp(prefix="targetd-gates-")
        self._program = os.path.join(self._directory, os.path.basename(program))
        self._profiles: dict[tuple, Profile] = {}
        shutil.copy(program, self._program)
        subprocess.run(["strip", "--strip-debug", self._program], check=True)

    def __enter__(self) -> "Measurement":
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self._directory)

    def instructions(self, arguments: list[str]) -> float:
        """Instructions for each I/O of the workload that these arguments choose."""
        few, many = self._profile(arguments, FEW), self._profile(arguments, MANY)
        return (many.instructions - few.instructions) / (MANY - FEW)

    def runtime_calls(self, arguments: list[str]) -> dict[tuple[str, str], float]:
        """Calls of Swift's runtime for each I/O, by who calls what; without those of the measured program's own."""
        few, many = self._profile(arguments, FEW), self._profile(arguments, MANY)
        changes = {pair: (count - few.calls[pair]) / (MANY - FEW) for pair, count in many.calls.items()}
        return {
            (caller, callee): change for (caller, callee), change in changes.items()
            if change > 0.001 and callee.startswith("swift_")
            and caller.startswith("$s") and PROGRAM_MODULE not in caller
        }  # fmt: skip

    def allocations(self, arguments: list[str]) -> float:
        """Heap allocations for each I/O of the workload that these arguments choose.

        The start of a Swift program takes one more or one less by chance (1 run in 20). What an I/O takes is there
        every time.
        """
        for _ in range(ATTEMPTS):
            change = self._allocations(arguments, MANY) - self._allocations(arguments, FEW)
            if change == 0:
                break
        return change / (MANY - FEW)

    def _profile(self, arguments: list[str], count: int) -> Profile:
        key = (*arguments, count)
        if key not in self._profiles:
            out = os.path.join(self._directory, "callgrind.out")
            text = self._valgrind(["--tool=callgrind", f"--callgrind-out-file={out}"], arguments, count)
            self._profiles[key] = Profile(self._number(r"Collected : (\d+)", text), read_calls(out))
        return self._profiles[key]

    def _allocations(self, arguments: list[str], count: int) -> int:
        text = self._valgrind(["--tool=memcheck", "--leak-check=no", "--undef-value-errors=no"], arguments, count)
        return self._number(r"total heap usage: ([\d,]+) allocs", text)

    def _valgrind(self, options: list[str], arguments: list[str], count: int) -> str:
        return self._run(["valgrind", *options, self._program, str(count), *arguments])

    @staticmethod
    def _run(command: list[str]) -> str:
        result = subprocess.run(command, capture_output=True, text=True, timeout=VALGRIND_SECONDS)
        if result.returncode != 0:
            said = result.stderr[-2000:]
            raise MeasurementFailed(f"'{' '.join(command)}' ended with status {result.returncode}:\n{said}")
        return result.stdout + result.stderr

    @staticmethod
    def _number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if not found:
            raise MeasurementFailed(f"valgrind did not say '{pattern}':\n{text[-2000:]}")
        return int(found[1].replace(",", ""))


def read_costs(path: str = COSTS) -> dict:
    with open(path) as file:
        return json.load(file)


def judge(workload: str, measured: float, costs: dict) -> str:
    """What to say of a number of instructions that is as recorded; raises if it is not."""
    recorded, tolerance = costs["workloads"][workload]["instructions"], costs["tolerance_percent"]
    change = 100 * (measured - recorded) / recorded
    said = f"{measured:.1f} instructions for each I/O, {recorded} are recorded ({change:+.1f} %)"
    report.require(change <= tolerance, f"{said}: more than {tolerance} % above")
    # A gain that is not recorded would hide the next loss.
    report.require(change >= -tolerance, f"{said}: a gain; record it: python3 Tests/Benchmarks/gates.py --record")
    return said


class Gates(report.Group):
    """For each recorded workload: its instructions, and that it allocates nothing."""

    title = "What one I/O costs"

    def prepare(self) -> None:
        if not os.path.exists(PROGRAM):
            raise report.Failed(f"{PROGRAM} is not there; build it: swift build -c release --product core-bench")
        self.costs = read_costs()
        self.measurement = Measurement()

    def finish(self) -> None:
        if hasattr(self, "measurement"):
            self.measurement.__exit__()

    def cases(self):
        found = []
        for workload in read_costs()["workloads"]:
            found += [
                (f"{workload}: instructions are as recorded", lambda workload=workload: self._instructions(workload)),
                (f"{workload}: Swift's runtime is not called", lambda workload=workload: self._runtime_calls(workload)),
                (f"{workload}: nothing is allocated", lambda workload=workload: self._allocations(workload)),
            ]
        return found

    def _instructions(self, workload: str) -> str:
        arguments = self.costs["workloads"][workload]["arguments"]
        return judge(workload, self.measurement.instructions(arguments), self.costs)

    def _runtime_calls(self, workload: str) -> None:
        calls = self.measurement.runtime_calls(self.costs["workloads"][workload]["arguments"])
        listing = "\n".join(f"{count:.2f} x {callee} by {caller}" for (caller, callee), count in sorted(calls.items()))
        report.require(not calls, f"calls for each I/O:\n{demangled(listing)}")

    def _allocations(self, workload: str) -> None:
        count = self.measurement.allocations(self.costs["workloads"][workload]["arguments"])
        report.require(count == 0, f"{count} heap allocations for each I/O")


def demangled(text: str) -> str:
    """The text with Swift's symbols as a reader knows them, if the toolchain is at hand."""
    result = subprocess.run(["swift", "demangle", "--simplified"], input=text, capture_output=True, text=True)
    return result.stdout if result.returncode == 0 else text


def record(program: str, path: str) -> None:
    """Writes what the program costs now."""
    costs = read_costs(path)
    with Measurement(program) as measurement:
        for name, workload in costs["workloads"].items():
            workload["instructions"] = round(measurement.instructions(workload["arguments"]))
            print(f"{name}: {workload['instructions']} instructions")
    with open(path, "w") as file:
        json.dump(costs, file, indent=4)
        file.write("\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write this build's numbers into costs.json")
    parser.add_argument("--program", default=PROGRAM, help="the program to record (default: the release build's)")
    options = parser.parse_args()
    if options.record:
        record(options.program, COSTS)
        return 0
    results = report.Report()
    group = Gates()
    results.run(group, {title for title, _ in group.cases()})
    return 0 if results.summary() else 1


if __name__ == "__main__":
    sys.exit(main())
