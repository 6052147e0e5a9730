"""What pyproject.toml cannot say: a wheel holds the stages as `prefmill.stages`, and the files `prefmill init` copies.

A checkout keeps them in folders of their own (docs/decisions/0150-what-a-wheel-holds.md).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

STARTER = ("configs", "sbatch", "docs")
# The command's own `editable_mode` is set too late, after its options are final.
EDITABLE = "editable_wheel" in sys.argv


class BuildPy(build_py):
    """Moves `stages` into the package and adds the starter files, unless the checkout itself is installed."""

    def finalize_options(self) -> None:
        if not EDITABLE:
            self.distribution.packages = [
                "prefmill.stages" if name == "stages" else name for name in self.distribution.packages
            ]
            self.distribution.package_dir["prefmill.stages"] = "stages"
        super().finalize_options()

    def run(self) -> None:
        super().run()
        if EDITABLE:
            return
        for name in STARTER:
            target = Path(self.build_lib) / "prefmill" / "starter" / name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(name, target, ignore=shutil.ignore_patterns("decisions", "*.py", "__pycache__"))


setup(cmdclass={"build_py": BuildPy})
