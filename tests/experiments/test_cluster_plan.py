"""ImageNet on paper: the page's table and figures are what its script prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.robust
def test_the_page_says_what_the_script_prints():
    done = subprocess.run(
        [sys.executable, ROOT / "studies/cluster_plan.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/cluster.md").read_text()
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 16 and "\n".join(table) in page
    text = " ".join(page.split())
    base, variant = re.findall(r"(\S+) GFLOP an image \((\S+) x", done.stdout)
    assert f"takes {base[0]} GFLOP an image (two views), and {variant[0]} with" in text
    assert f"with IE-CL, {variant[1]} times as many" in text
    for figure in re.findall(r"(?:at )([\d,]+)(?: images a step)", done.stdout):
        thousands = f"{round(int(figure.replace(',', '')), -3):,}"
        assert f"{thousands} images a step" in text
