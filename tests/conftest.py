"""What every test shares."""

from __future__ import annotations

import os

# Several ranks share few cores here, and nothing may look for a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
