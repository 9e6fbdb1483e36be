# gates: what one I/O may cost, in numbers that do not depend on the clock.
#
# Owns: the comparison with Tests/Benchmarks/costs.json. Called by: Scripts/run_tests.py, and a developer who records
# new numbers. Must not know: how the measured program works.

"""Measures instructions and heap allocations for each I/O under valgrind, and compares them with the recorded numbers.

The measured program, core-bench, is run twice with different counts of I/O: the difference is what the I/O costs,
whatever its start costs. `gates.py --record` writes the numbers of this machine's build into costs.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [os.path.join(ROOT, "Tests", "EndToEnd")]

from harness import report  # noqa: E402

COSTS = os.path.join(HERE, "costs.json")
PROGRAM = os.path.join(ROOT, ".build", "release", "core-bench")
# Enough that a change of one instruction shows, few enough that valgrind is done in seconds.
FEW, MANY = 1_000, 11_000
VALGRIND_SECONDS = 300


class MeasurementFailed(Exception):
    """valgrind or the measured program failed; the text shows what they said."""


class Measurement:
    """A program, copied and stripped: valgrind cannot read the debug information of Swift's compiler."""

    def __init__(self, program: str = PROGRAM) -> None:
        self._directory = tempfile.mkdtemp(prefix="targetd-gates-")
        self._program = os.path.join(self._directory, os.path.basename(program))
        shutil.copy(program, self._program)
        subprocess.run(["strip", "--strip-debug", self._program], check=True)

    def __enter__(self) -> "Measurement":
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self._directory)

    def workloads(self) -> list[str]:
        """The workloads that the program knows."""
        return self._run([self._program, "--list"]).split()

    def instructions(self, workload: str) -> float:
        """Instructions for each I/O."""
        return self._for_each(workload, self._instructions)

    def allocations(self, workload: str) -> float:
        """Heap allocations for each I/O."""
        return self._for_each(workload, self._allocations)

    def _for_each(self, workload: str, measure) -> float:
        return (measure(workload, MANY) - measure(workload, FEW)) / (MANY - FEW)

    def _instructions(self, workload: str, count: int) -> int:
        out = os.path.join(self._directory, "callgrind.out")
        text = self._valgrind(["--tool=callgrind", f"--callgrind-out-file={out}"], workload, count)
        return self._number(r"Collected : (\d+)", text)

    def _allocations(self, workload: str, count: int) -> int:
        text = self._valgrind(["--tool=memcheck", "--leak-check=no", "--undef-value-errors=no"], workload, count)
        return self._number(r"total heap usage: ([\d,]+) allocs", text)

    def _valgrind(self, options: list[str], workload: str, count: int) -> str:
        return self._run(["valgrind", *options, self._program, "--workload", workload, "--count", str(count)])

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
    recorded, tolerance = costs["instructions"][workload], costs["tolerance_percent"]
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
        found = super().cases()
        for workload in read_costs()["instructions"]:
            found += [
                (f"{workload}: instructions are as recorded", lambda workload=workload: self._instructions(workload)),
                (f"{workload}: nothing is allocated", lambda workload=workload: self._allocations(workload)),
            ]
        return found

    @report.case("every workload of core-bench has a recorded number")
    def complete(self):
        known, recorded = set(self.measurement.workloads()), set(self.costs["instructions"])
        report.require(known == recorded, f"core-bench knows {sorted(known)}, costs.json has {sorted(recorded)}")

    def _instructions(self, workload: str) -> str:
        return judge(workload, self.measurement.instructions(workload), self.costs)

    def _allocations(self, workload: str) -> None:
        count = self.measurement.allocations(workload)
        report.require(count == 0, f"{count} heap allocations for each I/O")


def record(program: str, path: str) -> None:
    """Writes what the program costs now."""
    costs = read_costs(path)
    with Measurement(program) as measurement:
        costs["instructions"] = {name: round(measurement.instructions(name)) for name in measurement.workloads()}
    with open(path, "w") as file:
        json.dump(costs, file, indent=4)
        file.write("\n")
    print(json.dumps(costs["instructions"], indent=4))


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
