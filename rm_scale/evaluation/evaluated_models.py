"""Name the models of an evaluation, each a folder or a file with scores, as short as tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvaluatedModel:
    """A model's folder, or a file with a model's scores, and what it is called in the results."""

    path: Path
    name: str

    @property
    def is_model(self) -> bool:
        """True for a model that is scored with; False where its scores are read."""
        return self.path.is_dir()


def evaluated_models(paths: Sequence[str]) -> list[EvaluatedModel]:
    """Return the models at these paths, in their order, under their `short_names`."""
    found = [Path(path) for path in paths]
    return [EvaluatedModel(path, name) for path, name in zip(found, short_names(found), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart; a scores file is called like its folder."""
    parts = [_parts(path.absolute()) for path in paths]
    names = []
    for own in parts:
        for length in range(1, len(own) + 1):
            if sum(other[-length:] == own[-length:] for other in parts) == 1:
                break
        names.append("/".join(own[-length:]))
    # The same path twice is told apart by its number.
    return [f"{name} ({number + 1})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _parts(path: Path) -> tuple[str, ...]:
    """Return the parts of the path that name a model: of a scores file, those of the run's folder."""
    if path.name != "evaluation_scores.jsonl":
        return path.parts
    return path.parent.parent.parts if path.parent.name == "run" else path.parent.parts
