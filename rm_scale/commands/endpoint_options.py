"""Options that score, rank and eval share for scoring at a server instead of loading the model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rm_scale.commands.scoring_options import read_template

if TYPE_CHECKING:
    from rm_scale.inference.endpoint import Endpoint
    from rm_scale.inference.endpoint_scorer import EndpointScorer

_ONLY_HERE = {"device": None, "max_tokens_per_batch": None, "no_contract": False}
"""Options of a model that is loaded, and the values that they have unless they are given."""


def add_endpoint_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the options that name a server and say how it is asked.

    Args:
        parser: of the command.
        several: the command takes several models, and so a server for each.
    """
    group = parser.add_argument_group("scoring at a server")
    group.add_argument(
        "--endpoint",
        metavar="URL",
        nargs="+" if several else None,
        help="score at this vLLM, SGLang or rm-scale server; --model is then the folder of its contract and tokenizer",
    )
    group.add_argument(
        "--endpoint_kind", choices=("auto", "vllm", "rm_scale", "sglang"), default="auto", help="auto: it is asked"
    )
    group.add_argument("--endpoint_model", metavar="NAME", help="its name there, where a vLLM server has several")
    group.add_argument("--requests_in_flight", type=int, default=8, metavar="N", help="at the same time (default 8)")
    group.add_argument("--texts_per_request", type=int, default=32, metavar="N", help="at most (default 32)")
    group.add_argument("--request_timeout", type=float, default=600.0, metavar="SECONDS", help="for an answer (600)")
    group.add_argument(
        "--allow_other_scores", action="store_true", help="take a server that gives other golden scores, with a warning"
    )
    group.add_argument(
        "--token_env", metavar="NAME", help="environment variable with its token (default RM_SCALE_SERVE_TOKEN)"
    )


def endpoint_problems(options: argparse.Namespace) -> Iterator[str]:
    """Yield what is wrong with these options, before anything is asked."""
    urls = endpoint_urls(options)
    models = options.model if isinstance(options.model, list) else [options.model] if options.model else []
    if not urls:
        given = [name for name in ("endpoint_model", "token_env") if getattr(options, name) is not None]
        given += ["endpoint_kind"] if options.endpoint_kind != "auto" else []
        given += ["allow_other_scores"] if options.allow_other_scores else []
        yield from (f"--{name}: only --endpoint URL reads it. Fix: leave it out, or give one." for name in given)
        return
    if not models:
        yield "--endpoint: without --model. Fix: --model DIR, the folder with the model's contract and tokenizer."
    elif len(urls) != len(models):
        yield f"--endpoint: {len(urls)} given for {len(models)} models. Fix: one for each --model, in their order."
    if len(urls) > 1 and options.endpoint_model is not None:
        yield f"--endpoint_model {options.endpoint_model}: for {len(urls)} servers. Fix: servers of one model each."
    for name, value in _ONLY_HERE.items():
        if getattr(options, name, value) != value:
            why = (
                "its golden scores are what the server is checked by" if name == "no_contract" else "nothing is loaded"
            )
            yield f"--{name} with --endpoint: {why}. Fix: leave it out."
    for name in ("requests_in_flight", "texts_per_request"):
        if not 1 <= getattr(options, name) <= 4096:
            yield f"--{name} {getattr(options, name)}: must be from 1 to 4096. Fix: leave it out."
    if not 0 < options.request_timeout <= 86_400:
        yield f"--request_timeout {options.request_timeout:g}: must be above 0, at most 86400. Fix: leave it out."


def endpoint_urls(options: argparse.Namespace) -> list[str]:
    """Return the servers that were given, none where models are loaded."""
    given = options.endpoint
    return given if isinstance(given, list) else [given] if given else []


def open_endpoints(options: argparse.Namespace) -> list[Endpoint]:
    """Ask each server what it is.

    Raises:
        RemoteError: one can't be reached, or is none of ours, vLLM's or SGLang's.
    """
    from rm_scale.inference.endpoint import Endpoint

    kind: Any = None if options.endpoint_kind == "auto" else options.endpoint_kind
    client: dict[str, Any] = {"timeout_seconds": options.request_timeout}
    if options.token_env is not None:
        client["token_env"] = options.token_env
    return [Endpoint(url, kind, options.endpoint_model, **client) for url in endpoint_urls(options)]


def endpoint_scorer(folder: str, endpoint: Endpoint, options: argparse.Namespace) -> EndpointScorer:
    """Return the scorer of a server, which gives the golden scores of the folder's contract.

    Raises:
        UserError: it does not, or there is no contract.
    """
    from rm_scale.inference.endpoint_scorer import EndpointScorer

    return EndpointScorer.from_folder(
        folder,
        endpoint,
        dtype=None if options.dtype == "auto" else options.dtype,
        trust_remote_code=options.trust_remote_code,
        chat_template=read_template(getattr(options, "chat_template_path", None)),
        force_template="template" in getattr(options, "force", []),
        texts_per_request=options.texts_per_request,
        requests_in_flight=options.requests_in_flight,
        allow_other_scores=options.allow_other_scores,
    )
