"""Triton's kernels run here in its interpreter, which must be chosen before they are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
