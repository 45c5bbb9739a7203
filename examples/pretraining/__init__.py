"""The engine of the reference trainings: what a run holds, one step of the optimiser, and the loop.

A script imports this ahead of torch, which reads the environment when it is loaded.
"""

import os

# Threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
