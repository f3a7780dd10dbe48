"""Bound what a chat template may do: it is code that came with a model, and one row could keep it busy for days.

Work is counted, not timed, so that a row is refused on every machine or on none: one step for each pass of a block
(a loop's body, a branch, a macro), and one for every thousand characters or ten entries that an operation takes or
makes. Templates are compiled by transformers; this module stands in front of its compiler for the whole process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

if TYPE_CHECKING:
    from jinja2.runtime import Context

MAX_STEPS = 2_000_000
"""Of one rendering: some seconds. A conversation of a thousand turns takes about fifty thousand."""

MAX_CHARACTERS = 64_000_000
"""Of any value, and of the whole text. A row has 16 million at most."""

MAX_ENTRIES = 1_000_000
"""Of any list, tuple, dictionary or range."""

MAX_PRODUCT = 1_000_000_000
"""Of the sizes of the two largest arguments of a function whose result may be as large as that."""

_MULTIPLYING = frozenset({"replace", "join", "indent", "expandtabs", "wordwrap"})
_CONSTANT_TIME = frozenset(
    {
        *(
            "defined",
            "undefined",
            "none",
            "boolean",
            "false",
            "true",
            "integer",
            "float",
            "number",
            "string",
            "mapping",
        ),
        *("iterable", "sequence", "callable", "odd", "even", "divisibleby", "filter", "test", "sameas", "escaped"),
    }
)
"""Tests that look at no text."""

_COLLECTIONS = frozenset({list, tuple, dict, range})
_CHARACTERS_PER_STEP = 1_000
_ENTRIES_PER_STEP = 10
_STEPS_PER_CALL = 5


class TemplateLimitError(SecurityError):
    """A chat template does more than a rendering may."""


class _Work(threading.local):
    """What the rendering of this thread has done."""

    steps = 0


_work = _Work()


def spend(steps: int = 1) -> None:
    """Count steps of the rendering at hand.

    Raises:
        TemplateLimitError: it has taken too many.
    """
    _work.steps += steps
    if _work.steps > MAX_STEPS:
        raise TemplateLimitError(f"the chat template takes more than {MAX_STEPS:,} steps for this row")


def checked(value: Any) -> Any:
    """Return a value that a template uses or makes, and count the work that its size is.

    Small ones are free: a block has only so many of them.

    Raises:
        TemplateLimitError: it is too large, or too much was done.
    """
    kind = type(value)
    if kind is str or kind is bytes:
        if len(value) > _CHARACTERS_PER_STEP:
            _refuse_characters(len(value))
            spend(len(value) // _CHARACTERS_PER_STEP)
    elif kind in _COLLECTIONS:
        if len(value) > _ENTRIES_PER_STEP:
            _refuse_entries(len(value))
            spend(len(value) // _ENTRIES_PER_STEP)
    elif kind is GeneratorType:
        return _counted(value)
    return value


def _counted(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        spend()
        yield value


def _refuse_characters(count: float) -> None:
    if count > MAX_CHARACTERS:
        raise TemplateLimitError(f"the chat template makes a value of more than {MAX_CHARACTERS:,} characters")


def _refuse_entries(count: float) -> None:
    if count > MAX_ENTRIES:
        raise TemplateLimitError(f"the chat template makes a list of more than {MAX_ENTRIES:,} entries")


def _check_arguments(name: str, *values: Any) -> None:
    """Count the size of what a function is given, and refuse what would make too large a result before it is made."""
    for value in values:
        if type(value) is int:
            _refuse_characters(abs(value))
        else:
            checked(value)
    if name in _MULTIPLYING and len(values) > 1:
        second, first = sorted(map(_size, values))[-2:]
        if first * second > MAX_PRODUCT:
            raise TemplateLimitError(f"the chat template calls {name} with values as large as {first:,} and {second:,}")


def _size(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 0


def _joined(parts: Iterable[str]) -> str:
    """Join what a block has written."""
    if isinstance(parts, list):
        _refuse_characters(sum(map(len, parts)))
    text = "".join(parts)
    checked(text)
    return text


class _CountingCode(CodeGenerator):
    """Code that counts each pass of a block, and the size of what operators and slices take and make."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.spend()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._checked(super().visit_Concat, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._checked(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._checked(super().visit_Add, node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        left = node.expr
        self._operand(left, frame, is_small=isinstance(node.ops[0].expr, nodes.Const | nodes.List | nodes.Tuple))
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            is_search = operand.op in {"in", "notin"}
            self._operand(operand.expr, frame, is_small=isinstance(left, nodes.Const) and not is_search)
            left = operand.expr
        self.write(")")

    def _operand(self, node: nodes.Expr, frame: Frame, is_small: bool) -> None:
        """Write one side of a comparison; small where it is compared with what stands in the template itself."""
        if is_small or isinstance(node, nodes.Const | nodes.List | nodes.Tuple):
            self.visit(node, frame)
        else:
            self._checked(self.visit, node, frame)

    def _checked(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.checked(")
        visit(node, frame)
        self.write(")")


class _LimitedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with limits."""

    code_generator_class = _CountingCode
    intercepted_binops = frozenset({"*", "**", "%"})
    spend = staticmethod(spend)
    checked = staticmethod(checked)
    concat = staticmethod(_joined)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _refuse_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _refuse_characters(left.bit_length() * max(right, 0))
        return checked(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        spend(_STEPS_PER_CALL)
        of = getattr(function, "__self__", None)
        _check_arguments(getattr(function, "__name__", ""), of, *args, *kwargs.values())
        return checked(super().call(context, function, *args, **kwargs))


def _refuse_product(left: Any, right: Any) -> None:
    for value, factor in ((left, right), (right, left)):
        if isinstance(factor, int) and isinstance(value, str | bytes):
            _refuse_characters(len(value) * factor)
        elif isinstance(factor, int) and isinstance(value, list | tuple):
            _refuse_entries(len(value) * factor)
        elif isinstance(factor, int) and isinstance(value, int):
            _refuse_characters(value.bit_length() + factor.bit_length())


def _limited_function(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or test that counts."""

    @wraps(function)  # takes along whether jinja hands over the context
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(name, *args, *kwargs.values())
        return checked(function(*args, **kwargs))

    return limited


def _limited(original: Any) -> _LimitedEnvironment:
    """Return an environment like transformers' own, with limits."""
    limited = _LimitedEnvironment(
        trim_blocks=original.trim_blocks,
        lstrip_blocks=original.lstrip_blocks,
        extensions=[type(extension) for extension in original.extensions.values()],
    )
    limited.filters.update({name: _limited_function(name, each) for name, each in original.filters.items()})
    limited.tests.update(original.tests)
    limited.tests.update(
        {name: _limited_function(name, each) for name, each in original.tests.items() if name not in _CONSTANT_TIME}
    )
    limited.globals.update(original.globals)
    del limited.globals["lipsum"]  # jinja's maker of dummy text takes its time, and no conversation needs it
    return limited


def _compile(original_compile: Callable[[str], Template], text: str) -> Template:
    template = _limited(original_compile("").environment).from_string(text)
    render = template.root_render_func

    def bounded(context: Context) -> Iterator[str]:
        before, _work.steps, size = _work.steps, 0, 0
        try:
            for piece in render(context):
                size += len(piece)
                _refuse_characters(size)
                yield piece
        finally:
            _work.steps = before

    template.root_render_func = bounded
    return template


def limit_chat_templates() -> None:
    """Let transformers compile every chat template of this process with limits; more calls change nothing."""
    original = chat_template_utils._compile_jinja_template
    if not getattr(original, "has_limits", False):
        limited = lru_cache(maxsize=64)(lambda text: _compile(original, text))
        limited.has_limits = True  # type: ignore[attr-defined]
        chat_template_utils._compile_jinja_template = limited
