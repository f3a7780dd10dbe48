"""`rm-scale serve`: serve one reward model over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
from pathlib import Path
from typing import Any

from rm_scale.commands.scoring_options import add_scoring_arguments, load_scorer, tokens_per_batch
from rm_scale.errors import ConfigError, UserError
from rm_scale.inference.serve_token import TOKEN_VARIABLE, token_of_file, token_of_variable
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

HELP = "score over HTTP"
EXAMPLE = "rm-scale serve --model outputs/demo --port 8000"
DESCRIPTION = (
    "Serve one reward model: /score and /rank, OpenRLHF's /get_reward, vLLM's /classify, /pooling and /rerank, "
    "SGLang's /v1/embeddings, /health, /ready, /metrics, /docs. Requests are batched together as they come. See "
    "docs/serving.md."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale serve`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's output directory, or an export")
    parser.add_argument("--name", help="what the model is called in answers (default: the folder's name)")
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    where.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed")
    where.add_argument(
        "--token_file", metavar="FILE", help=f"holds the token that clients must show; or set {TOKEN_VARIABLE}"
    )
    where.add_argument("--no_auth", action="store_true", help="serve others without a token: anybody may ask")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max_body_bytes", type=int, default=4 * 2**20, help="of a request (413)")
    limits.add_argument("--max_items", type=int, default=1024, help="texts of a request (413)")
    limits.add_argument("--max_queue_tokens", type=int, default=1_000_000, help="tokens that may wait (429)")
    limits.add_argument("--request_timeout", type=float, default=60.0, metavar="SECONDS", help="for an answer (504)")
    limits.add_argument("--body_timeout", type=float, default=20.0, metavar="SECONDS", help="for a body to come (408)")
    limits.add_argument("--header_timeout", type=float, default=10.0, metavar="SECONDS", help="for its headers to come")
    limits.add_argument("--rate_limit", type=float, metavar="N", help="requests per second of a client (429)")
    limits.add_argument("--max_wait_ms", type=float, default=0.0, help="that a batch waits for more (default 0)")
    limits.add_argument("--drain_seconds", type=float, default=30.0, help="for what was accepted, when stopped")
    add_scoring_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal comes; return 0.

    Raises:
        UserError: an option makes no sense, there is no token where one is needed, the address is taken, or the
            server's packages are not installed.
    """
    _check(options)
    token = read_token(options)
    if token is None and not is_loopback(options.host):
        logger.warning(
            f"NO AUTHENTICATION: host={options.host}, others can reach this server, and anybody who does may ask "
            "(--no_auth)."
        )
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"rm-scale serve needs {error.name}. Fix: pip install 'rm-scale[serve]'.") from error
    return _serve(options, token)


# The largest that an option may be: a year, and more requests than any machine answers.
_MOST_SECONDS = 366 * 24 * 3600
_MOST = 10**12
_ABOVE_ZERO = {
    **dict.fromkeys(("max_body_bytes", "max_items", "max_queue_tokens", "rate_limit", "max_tokens_per_batch"), _MOST),
    **dict.fromkeys(("request_timeout", "body_timeout", "header_timeout"), _MOST_SECONDS),
}
_NOT_NEGATIVE = {"max_wait_ms": 1000 * _MOST_SECONDS, "drain_seconds": _MOST_SECONDS}


def _check(options: argparse.Namespace) -> None:
    given = {name: value for name in (*_ABOVE_ZERO, *_NOT_NEGATIVE) if (value := getattr(options, name)) is not None}
    rules = {name: rule for name, value in given.items() if (rule := _broken_rule(name, value)) is not None}
    problems = [f"{name}={_shown(given[name])}: {rule}. Fix: leave it out." for name, rule in rules.items()]
    if not 0 <= options.port <= 65535:
        problems.append(f"port={_shown(options.port)}: must be from 0 to 65535. Fix: 8000.")
    if not options.host.strip():
        problems.append("host='': must not be empty. Fix: leave it out for this machine only; 0.0.0.0 for all others.")
    if problems:
        raise ConfigError(problems, "rm-scale serve: the options can't be used")


def _broken_rule(name: str, value: float) -> str | None:
    """Return which rule a number breaks, if any."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if name in _ABOVE_ZERO and value <= 0:
        return "must be above 0"
    if name in _NOT_NEGATIVE and value < 0:
        return "must not be negative"
    most = (_ABOVE_ZERO | _NOT_NEGATIVE)[name]
    return f"must be at most {most:,}" if value > most else None


def _shown(value: float) -> str:
    return one_line(f"{value:g}" if isinstance(value, float) else str(value), 60)


def read_token(options: argparse.Namespace) -> str | None:
    """Read the token that clients must show: from a file or the environment, as others see a command line.

    Returns:
        The token; `None` where nobody needs one: with `--no_auth`, or when only this machine can ask.

    Raises:
        UserError: what is given can't be a token, or others can reach the server and there is none.
    """
    if options.no_auth:
        if options.token_file is not None or os.environ.get(TOKEN_VARIABLE, "").strip():
            raise UserError(f"--no_auth: a token is given too (--token_file or {TOKEN_VARIABLE}). Fix: one of the two.")
        return None
    if options.token_file is not None:
        return token_of_file(options.token_file)
    token = token_of_variable(TOKEN_VARIABLE, "put the token there, or unset it; --no_auth to serve without one.")
    if token is None and not is_loopback(options.host):
        raise UserError(
            f"host={options.host}: others can reach this server, and there is no token. Fix: {TOKEN_VARIABLE} in the "
            "environment, or --token_file FILE; --no_auth if anybody may ask."
        )
    return token


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(options: argparse.Namespace, token: str | None) -> int:
    from rm_scale.distributed import World, prepare_environment

    prepare_environment(World())
    from rm_scale.inference.server.app import build_app
    from rm_scale.inference.server.run_server import listen, serve
    from rm_scale.inference.server.server_options import ServerOptions
    from rm_scale.inference.server.service import Service
    from rm_scale.launch.devices import rank_device

    listen(options.host, options.port).close()  # what is wrong with the address is said before a model is loaded
    device = rank_device(options.device, World())
    server_options = ServerOptions(
        max_body_bytes=options.max_body_bytes,
        max_items=options.max_items,
        max_queue_tokens=options.max_queue_tokens,
        max_tokens_per_batch=tokens_per_batch(options, device),
        request_timeout_seconds=options.request_timeout,
        body_timeout_seconds=options.body_timeout,
        header_timeout_seconds=options.header_timeout,
        max_wait_seconds=options.max_wait_ms / 1000,
        requests_per_second=options.rate_limit,
        drain_seconds=options.drain_seconds,
    )
    scorer: Any = load_scorer(options.model, options, device)
    name = options.name or Path(options.model).resolve().name
    service = Service(scorer, name, server_options, scores_in_thread=False)
    return serve(build_app(service, token), service, options.host, options.port)
