"""A study of model-merging collapse; `merge` with `states` is the thin core, usable alone."""

import os

# Threads that spin while they wait make a shared machine ten times slower. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
