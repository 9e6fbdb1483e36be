# report: cases, groups of them, and what is printed about them.
#
# Owns: the outcome of every case. Called by: run.py and Scripts/run_tests.py. Must not know: guests or targets.

"""A small runner: a group prepares once (boots a guest, say), its cases run in their order, each reported by itself."""

import sys
import time
import traceback
from dataclasses import dataclass


class Skipped(Exception):
    """The case, or the whole group, cannot be decided here; the text says why."""


class Failed(Exception):
    """What the case demands does not hold; the text says what was seen instead."""


def require(condition: object, otherwise: str) -> None:
    """Fails the case with this text unless the condition holds."""
    if not condition:
        raise Failed(otherwise)


def case(title: str):
    """Marks a method of a group as a case, and says what it shows."""

    def mark(function):
        function.title = title
        return function

    return mark


class Group:
    """Cases that share a preparation. Subclasses mark methods with @case; they run in the order of their definition."""

    title = ""
    ordered = False  # whether each case needs the ones before it

    def prepare(self) -> None:
        """Before the first case."""

    def finish(self) -> None:
        """After the last case, whatever happened."""

    def cases(self) -> list[tuple[str, object]]:
        """Titles and functions of the cases."""
        found = []
        for kind in reversed(type(self).__mro__):
            found += [(f.title, getattr(self, n)) for n, f in vars(kind).items() if hasattr(f, "title") and callable(f)]
        return found


@dataclass
class Outcome:
    """How a case ended."""

    group: str
    title: str
    kind: str  # passed, failed, skipped
    seconds: float
    text: str = ""


class Report:
    """Prints each outcome as it comes, and the sum at the end."""

    WORDS = {"passed": ("ok  ", 32), "failed": ("FAIL", 31), "skipped": ("skip", 33)}

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self._tallied = 0
        self._colour = sys.stdout.isatty()

    def heading(self, text: str) -> None:
        print(self._paint(f"\n{text}", 1), flush=True)

    def note(self, text: str) -> None:
        for line in text.splitlines():
            print(f"       {line}", flush=True)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        word, colour = self.WORDS[outcome.kind]
        print(f"  {self._paint(word, colour)} {outcome.title} ({outcome.seconds:.1f} s)", flush=True)
        if outcome.text:
            self.note(outcome.text)

    def tally(self, passed: int, seconds: float) -> None:
        """Counts tests that another runner has run, and of which only their number is known here."""
        self._tallied += passed
        print(f"  {passed} passed ({seconds:.1f} s)", flush=True)

    def run(self, group: Group, titles: set[str]) -> None:
        """Runs those of a group's cases that have these titles."""
        cases = [(title, function) for title, function in group.cases() if title in titles]
        if not cases:
            return
        self.heading(group.title)
        broken = None
        begin = time.monotonic()
        try:
            try:
                group.prepare()
            except Exception as error:
                broken = error
            for title, function in cases:
                self.add(self._outcome(group, title, function if broken is None else _raising(broken), begin))
                begin = time.monotonic()
                if broken is not None and not isinstance(broken, Skipped):
                    # Every case is reported as failed; the reason is told once.
                    broken = Failed("what the group prepares has failed, see its first case")
        finally:
            try:
                group.finish()
            except Exception as error:
                self.add(self._outcome(group, "everything ends as it must", _raising(error), begin))

    def _outcome(self, group: Group, title: str, function, begin: float) -> Outcome:
        kind, text = "passed", ""
        try:
            text = function() or ""
        except Skipped as error:
            kind, text = "skipped", str(error)
        except Exception as error:
            kind, text = "failed", str(error) or type(error).__name__
            if isinstance(error, (AssertionError, LookupError, TypeError, ValueError, AttributeError)):
                text = "".join(traceback.format_exception(error))  # a fault of the harness itself
        return Outcome(group.title, title, kind, time.monotonic() - begin, text)

    def count(self, kind: str) -> int:
        return sum(outcome.kind == kind for outcome in self.outcomes) + (self._tallied if kind == "passed" else 0)

    def summary(self) -> bool:
        """Prints what failed and what was skipped, once more, and the numbers. True if nothing failed."""
        for kind, what in [("skipped", "Skipped"), ("failed", "Failed")]:
            chosen = [outcome for outcome in self.outcomes if outcome.kind == kind]
            if chosen:
                self.heading(f"{what}:")
            for outcome in chosen:
                first = outcome.text.strip().splitlines()[0] if outcome.text.strip() else ""
                print(f"  {outcome.group}: {outcome.title}: {first}")
        failed = self.count("failed")
        line = f"{self.count('passed')} passed, {failed} failed, {self.count('skipped')} skipped"
        print(self._paint(f"\n{line}", 31 if failed else 32), flush=True)
        return failed == 0

    def _paint(self, text: str, colour: int) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text


def _raising(error: Exception):
    def raise_it():
        raise error

    return raise_it
