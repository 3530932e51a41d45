"""What the test suite injects, counted as it runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Suite:
    """A group of tests: how many cases ran, how many failed, how many were left out."""

    file: str
    only: str
    cases: int
    failed: int
    skipped: int


def run_suite(file: str, only: str = "") -> Suite:
    """Run a file of the test suite, or those of its tests whose name holds `only`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", f"tests/{file}", f"--junitxml={report}"]
        subprocess.run([*words, "-k", only] if only else words, cwd=ROOT, capture_output=True, check=False)
        totals = ET.parse(report).getroot().find("testsuite")
        assert totals is not None
        failed = int(totals.get("failures", 0)) + int(totals.get("errors", 0))
        return Suite(file, only, int(totals.get("tests", 0)), failed, int(totals.get("skipped", 0)))
