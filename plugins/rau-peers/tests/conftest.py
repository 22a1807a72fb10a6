import os

# Triton's kernels run on a CPU by its interpreter, if this is said before any of them is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
