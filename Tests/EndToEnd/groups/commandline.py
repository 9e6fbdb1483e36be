# commandline: the daemon as a person meets it: options, configuration files, messages, exit statuses.
#
# Owns: these cases. Called by: run.py. Must not know: guests.

"""What the daemon says to good and to bad input. No guest is booted."""

import os
import re
import shutil
import subprocess
import tempfile

from harness import processes, targets
from harness.report import Group, Skipped, case, require

GOOD = """\
backstores:
  scratch: {{ type: ram, size: 16MiB }}
  kept: {{ type: file, path: {directory}/kept.img, size: 16MiB }}
targets:
  naa.6001405000000001:
    luns: {{ 0: scratch, 1: kept }}
vhost-user-scsi:
  - {{ socket: {directory}/vm.sock, queues: 2, targets: {{ 0: naa.6001405000000001 }} }}
"""

# What is changed in the good file: (title, from, to, what the message must name besides the file and the line).
FAULTS = [
    ("an unknown key", "size: 16MiB }}\n  kept", "sise: 16MiB }}\n  kept", "sise"),
    ("a LUN that is given twice", "0: scratch, 1: kept", "0: scratch, 0: kept", "0"),
    ("a LUN of a backstore that is not there", "1: kept", "1: lost", "lost"),
    ("a size of 0", "type: ram, size: 16MiB", "type: ram, size: 0", "size"),
    ("a size over the limit", "type: ram, size: 16MiB", "type: ram, size: 9000000TiB", "size"),
    ("a size without sense", "type: ram, size: 16MiB", "type: ram, size: plenty", "size"),
    ("a type that does not exist", "type: ram", "type: tape", "tape"),
    ("a number of queues over the limit", "queues: 2", "queues: 100000", "queues"),
    ("a port that the target does not have", "queues: 2", "port: 3", "port 3"),
    ("a target that is not there", "0: naa.6001405000000001", "0: naa.6001405000000002", "naa.6001405000000002"),
    ("a file that is not YAML", "backstores:", "backstores: [", ""),
]


class CommandLine(Group):
    """Each case runs the daemon for a moment."""

    title = "targetd on the command line"

    def __init__(self, kind: type[targets.Target]) -> None:
        self.kind = kind

    def prepare(self) -> None:
        if not self.kind.is_ours:
            raise Skipped("not on the reference: it is about our daemon")
        self.directory = tempfile.mkdtemp(prefix="targetd-test-")

    def finish(self) -> None:
        if self.kind.is_ours:
            shutil.rmtree(self.directory, ignore_errors=True)

    def cases(self):
        found = super().cases()
        for title, *change in FAULTS:
            found.append((f"--check refuses {title}, and names the file, the line and the key",
                          lambda change=change: self._refused(*change)))  # fmt: skip
        return found

    def _run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [targets.Daemon.executable, *arguments],
            capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)  # fmt: skip

    def _write(self, text: str) -> str:
        path = os.path.join(self.directory, "targetd.yaml")
        with open(path, "w") as file:
            file.write(text)
        return path

    def _good(self) -> str:
        return GOOD.format(directory=self.directory)

    def _refused(self, before: str, after: str, named: str) -> None:
        before, after = before.format(), after.format()
        text = self._good()
        require(before in text, f"the good file has no '{before}'")
        path = self._write(text.replace(before, after, 1))
        result = self._run("--check", path)
        require(result.returncode > 0, f"status {result.returncode}:\n{result.stdout}{result.stderr}")
        message = result.stderr
        require(re.search(re.escape(path) + r":\d+", message) and named in message,
                f"no file, line or '{named}' in:\n{message}")  # fmt: skip
        require("Fatal error" not in message, f"it crashed:\n{message}")

    @case("--version and --help answer, and end with status 0")
    def help(self):
        version = self._run("--version")
        require(version.returncode == 0 and re.search(r"\d+\.\d+", version.stdout), f"{version}")
        usage = self._run("--help")
        for option in ["--config", "--check", "--ram", "--file", "--size", "--vhost-user"]:
            require(usage.returncode == 0 and option in usage.stdout, f"--help has no {option}:\n{usage.stdout}")

    @case("an unknown option is refused with a non-zero status and a usage line")
    def unknown_option(self):
        result = self._run("--ram", "16MiB", "--vhost-user", os.path.join(self.directory, "vm.sock"), "--colour")
        require(result.returncode > 0 and "--colour" in result.stderr and "Usage" in result.stderr, f"{result}")

    @case("--check accepts a good file and changes nothing")
    def check(self):
        path = self._write(self._good())
        result = self._run("--check", path)
        require(result.returncode == 0, f"status {result.returncode}:\n{result.stdout}{result.stderr}")
        require(sorted(os.listdir(self.directory)) == ["targetd.yaml"], f"made: {os.listdir(self.directory)}")

    @case("a configuration file that is not there is named")
    def no_file(self):
        path = os.path.join(self.directory, "nowhere.yaml")
        result = self._run("--config", path)
        require(result.returncode > 0 and path in result.stderr, f"{result}")

    @case("--ram serves a socket and prints how to attach it; SIGTERM ends it with status 0 and removes the socket")
    def ram(self):
        self._served("--ram", "16MiB")

    @case("--file makes the file at its size, and leaves an existing one as it is")
    def file(self):
        path = os.path.join(self.directory, "disk.img")
        self._served("--file", path, "--size", "16MiB")
        require(os.stat(path).st_size == 16 << 20, f"{os.stat(path).st_size} bytes")
        with open(path, "r+b") as file:
            file.write(b"precious")
        self._served("--file", path, "--size", "16MiB")
        with open(path, "rb") as file:
            require(file.read(8) == b"precious", "the file was overwritten")
        require(os.stat(path).st_size == 16 << 20, f"{os.stat(path).st_size} bytes")
        os.remove(path)

    @case("the stale socket of a killed daemon is replaced; one of a living daemon is an error")
    def stale(self):
        log, path = os.path.join(self.directory, "log"), os.path.join(self.directory, "vm.sock")
        command = [targets.Daemon.executable, "--ram", "16MiB", "--vhost-user", path]
        if os.path.exists(log):
            os.remove(log)
        first = processes.start(command, log)
        try:
            self._await_arguments(first, log, path)
            second = self._run("--ram", "16MiB", "--vhost-user", path)
            require(second.returncode > 0 and path in second.stderr, f"a second daemon on the socket: {second}")
            require(first.poll() is None and os.path.exists(path), "the second daemon harmed the first")
        finally:
            processes.kill(first)
        require(os.path.exists(path), "a killed daemon leaves its socket; this one did not, so nothing is shown")
        self._served("--ram", "16MiB")

    def _served(self, *arguments: str) -> None:
        log, path = os.path.join(self.directory, "log"), os.path.join(self.directory, "vm.sock")
        if os.path.exists(log):
            os.remove(log)
        child = processes.start([targets.Daemon.executable, *arguments, "--vhost-user", path], log)
        try:
            self._await_arguments(child, log, path)
        finally:
            status = processes.stop(child, 30)
        require(status == 0, f"ended with status {status}:\n{processes.tail(log)}")
        require(not os.path.exists(path), "the socket is still there")

    @staticmethod
    def _await_arguments(child: subprocess.Popen, log: str, path: str) -> None:
        def served() -> bool:
            with open(log) as file:
                printed = file.read()
            # The harness gives the machine its memory itself, in the very words that targetd must print.
            words = "-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem" in printed
            return words and os.path.exists(path) and any(path in word for word in targets.printed_arguments(printed))

        targets.wait_until(served, child, log, f"targetd serves {path} and prints how to attach it")
