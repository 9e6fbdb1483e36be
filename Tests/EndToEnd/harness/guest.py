# guest: one emulated machine, its agent and its monitor.
#
# Owns: the QEMU process and its files. Called by: groups of cases, the demonstration.
# Must not know: what is tested, or how the disks are served.

"""A Linux guest in QEMU (software emulation, so it runs anywhere), commanded over a virtio serial port.

Every wait has a limit, and every failure shows the end of the guest's console.
"""

import base64
import json
import os
import socket
import time
from dataclasses import dataclass

from . import image, processes

# Emulated, on a busy machine: an idle one boots the guest in four seconds.
BOOT_SECONDS = 180
COMMAND_SECONDS = 120
MEMORY = 768


class GuestError(Exception):
    """The guest did not do its part; the text holds the end of its console."""


class CommandFailed(Exception):
    """A command in the guest ended with a status that the caller did not expect."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest came to."""

    command: str
    status: int
    output: str

    def check(self, *statuses: int) -> str:
        """The output, if the status is one of these (0 if none is given)."""
        if self.status not in (statuses or (0,)):
            meaning = " (killed: it took too long)" if self.status == 137 else ""
            lines = self.output.strip().splitlines()
            shown = "\n".join(lines if len(lines) <= 40 else lines[:12] + ["…"] + lines[-28:])
            raise CommandFailed(f"'{self.command}' in the guest ended with status {self.status}{meaning}:\n{shown}")
        return self.output


class Guest:
    """A running machine. Use as a context manager, or call `close`."""

    def __init__(
        self, directory: str, devices: list[str], processors: int = 2, emulator: list[str] | None = None
    ) -> None:
        """Boots; returns when the agent answers.

        `directory` takes the machine's sockets and logs. `devices` are QEMU's arguments for the disks. `emulator` is
        another QEMU than the system's, with options of its own.
        """
        self._emulator = emulator or ["qemu-system-x86_64"]
        self.directory = directory
        self.console = os.path.join(directory, "console.log")
        self.log = os.path.join(directory, "qemu.log")
        self._agent_path = os.path.join(directory, "agent.sock")
        self._monitor_path = os.path.join(directory, "monitor.sock")
        self._agent: socket.socket | None = None
        self._received = b""
        for path in [self.console, self.log, self._agent_path, self._monitor_path]:
            if os.path.exists(path):
                os.remove(path)
        self.process = processes.start(self._command(devices, processors), self.log)
        try:
            self._agent = self._connect(self._agent_path, BOOT_SECONDS)
            self._line(BOOT_SECONDS)  # "ready 0"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _command(self, devices: list[str], processors: int) -> list[str]:
        built = image.build()
        return [
            *self._emulator,
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max",
            "-smp", str(processors), "-m", str(MEMORY),
            # vhost-user: the daemon maps the guest's memory, so it must be sharable.
            "-object", f"memory-backend-memfd,id=mem,size={MEMORY}M,share=on", "-numa", "node,memdev=mem",
            "-kernel", built.kernel, "-initrd", built.initramfs,
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable random.trust_cpu=on",
            "-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console",
            "-chardev", f"socket,id=monitor,path={self._monitor_path},server=on,wait=off",
            "-mon", "chardev=monitor,mode=control",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={self._agent_path},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=agent",
            *devices,
        ]  # fmt: skip

    def run(self, command: str, seconds: float = COMMAND_SECONDS) -> Result:
        """Runs a shell command in the guest and waits for its end."""
        assert self._agent is not None, "the guest is closed"
        encoded = base64.b64encode(command.encode()).decode()
        try:
            self._agent.sendall(f"{int(seconds)} {encoded}\n".encode())
        except OSError as error:
            raise self._failure(f"'{command}' does not reach the guest: {error}") from None
        # The agent kills the command at its limit; only a guest that hangs as a whole exceeds the second one.
        status, _, output = self._line(seconds + 60, command).partition(" ")
        return Result(command, int(status), base64.b64decode(output).decode(errors="replace"))

    def check(self, command: str, seconds: float = COMMAND_SECONDS) -> str:
        """Runs a shell command in the guest that must succeed; its output."""
        return self.run(command, seconds).check()

    def monitor(self, command: str, **arguments) -> object:
        """One QMP command's answer."""
        with self._connect(self._monitor_path, 30) as connection, connection.makefile("rw") as stream:
            stream.readline()  # QEMU's greeting
            for request in [{"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}]:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                answer: dict = {"event": None}
                while "event" in answer:
                    answer = json.loads(stream.readline())
                if "error" in answer:
                    raise self._failure(f"QMP {request['execute']}: {answer['error']['desc']}")
            return answer["return"]

    def close(self) -> None:
        """Cuts the guest's power."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        processes.kill(self.process)

    def power_off(self) -> None:
        """Has the guest power itself off, and waits for that."""
        assert self._agent is not None, "the guest is closed"
        self._agent.sendall(f"30 {base64.b64encode(b'sync; poweroff -f').decode()}\n".encode())
        try:
            self.process.wait(60)
        except Exception:
            raise self._failure("the guest does not power off") from None
        finally:
            self.close()

    def _connect(self, path: str, seconds: float) -> socket.socket:
        """Connects to a socket that QEMU opens soon."""
        limit = time.monotonic() + seconds
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(seconds)
            try:
                connection.connect(path)
                return connection
            except OSError:
                connection.close()
            if self.process.poll() is not None:
                raise self._failure(f"QEMU ended with status {self.process.returncode}")
            if time.monotonic() > limit:
                raise self._failure(f"QEMU does not open {path}")
            time.sleep(0.02)

    def _line(self, seconds: float, command: str = "the start of the agent") -> str:
        """The agent's next line."""
        assert self._agent is not None
        limit = time.monotonic() + seconds
        while b"\n" not in self._received:
            self._agent.settimeout(max(0.01, limit - time.monotonic()))
            try:
                data = self._agent.recv(1 << 16)
            except TimeoutError:
                raise self._failure(f"no answer in {seconds:.0f} s: {command}") from None
            except OSError as error:
                raise self._failure(f"{error}: {command}") from None
            if not data:
                raise self._failure(f"the guest is gone: {command}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    def _failure(self, what: str) -> GuestError:
        return GuestError(
            f"{what}\n--- the guest's console ends\n{processes.tail(self.console)}\n"
            f"--- QEMU said\n{processes.tail(self.log)}")
