"""What holds for all tests."""

import os

from hypothesis import settings

# Before torch is imported: two processes run tests at once, and threads that wait for a core that another has spin.
# Tests of the sampler took ten times the processor time with a thread for each of two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that is busy is no failure: hypothesis would take an example of more than 200 ms for one.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
