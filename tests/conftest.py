"""Makes every test run alike on every machine: one compute thread, and hypothesis without chance or deadlines."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: pools of threads on a small machine fight each other

from hypothesis import settings

settings.register_profile("tandem", derandomize=True, deadline=None)
settings.load_profile("tandem")
