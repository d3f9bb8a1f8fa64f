"""Which files need more than this machine has."""

import os
import shutil

# Network namespaces need root and iproute2; where they are missing there is nothing to collect.
collect_ignore = [] if os.geteuid() == 0 and shutil.which("ip") else ["test_two_nodes.py"]
