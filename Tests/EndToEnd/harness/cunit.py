# cunit: what iscsi-test-cu prints, as outcomes of tests.
#
# Owns nothing. Called by: groups/conformance. Must not know: guests.

"""Reads the output of libiscsi's conformance suite; CUnit itself counts a skipped test as passed."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Test:
    """One test of the suite."""

    name: str  # Family.Test
    outcome: str  # passed, failed, skipped
    reason: str = ""


def parse(output: str) -> list[Test]:
    """The tests of `iscsi-test-cu -v`, in the order in which they ran. One that did not come to its end has failed."""
    tests = []
    family = ""
    # The suite's own remarks come before the verdict: "Test: X ...    [SKIPPED] why\npassed".
    pieces = re.split(r"^(Suite: \S+|\s*Test: \S+ \.\.\.)", output.replace("\r", ""), flags=re.M)
    for heading, body in zip(pieces[1::2], pieces[2::2]):
        name = heading.split()[1]
        if heading.startswith("Suite:"):
            family = name
            continue
        body = body.partition("\nRun Summary:")[0]
        tests.append(_verdict(f"{family}.{name}", body))
    return tests


def _verdict(name: str, body: str) -> Test:
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    remark = {word: [line.partition(f"[{word}]")[2].strip() for line in lines if f"[{word}]" in line]
              for word in ["FAILED", "SKIPPED"]}  # fmt: skip
    if re.search(r"FAILED\s*$", body, re.M) and re.search(r"^\s*\d+\. \S+:\d+", body, re.M):
        where = [line for line in lines if re.match(r"\d+\. \S+:\d+", line)]
        return Test(name, "failed", "; ".join(dict.fromkeys(remark["FAILED"])) or " ".join(where))
    if not re.search(r"passed\s*$", body, re.M):
        return Test(name, "failed", "the test did not come to its end: " + " ".join(lines[-2:]))
    if remark["SKIPPED"]:
        return Test(name, "skipped", remark["SKIPPED"][-1])
    return Test(name, "passed")
