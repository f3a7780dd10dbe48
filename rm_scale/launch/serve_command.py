"""`rm-scale serve`: score over HTTP."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rm_scale.errors import ConfigError, UserError
from rm_scale.launch.score_command import MAX_TOKENS, add_scoring_arguments, load_scorer
from rm_scale.logs import get_logger

logger = get_logger(__name__)

HELP = "score over HTTP"
DESCRIPTION = (
    "Serve one reward model: /score and /rank, OpenRLHF's /get_reward, vLLM's /pooling and /classify, /health, /ready, "
    "/metrics, /docs. Requests are batched together as they come. See docs/serving.md."
)
TOKEN_VARIABLE = "RM_SCALE_SERVE_TOKEN"
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rm-scale serve`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's output directory, or an export")
    parser.add_argument("--name", help="what the model is called in answers (default: the folder's name)")
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    where.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed")
    where.add_argument(
        "--token_file", metavar="FILE", help=f"holds the token that clients must show; or set {TOKEN_VARIABLE}"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max_body_bytes", type=int, default=4 * 2**20, help="of a request (413)")
    limits.add_argument("--max_items", type=int, default=1024, help="texts of a request (413)")
    limits.add_argument("--max_queue_tokens", type=int, default=1_000_000, help="tokens that may wait (429)")
    limits.add_argument("--request_timeout", type=float, default=60.0, metavar="SECONDS", help="for an answer (504)")
    limits.add_argument("--body_timeout", type=float, default=20.0, metavar="SECONDS", help="for a body to come (408)")
    limits.add_argument("--rate_limit", type=float, metavar="N", help="requests per second of a client (429)")
    limits.add_argument("--max_wait_ms", type=float, default=0.0, help="that a batch waits for more (default 0)")
    limits.add_argument("--drain_seconds", type=float, default=30.0, help="for what was accepted, when stopped")
    add_scoring_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal comes; gives 0.

    Raises:
        UserError: an option makes no sense, the address is taken, or the server's packages are not installed.
    """
    _check(options)
    token = read_token(options.token_file)
    if token is None and options.host not in LOOPBACK:
        logger.warning(
            f"host={options.host}: others can reach this server, and it asks for no token. Fix: set "
            f"{TOKEN_VARIABLE} in the environment, or --token_file FILE."
        )
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"rm-scale serve needs {error.name}. Fix: pip install 'rm-scale[serve]'.") from error
    return _serve(options, token)


def _check(options: argparse.Namespace) -> None:
    names = ("max_body_bytes", "max_items", "max_queue_tokens", "request_timeout", "body_timeout", "rate_limit")
    problems = [
        f"{name}={value:g}: must be above 0. Fix: leave it out."
        for name in (*names, "max_tokens_per_batch")
        if (value := getattr(options, name)) is not None and value <= 0
    ]
    problems += [
        f"{name}={value:g}: must not be negative. Fix: leave it out."
        for name in ("max_wait_ms", "drain_seconds")
        if (value := getattr(options, name)) < 0
    ]
    if not 0 <= options.port <= 65535:
        problems.append(f"port={options.port}: must be from 0 to 65535. Fix: 8000.")
    if problems:
        raise ConfigError(problems, "rm-scale serve: the options can't be used")


def read_token(file: str | None) -> str | None:
    """The token that clients must show, from a file or the environment; never from the command line, which others see.

    Raises:
        UserError: the file can't be read, or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token_file={file}: can't be read ({error}). Fix: a file with one line.") from error
    if not token:
        raise UserError(f"token_file={file}: is empty. Fix: a file with one line.")
    return token


def _serve(options: argparse.Namespace, token: str | None) -> int:
    from rm_scale.distributed import World, has_gpu, prepare_environment

    prepare_environment(World())
    from rm_scale.inference.server.app import Service, build_app
    from rm_scale.inference.server.limits import Limits
    from rm_scale.inference.server.running import serve

    device = options.device or ("cuda" if has_gpu() else "cpu")
    limits = Limits(
        max_body_bytes=options.max_body_bytes,
        max_items=options.max_items,
        max_queue_tokens=options.max_queue_tokens,
        max_tokens_per_batch=options.max_tokens_per_batch or MAX_TOKENS[device.split(":")[0]],
        request_timeout_seconds=options.request_timeout,
        body_timeout_seconds=options.body_timeout,
        max_wait_seconds=options.max_wait_ms / 1000,
        requests_per_second=options.rate_limit,
        drain_seconds=options.drain_seconds,
    )
    scorer: Any = load_scorer(options.model, options, device)
    name = options.name or Path(options.model).resolve().name
    service = Service(scorer, name, limits, scores_in_thread=False)
    return serve(build_app(service, token), service, options.host, options.port)
