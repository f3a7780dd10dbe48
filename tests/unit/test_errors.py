"""Errors travel between ranks and arrive as they were."""

from __future__ import annotations

import pickle

import pytest

from rm_scale import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_survive_the_way_to_another_rank(kind: type[errors.UserError]) -> None:
    error = errors.ConfigError(["a=1: bad.", "b=2: worse."]) if kind is errors.ConfigError else kind("a=1: bad.")
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived)) == (kind, str(error))
