# prometheus: Prometheus' own reader of its text format.
#
# Owns: where the reader is installed. Called by: groups. Must not know: what the metrics mean.

"""PyPI's prometheus-client, found or installed into the build directory."""

import os
import subprocess
import sys

from . import image
from .targets import NotPossible

VERSION = "0.21.1"
PIP_SECONDS = 120


def reader():
    """The function that takes a text apart, and fails where it is not as Prometheus demands."""
    directory = os.path.join(image.ROOT, ".build", f"prometheus-client-{VERSION}")
    if not os.path.isdir(os.path.join(directory, "prometheus_client")):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory,
                   f"prometheus-client=={VERSION}"]  # fmt: skip
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotPossible(f"prometheus-client cannot be installed: {error}") from None
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise NotPossible(f"prometheus-client cannot be installed: {last}")
    if directory not in sys.path:
        sys.path.insert(0, directory)
    from prometheus_client.parser import text_string_to_metric_families

    return text_string_to_metric_families


def samples(text: str) -> dict[str, list]:
    """The samples of a text by name: each has labels and a value."""
    found: dict[str, list] = {}
    for family in reader()(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found
