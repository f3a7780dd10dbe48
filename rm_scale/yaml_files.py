"""Read a YAML file that a person wrote: strictly, with the line of what is wrong, and never more than it should hold.

YAML's safe loader still lets a small file grow without end (aliases of aliases), take thousands of digits for a number,
or nest so deeply that Python gives up; and it takes the last of two equal keys in silence.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from rm_scale.files import read_small_text
from rm_scale.texts import one_line

MAX_BYTES = 1_000_000
"""Of a file; and of its content once every alias has been written out, about."""
MAX_DEPTH = 50
_BAD_SCALAR = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: it can't be read, or is no YAML; the text says why, with the line where there is one.
    """
    text = read_small_text(path, MAX_BYTES)
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"not valid YAML, line {line}: character {error.character:#x} is not allowed") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"not valid YAML{where}: {one_line(said, 300)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not valid YAML: {one_line(error, 300)}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader with bounds, in which a key written twice is an error."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _problem(f"nested more than {MAX_DEPTH} deep", self.peek_event())  # type: ignore[no-untyped-call]
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_document(self, node: Any) -> Any:
        _expanded_size(node, {})
        return super().construct_document(node)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _BAD_SCALAR as error:  # a number of thousands of digits, the 31st of February, `!!bool x`
            raise _problem(f"{str(node.value)[:40]!r} can't be read ({one_line(error, 150)})", node) from error


def _problem(said: str, node: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, said, node.start_mark)


def _expanded_size(node: Any, known: dict[int, int]) -> int:
    """Return about how many characters a node has, with every alias written out.

    Args:
        node: of the composed tree.
        known: sizes by the node's `id`; 0 while a node is being measured.

    Raises:
        ConstructorError: more than `MAX_BYTES`, or a node holds itself.
    """
    size = known.get(id(node))
    if size == 0:
        raise _problem("an alias names what it is a part of", node)
    if size is not None:
        return size
    known[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        size = 1 + len(node.value)
    else:
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        size = 1 + sum(_expanded_size(part, known) for part in parts)
    if size > MAX_BYTES:
        raise _problem(f"with its aliases written out it has more than {MAX_BYTES:,} characters", node)
    known[id(node)] = size
    return size


def _construct_unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
    twice = sorted(key for key, count in keys.items() if count > 1)
    if twice:
        raise _problem(f"key {twice[0]} is written twice", node)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique_mapping)
