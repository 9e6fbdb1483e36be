# prometheus: Prometheus' own reader of its text format.
#
# Called by: groups. Must not know: what the metrics mean.

"""PyPI's prometheus-client, which fails where a text is not as Prometheus demands."""

import importlib

from . import python_packages


def samples(text: str) -> dict[str, list]:
    """The samples of a text by name: each has labels and a value."""
    python_packages.module("prometheus_client", "0.21.1", distribution="prometheus-client")
    parser = importlib.import_module("prometheus_client.parser")
    found: dict[str, list] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found
