# metrics: what the daemon tells Prometheus, read by Prometheus' own reader.
#
# Owns: these cases. Called by: run.py. Must not know: guests.

"""A front-end in user space makes a load; the counters must tell of it. No guest is booted."""

import json
import os
import shutil
import subprocess
import tempfile

from harness import processes, prometheus, targets
from harness.report import Group, Skipped, case, require

FILE = """\
control: {{ socket: {directory}/control }}
backstores:
  scratch: {{ type: ram, size: 16MiB }}
targets:
  naa.6001405000000001: {{ luns: {{ 0: scratch }} }}
vhost-user-scsi:
  - {{ socket: {directory}/hba0.sock, targets: {{ 0: naa.6001405000000001 }} }}
"""
LOAD = os.path.join(os.path.dirname(targets.Daemon.executable), "vhost-user-load")
CONTROL = os.path.join(os.path.dirname(targets.Daemon.executable), "targetctl")


class Metrics(Group):
    """One daemon, one load."""

    title = "What targetd tells Prometheus"

    def __init__(self, kind: type[targets.Target]) -> None:
        self.kind = kind
        self.daemon = None

    def prepare(self) -> None:
        if not self.kind.is_ours:
            raise Skipped("not on the reference: it is about our daemon")
        self.directory = tempfile.mkdtemp(prefix="targetd-test-")
        path, log = os.path.join(self.directory, "targetd.yaml"), os.path.join(self.directory, "log")
        with open(path, "w") as file:
            file.write(FILE.format(directory=self.directory))
        self.daemon = processes.start([targets.Daemon.executable, "--config", path], log)
        control = os.path.join(self.directory, "control")
        targets.wait_until(lambda: os.path.exists(control), self.daemon, log, "the control socket is there")
        self.made = self._load()

    def finish(self) -> None:
        if self.daemon:
            processes.stop(self.daemon)
            shutil.rmtree(self.directory, ignore_errors=True)

    def _load(self) -> int:
        """Requests that a front-end made."""
        result = subprocess.run(
            [LOAD, "--socket", os.path.join(self.directory, "hba0.sock"), "--operation", "mixed", "--depth", "8",
             "--runtime", "1", "--json"],
            capture_output=True, text=True, timeout=60)  # fmt: skip
        require(result.returncode == 0, f"vhost-user-load: {result.stderr}")
        return json.loads(result.stdout)["operations"]

    def _control(self, *arguments: str) -> str:
        result = subprocess.run(
            [CONTROL, *arguments, "--socket", os.path.join(self.directory, "control")],
            capture_output=True, text=True, timeout=60)  # fmt: skip
        require(result.returncode == 0, f"targetctl: {result.stderr}")
        return result.stdout

    def _samples(self) -> dict[str, list]:
        try:
            return prometheus.samples(self._control("metrics"))
        except targets.NotPossible as error:
            raise Skipped(str(error)) from None

    @case("prometheus-client reads the text, and counters tell of each request")
    def requests(self):
        found = self._samples()
        counted = {
            (sample.labels["operation"], sample.labels["status"]): sample.value
            for sample in found["targetd_initiator_commands_total"]
        }
        moved = counted["read", "good"] + counted["write", "good"]
        require(moved == self.made, f"{self.made} requests were made, {moved} were counted: {counted}")
        reads = sum(s.value for s in found["targetd_initiator_bytes_total"] if s.labels["operation"] == "read")
        require(reads == 4096 * counted["read", "good"], f"{reads} bytes read by {counted}")
        attentions = sum(sample.value for sample in found["targetd_initiator_unit_attentions_total"])
        require(attentions == counted["other", "check-condition"], f"{attentions} unit attentions, but {counted}")
        return f"{self.made} requests"

    @case("the buckets of latency grow, and the last one holds every command")
    def latencies(self):
        found = self._samples()
        for operation in ["read", "write", "other"]:
            def of(name: str, operation=operation) -> list:
                return [s for s in found[f"targetd_lun_latency_seconds_{name}"] if s.labels["operation"] == operation]

            buckets = [sample.value for sample in of("bucket")]
            require(len(buckets) > 10 and buckets == sorted(buckets), f"{operation}: {buckets}")
            (count,), (total,) = of("count"), of("sum")
            require(of("bucket")[-1].labels["le"] == "+Inf" and buckets[-1] == count.value > 0, f"{operation}: {count}")
            require(total.value > 0 or operation == "other", f"{operation} took no time")

    @case("a guest's latencies are those of its commands at all units")
    def guest_latencies(self):
        found = self._samples()
        for operation in ["read", "write"]:
            def of(name: str, operation=operation):
                samples = found[f"targetd_{name}_latency_seconds_count"]
                (sample,) = [sample for sample in samples if sample.labels["operation"] == operation]
                return sample

            guest, unit = of("guest"), of("lun")
            require(guest.labels["initiator"].endswith("hba0.sock"), f"{guest}")
            require(guest.value == unit.value > 0, f"{guest}, {unit}")

    @case("reactors, fronts and nexuses tell what they did")
    def others(self):
        found = self._samples()
        (busy,) = found["targetd_reactor_busy_seconds_total"]
        require(0 < busy.value < 60, f"the reactor was busy for {busy.value} s")
        (connections,) = found["targetd_nexus_connections_total"]
        require(connections.labels["initiator"].endswith("hba0.sock") and connections.value == 1, f"{connections}")
        require(found["targetd_nexus_in_flight"][0].value == 0, "commands in flight without an initiator")
        require(found["targetd_lun_oldest_in_flight_seconds"][0].value == 0, "an old command without an initiator")
