# groups: the list of the groups of cases. Called by: run.py. Must not know: any case.

"""The groups of end-to-end cases, in the order in which they run."""

from .commandline import CommandLine
from .commands import Commands
from .conformance import Conformance, RemovableConformance, SpreadConformance
from .disks import Disks
from .fullmedium import FullMedium
from .itself import Itself
from .metrics import Metrics
from .multipath import Multipath
from .operator import Operator
from .reservations import Reservations
from .restart import Restart
from .service import Service
from .virtio import (
    ClientMode, HotPlug, LegacyDevice, ManyUnits, Migration, MigrationOverBlockDevices, PackedRings, SpreadQueues,
)  # fmt: skip
from .xen import Xen

ALL = [
    Itself, CommandLine, Metrics, Service, Disks, Commands, FullMedium, Reservations, Multipath, Restart, PackedRings,
    LegacyDevice, HotPlug, ManyUnits, Migration, MigrationOverBlockDevices, ClientMode, SpreadQueues, Conformance,
    SpreadConformance, RemovableConformance, Operator, Xen,
]  # fmt: skip
