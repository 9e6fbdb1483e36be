# python_packages: packages of PyPI that cases need.
#
# Owns: where they are installed. Called by: groups, prometheus. Must not know: what they are for.

"""A package is installed into the build directory when a case needs it first."""

import importlib
import os
import subprocess
import sys

from . import image
from .targets import NotPossible

PIP_SECONDS = 120


def module(name: str, version: str, *, distribution: str = "", with_dependencies: bool = False):
    """The module of a package, which is installed if it is not there."""
    package = f"{distribution or name}=={version}"
    directory = os.path.join(image.ROOT, ".build", "python", package)
    if not os.path.isdir(os.path.join(directory, name)):
        options = [] if with_dependencies else ["--no-deps"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", directory, package]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotPossible(f"{package} cannot be installed: {error}") from None
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise NotPossible(f"{package} cannot be installed: {last}")
    if directory not in sys.path:
        sys.path.insert(0, directory)
    return importlib.import_module(name)
