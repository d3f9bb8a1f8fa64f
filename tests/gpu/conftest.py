"""Tests that need a GPU: without one there is nothing to collect, and no line about it.

device_count() asks the driver's management library; is_available() would start CUDA in this process, and forked ranks
of later tests could not use it any more.
"""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.device_count() else ["test_*.py"]
