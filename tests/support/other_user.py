"""Running a Python as another user of this machine: nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import orchestra

NOBODY = 65534


def python_as_nobody(imports: str) -> list[str]:
    """Return a command that runs a Python, which can import that, as nobody; skip if none can."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    paths = f"{Path(orchestra.__file__).parents[1]}{os.pathsep}{sysconfig.get_path('purelib')}"
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    for python in (sys.executable, "/usr/bin/python3"):
        environment = ["env", "HOME=/nonexistent", f"PYTHONPATH={paths}", "PYTHONDONTWRITEBYTECODE=1", python]
        command = [*drop, *environment]
        if subprocess.run([*command, "-c", imports], check=False, capture_output=True).returncode == 0:
            return command
    pytest.skip("nobody cannot run this Python")
