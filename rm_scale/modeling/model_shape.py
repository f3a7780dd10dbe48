"""A model's shape by whoever knows it: the planner's formulas, without torch; else the model's own class, with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.logs import get_logger
from rm_scale.planning.shape import (
    ModelShape,
    is_known,
    read_model_config,
    refuse_without_classifier,
    shape_from_config,
)

logger = get_logger(__name__)


def shape_of_run(config: RunConfig, values: dict[str, Any] | None = None, or_known: bool = False) -> ModelShape:
    """Return the shape of the model that a run trains.

    Args:
        config: what was asked.
        values: content of the model's config.json where it has been read already.
        or_known: see `read_model_config`.

    Raises:
        ModelError: it can't be read, or transformers has no class for it.
    """
    name, revision = config.model_name_or_path, config.model_revision
    values = read_model_config(name, revision, or_known) if values is None else values
    return shape_of(values, name, revision, config.trust_remote_code)


def shape_of(
    values: dict[str, Any], name: str, revision: str = "main", trust_remote_code: bool = False, exact: bool = False
) -> ModelShape:
    """Return a model's shape: by the formulas where they know it, else as its class has it, which imports torch.

    Args:
        values: content of its config.json.
        name: a folder or a hub name.
        revision: of a hub model.
        trust_remote_code: run Python code that comes with the model.
        exact: ask the class of a known kind too, and say where the formulas count otherwise; then the class is taken.

    Raises:
        ModelError: sizes are impossible, or transformers has no class for it.
    """
    refuse_without_classifier(values, trust_remote_code)
    known = is_known(values, trust_remote_code)
    if known and not exact:
        return shape_from_config(values)
    formula = shape_from_config(values) if known else None
    if formula is None and not exact:
        logger.info(
            f"model type {values.get('model_type')!r} is not one that the planner's formulas know: its class is asked, "
            "for which torch is imported"
        )
    from rm_scale.modeling.exact_shape import differences, exact_shape

    found = exact_shape(name, revision, trust_remote_code, _settings(values, formula))
    if formula is None:
        return found
    wrong = differences(formula, found)
    assert found.exact is not None
    if not wrong:
        logger.info(f"--exact: the formulas count the tensors of {found.exact.name}, each of them")
        # Activations of Mamba layers are what no formula knows.
        return formula if formula.mamba is None else replace(found, left_out=formula.left_out)
    logger.warning(f"--exact: the formulas are not what {found.exact.name} has: {'; '.join(wrong[:6])}. It is taken")
    return replace(found, left_out=formula.left_out)


def _settings(values: dict[str, Any], formula: ModelShape | None) -> dict[str, Any] | None:
    """Return the config to build the class from: of a model with towers that of the language model alone."""
    if formula is None or formula.left_out is None:
        return values
    return {**values.get("text_config", values), "model_type": formula.model_type}
