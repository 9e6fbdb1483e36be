#!/usr/bin/env python3
# run: runs the end-to-end cases.
#
# Owns nothing. Called by: Scripts/run_tests.py, and a developer. Must not know: any case.

"""Runs the end-to-end cases against our daemon, or against QEMU's own disks to check the cases themselves."""

import argparse
import sys

import groups
from harness import processes, report, targets


def run(wanted: list[str], kind: type[targets.Target], into: report.Report) -> None:
    """Runs the groups of these names, and the cases with one of these words in their titles; all if there are none.

    A group whose cases build on each other runs as a whole.
    """
    names = {word.lower() for word in wanted} & {group_type.__name__.lower() for group_type in groups.ALL}
    words = {word.lower() for word in wanted} - names
    for group_type in groups.ALL:
        group = group_type(kind)
        titles = [title for title, _ in group.cases()]
        if not wanted or group_type.__name__.lower() in names:
            chosen = titles
        else:
            chosen = [title for title in titles if any(word in title.lower() for word in words)]
            chosen = titles if chosen and group.ordered else chosen
        into.run(group, set(chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="*", help="a group, or a word of the titles of the cases to run")
    parser.add_argument("--target", choices=["daemon", "reference"], default="daemon", help="what serves the disks")
    parser.add_argument("--list", action="store_true", help="print groups and cases, run nothing")
    options = parser.parse_args()
    kind = targets.Daemon if options.target == "daemon" else targets.Reference
    if options.list:
        for group_type in groups.ALL:
            print(f"{group_type.__name__}: {group_type.title}")
            for title, _ in group_type(kind).cases():
                print(f"  {title}")
        return 0
    processes.clean_up_on_exit()
    results = report.Report()
    run(options.name, kind, results)
    if not results.outcomes:
        print(f"run.py: no case is called {' or '.join(options.name)}; --list shows them all", file=sys.stderr)
        return 2
    return 0 if results.summary() else 1


if __name__ == "__main__":
    sys.exit(main())
