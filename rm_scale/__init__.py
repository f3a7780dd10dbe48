"""Train reward models from a laptop to many GPU nodes.

Importing this package must stay free of torch (a test holds it): the names below load what they need when they are
first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rm_scale.version import __version__

if TYPE_CHECKING:
    from rm_scale.api import TrainingResult, train_reward_model
    from rm_scale.inference.remote_scorer import RemoteScorer
    from rm_scale.inference.reward_function import reward_function
    from rm_scale.inference.scoring.scorer import RewardScorer

__all__ = [
    "train_reward_model",
    "TrainingResult",
    "RewardScorer",
    "RemoteScorer",
    "reward_function",
    "__version__",
]

_MODULE_OF = {
    "train_reward_model": "rm_scale.api",
    "TrainingResult": "rm_scale.api",
    "RewardScorer": "rm_scale.inference.scoring.scorer",
    "RemoteScorer": "rm_scale.inference.remote_scorer",
    "reward_function": "rm_scale.inference.reward_function",
}


def __getattr__(name: str) -> Any:
    """Load a name of `__all__` from its module when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the names that are loaded on demand too."""
    return sorted({*globals(), *_MODULE_OF})
