"""How long tests wait before they say that something hangs. None is judged by the clock: what is slow is not wrong."""

import os

# A machine that is slower than most by far, as an emulator is, sets the variable.
LIMIT = 300.0 * float(os.environ.get("RAU_TEST_PATIENCE") or 1)  # seconds
