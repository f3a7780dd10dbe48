"""rm_scale: train reward models from a laptop to many GPU nodes. Importing it must stay free of torch (tested)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_scale.inference.scorer import RewardScorer

__version__ = "0.1.0"
__all__ = ["RewardScorer", "__version__"]


def __getattr__(name: str) -> Any:
    """`from rm_scale import RewardScorer` loads torch only when it is asked for."""
    if name == "RewardScorer":
        from rm_scale.inference.scorer import RewardScorer

        return RewardScorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
