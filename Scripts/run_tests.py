# run_tests: the parts of the project's tests, one after the other, and one sum at the end.
#
# Owns nothing. Called by: Scripts/test. Must not know: any single test.

"""Runs the project's tests. Without arguments: all of them. Exits with 0 if nothing failed."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "Tests", "EndToEnd"), os.path.join(ROOT, "Tests", "Benchmarks")]

import compare  # noqa: E402
import gates  # noqa: E402
import groups  # noqa: E402
import run as end_to_end  # noqa: E402
from harness import processes, report, targets  # noqa: E402

LINT_SECONDS = 300
BUILD_SECONDS = 1800
UNIT_SECONDS = 1200
FUZZ_SECONDS = 600


class CommandFailed(Exception):
    """A command ended with another status than 0, or not at all."""


def command(*words: str, seconds: float, each_line=lambda line: None) -> list[str]:
    """Runs a command in the repository, hands out its lines as they come, and returns them."""
    log = os.path.join(ROOT, ".build", "run_tests.log")
    os.makedirs(os.path.dirname(log), exist_ok=True)
    child = processes.start(
        list(words), log, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    lines: list[str] = []
    limit = time.monotonic() + seconds
    os.set_blocking(child.stdout.fileno(), False)
    rest = b""
    try:
        while True:
            data = child.stdout.read()
            if data is None:
                if time.monotonic() > limit:
                    raise CommandFailed(f"'{' '.join(words)}' did not end in {seconds:.0f} s; it last said\n"
                                        + "\n".join(lines[-20:]))  # fmt: skip
                time.sleep(0.05)
                continue
            *complete, rest = (rest + data).split(b"\n")
            for line in [piece.decode(errors="replace") for piece in complete]:
                lines.append(line)
                each_line(line)
            if not data:
                break
        child.wait()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, 9)  # its own session, so its children end with it
        processes.kill(child)
    if child.returncode != 0:
        raise CommandFailed(f"'{' '.join(words)}' ended with status {child.returncode}:\n" + "\n".join(lines[-40:]))
    return lines


class Commands(report.Group):
    """A part of which every case is one command."""

    def __init__(self, title: str, cases: list[tuple[str, list[str], float]]) -> None:
        self.title = title
        self._cases = cases

    def cases(self):
        def runner(words: list[str], seconds: float):
            def run() -> None:
                command(*words, seconds=seconds)

            return run

        return [(title, runner(words, seconds)) for title, words, seconds in self._cases]


def everything(group: report.Group) -> set[str]:
    return {title for title, _ in group.cases()}


def lint(results: report.Report, _: list[str]) -> None:
    group = Commands("Format", [
        ("swift format lint --strict finds nothing",
         ["swift", "format", "lint", "--strict", "--parallel", "--recursive", "Package.swift", "Sources", "Tests"],
         LINT_SECONDS),
    ])  # fmt: skip
    results.run(group, everything(group))


def build(results: report.Report, _: list[str]) -> None:
    group = Commands("Build", [
        ("debug, with the tests", ["swift", "build", "--build-tests"], BUILD_SECONDS),
        ("release", ["swift", "build", "-c", "release"], BUILD_SECONDS),
    ])  # fmt: skip
    results.run(group, everything(group))


def unit(results: report.Report, words: list[str]) -> None:
    """Swift's tests: those that fail are reported one by one, the others as a number."""
    results.heading("Unit tests")
    begin = time.monotonic()
    passed = 0
    issues: dict[str, list[str]] = {}

    last: list[str] = []  # the texts of the latest issue, which may go on over lines

    def follow(line: str) -> None:
        nonlocal passed, last
        if found := re.match(r"^\S Test (?!run with)(.+?)(?: with \d+ test cases?)? (passed|failed) after", line):
            if found[2] == "failed":
                text = "\n".join(issues.get(found[1], ["no issue was recorded"]))
                results.add(report.Outcome("Unit tests", found[1], "failed", 0, text))
                return
            passed += 1
            if passed % 50 == 0:
                results.note(f"{passed} passed")
        elif found := re.match(r"^\S Test (.+?) recorded an issue(?: with .*?)? at (\S+: .*)", line):
            last = issues.setdefault(found[1], [])
            last.append(found[2])
        elif line.startswith("↳") and last:
            last.append(line)
        elif found := re.match(r"^\S Test (.+?) skipped: (.*)", line):
            results.add(report.Outcome("Unit tests", found[1], "skipped", 0, found[2]))

    filters = [word for name in words for word in ("--filter", name)]
    failed = results.count("failed")
    try:
        command("swift", "test", "--disable-xctest", "--no-parallel", *filters, seconds=UNIT_SECONDS, each_line=follow)
    except CommandFailed as error:
        if results.count("failed") == failed:  # none failed, yet: a crash, or a build that failed
            results.add(report.Outcome("Unit tests", "swift test", "failed", time.monotonic() - begin, str(error)))
    results.tally(passed, time.monotonic() - begin)


def e2e(results: report.Report, words: list[str]) -> None:
    end_to_end.run(words, targets.Daemon, results)


def gate(results: report.Report, _: list[str]) -> None:
    for group in [gates.Gates(), compare.Smoke()]:
        results.run(group, everything(group))


# What real threads do at once, and what is done with memory at random: the files of each test target that are run under
# a sanitizer (None: all). Only what these tests need is built.
SANITIZED = {
    "thread": {"SCSICoreTests": ["ShardLinkTests.swift", "ShardThreadTests.swift"]},
    "address": {"SCSICoreTests": None, "SimulationTests": None},
}
# The same of the daemon as a whole, built with all that it needs, which takes its time: the target, and its suite.
DAEMON_TARGET, DAEMON_SUITE = "targetdTests", "ConcurrentOperationTests"
# What is run without a name. The others are run before a release, and after changes to threads or memory.
SANITIZED_ALWAYS = ["thread", "daemon-address"]


def sanitize(results: report.Report, words: list[str]) -> None:
    """Tests under the sanitizers that are named, or under those of every run. Each has a build of its own."""
    known = [*SANITIZED, *(f"daemon-{sanitizer}" for sanitizer in SANITIZED)]
    for word in words or SANITIZED_ALWAYS:
        if word not in known:
            raise SystemExit(f"no sanitizer is called '{word}': there are {', '.join(known)}")
        sanitizer = word.removeprefix("daemon-")
        if word == sanitizer:
            package, chosen, only = core_package(sanitizer, SANITIZED[sanitizer]), [], {}
        else:
            package, chosen, only = ROOT, ["--filter", DAEMON_SUITE], {"TARGETD_TEST_TARGET": DAEMON_TARGET}
        build = ["--package-path", package, "--scratch-path", os.path.join(ROOT, ".build", f"sanitize-{word}"),
                 f"--sanitize={sanitizer}"]  # fmt: skip
        # The backtrace of a crash would be the sanitizer's report twice. Leaks are not looked for: XCTest has some.
        os.environ |= {"SWIFT_BACKTRACE": "enable=no", "ASAN_OPTIONS": "detect_leaks=0",
                       "TSAN_OPTIONS": "halt_on_error=1"} | only  # fmt: skip
        group = Commands(f"{word.capitalize()} sanitizer", [
            ("build", ["swift", "build", "--build-tests", *build], BUILD_SECONDS),
            ("tests find nothing",
             ["swift", "test", "--skip-build", *build, "--disable-xctest", "--no-parallel", *chosen],
             UNIT_SECONDS),
        ])  # fmt: skip
        results.run(group, everything(group))
        for name in only:
            del os.environ[name]


def core_package(name: str, tests: dict[str, list[str] | None]) -> str:
    """A package of the core and some of its tests: a sanitized build of all would take ten times as long."""
    folder = linked_folder(name)
    with open(os.path.join(ROOT, "Package.swift")) as file:
        text = file.read()
    settings = text[text.index("let settings"):text.index("let package")]
    targets = "\n".join(
        f"""        .testTarget(
            name: "{target}", dependencies: ["SCSICore", "CoreTestSupport"] + headers,
            {"sources: " + json.dumps(files) + ", " if files else ""}swiftSettings: settings),"""
        for target, files in tests.items())  # fmt: skip
    manifest = f"""{text.splitlines()[0]}
import PackageDescription
{settings}
let headers: [Target.Dependency] = ["CBackstore", "CTarget", "CIOVector"]
let package = Package(
    name: "core",
    targets: [
        .systemLibrary(name: "CIOVector"), .systemLibrary(name: "CBackstore"), .systemLibrary(name: "CTarget"),
        .target(name: "SCSICore", dependencies: headers, exclude: ["README.md"], swiftSettings: settings),
        .target(
            name: "CoreTestSupport", dependencies: ["SCSICore"] + headers, path: "Tests/Support/CoreTestSupport",
            swiftSettings: settings),
{targets}
    ]
)
"""
    write_manifest(folder, manifest)
    return folder


def linked_folder(name: str) -> str:
    """A folder for a package that has our sources by links."""
    folder = os.path.join(ROOT, ".build", f"{name}-package")
    os.makedirs(folder, exist_ok=True)
    for part in ["Sources", "Tests"]:
        link = os.path.join(folder, part)
        if not os.path.islink(link):
            os.symlink(os.path.join(ROOT, part), link)
    return folder


def write_manifest(folder: str, manifest: str) -> None:
    """Writes a package's manifest, if it is another than before: a new one has everything built anew."""
    path = os.path.join(folder, "Package.swift")
    if not os.path.exists(path) or open(path).read() != manifest:
        with open(path, "w") as file:
            file.write(manifest)


# The fuzzers by name, and how many inputs the short run gives each beside its corpus.
FUZZERS = {
    "scsi": 4000, "state": 4000, "rings": 3000, "messages": 1500, "xen-ring": 4000, "xenstore": 8000,
}  # fmt: skip
FUZZ_BUILD = [
    "-c", "release",
    # Not --sanitize=address: beside -sanitize=fuzzer the compiler would take the last of the two. And what is inline in
    # headers, as every access to shared memory is, would not be looked at.
    "-Xswiftc", "-sanitize=fuzzer,address", "-Xcc", "-fsanitize=address",
    # The tests' view of internal declarations, and the messages of what goes wrong, in a release build.
    "-Xswiftc", "-enable-testing", "-Xswiftc", "-assert-config", "-Xswiftc", "Debug",
    # gold cannot read what the sanitizers add.
    "-Xswiftc", "-use-ld=lld",
]  # fmt: skip


def fuzz(results: report.Report, words: list[str]) -> None:
    """Each fuzzer on its corpus and on as many new inputs as FUZZERS says; for long with 'NAME MINUTES'."""
    minutes = float(words.pop()) if words and re.fullmatch(r"[0-9.]+", words[-1]) else 0
    for word in words:
        if word not in FUZZERS:
            raise SystemExit(f"no fuzzer is called '{word}': there are {', '.join(FUZZERS)}")
    package = fuzz_package()
    scratch = os.path.join(ROOT, ".build", "fuzz")
    build = ["--package-path", package, "--scratch-path", scratch, "--product", "fuzz", *FUZZ_BUILD]
    cases = [("build", ["swift", "build", *build], BUILD_SECONDS)]
    for name in words or FUZZERS:
        found = os.path.join(scratch, "findings", name)
        # What is new to the corpus goes to the first folder: that of a short run is not kept.
        new = os.path.join(scratch, "corpus" if minutes else "short", name)
        kept = os.path.join(ROOT, "Tests", "Fuzzers", "corpus", name)
        if not minutes:
            shutil.rmtree(new, ignore_errors=True)
        for folder in [found, new]:
            os.makedirs(folder, exist_ok=True)
        # An input is a sequence of actions, and what is deep takes some hundred bytes: short ones are not preferred
        # (-len_control).
        length = f"-max_total_time={minutes * 60:.0f}" if minutes else f"-runs={FUZZERS[name]}"
        cases.append((
            f"{name} finds nothing",
            ["env", f"TARGETD_FUZZER={name}", "SWIFT_BACKTRACE=enable=no", os.path.join(scratch, "release", "fuzz"),
             f"-artifact_prefix={found}/", "-timeout=120", "-rss_limit_mb=4096", "-max_len=512", "-len_control=0",
             "-print_funcs=0", *([] if minutes else ["-seed=1"]), length, new, kept],
            minutes * 60 + FUZZ_SECONDS))  # fmt: skip
    group = Commands("Fuzzers", cases)
    results.run(group, everything(group))


def declarations(text: str) -> dict[str, str]:
    """The declarations of the targets in the manifest, by name."""
    found: list[list[str]] = []
    for line in text[text.index("    targets: ["):].splitlines()[1:]:
        if line.startswith("    ]"):
            break
        if re.match(r" {8}\.\w", line):
            found.append([])
        if found:
            found[-1].append(line)
    blocks = ["\n".join(lines).rstrip().removesuffix(",") for lines in found]
    return {re.search(r'name: "([^"]+)"', block)[1]: block for block in blocks}


# What the fuzzers are built from.
FUZZED = ["CIOVector", "CBackstore", "CTarget", "CLinux", "CMemoryGuard", "CXen", "CXenStore", "SCSICore", "Reactor",
          "VirtioFront", "Xenbus", "XenFront", "CoreTestSupport"]  # fmt: skip


def fuzz_package() -> str:
    """A package of the fuzzers and what they need: no other build has libFuzzer."""
    folder = linked_folder("fuzz")
    with open(os.path.join(ROOT, "Package.swift")) as file:
        text = file.read()
    known = declarations(text)
    targets = ",\n".join(known[name] for name in FUZZED)
    dependencies = ", ".join(f'"{name}"' for name in [*FUZZED, "CFuzzer"])
    write_manifest(folder, f"""{text[:text.index("let package")]}
let package = Package(
    name: "fuzz",
    targets: [
{targets},
        .systemLibrary(name: "CFuzzer", path: "Tests/Support/CFuzzer"),
        .executableTarget(
            name: "fuzz", dependencies: [{dependencies}],
            path: "Tests/Fuzzers", exclude: ["corpus"], swiftSettings: settings),
    ]
)
""")
    return folder


PARTS = {
    "lint": (lint, "the format of the sources"),
    "build": (build, "debug with the tests, and release"),
    "unit": (unit, "Swift's tests; a name after it filters them"),
    "e2e": (e2e, "guests in QEMU; names after it choose groups or cases"),
    "gates": (gate, "instructions and allocations for each I/O; the benchmark runs at all"),
    "fuzz": (fuzz, "hostile input from libFuzzer; names after it choose, and a number of minutes after those"),
    "sanitize": (sanitize, "'thread' (the core), 'daemon-address'; or by name 'address' (the core), 'daemon-thread'"),
}


def listing() -> None:
    for name, (_, what) in PARTS.items():
        print(f"{name:8}{what}")
    for group_type in groups.ALL:
        print(f"\ne2e {group_type.__name__}: {group_type.title}")
        for title, _ in group_type(targets.Daemon).cases():
            print(f"    {title}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="Scripts/test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {name:8}{what}" for name, (_, what) in PARTS.items()))  # fmt: skip
    parser.add_argument("part", nargs="?", choices=PARTS, help="run this part only")
    parser.add_argument("name", nargs="*", help="and only what is called so (unit, e2e, sanitize, fuzz)")
    parser.add_argument("--list", action="store_true", help="print the parts and the end-to-end cases, run nothing")
    options = parser.parse_args()
    if options.list:
        listing()
        return 0
    processes.clean_up_on_exit()
    begin = time.monotonic()
    results = report.Report()
    for part in [options.part] if options.part else PARTS:
        PARTS[part][0](results, options.name)
        if part == "build" and results.count("failed") and not options.part:
            results.note("what follows needs the build; it is left out")
            break
    good = results.summary()
    print(f"{time.monotonic() - begin:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
