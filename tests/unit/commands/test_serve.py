"""Which token `rm-scale serve` asks for: never none by accident."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from rm_scale.cli import main
from rm_scale.commands import serve
from rm_scale.errors import UserError
from rm_scale.inference.serve_token import TOKEN_VARIABLE


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["--model", "m", *words])


@pytest.mark.parametrize("blank", ["", " ", "\n", "\t \n"])
def test_an_empty_token_is_no_open_door(blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, blank)
    with pytest.raises(UserError, match=rf"{TOKEN_VARIABLE} in the environment: is empty\. Fix: .*--no_auth"):
        serve.read_token(options())
    monkeypatch.delenv(TOKEN_VARIABLE)
    file = tmp_path / "token"
    file.write_text(blank)
    with pytest.raises(UserError, match=r"token_file=.*: is empty\. Fix: a file with one line"):
        serve.read_token(options("--token_file", str(file)))


def test_what_a_token_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "  s3cret\r\n")
    assert serve.read_token(options("--host", "0.0.0.0")) == "s3cret"
    for wrong in ("schlüssel", "two\nlines", "a\x1b[2J"):
        monkeypatch.setenv(TOKEN_VARIABLE, wrong)
        with pytest.raises(UserError, match="not printable ASCII") as caught:
            serve.read_token(options())
        assert wrong not in str(caught.value)
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    assert serve.read_token(options("--token_file", str(file))) == "of-the-file", "it has the last word"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="can't be read"):
        serve.read_token(options("--token_file", str(file)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node1", "128.0.0.1"])
def test_others_are_served_without_a_token_only_when_asked(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"others can reach this server, and there is no token\. Fix: .*--no_auth"):
        serve.read_token(options("--host", host))
    assert serve.read_token(options("--host", host, "--no_auth")) is None
    assert main(["serve", "--model", str(tmp_path), "--host", host, "--no_auth"]) == 2, "there is no model"
    assert "NO AUTHENTICATION: host=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--rate_limit", "nan"], "rate_limit=nan: must be a finite number. Fix: leave it out."),
        (["--max_wait_ms", "inf"], "max_wait_ms=inf: must be a finite number."),
        (["--request_timeout", "nan"], "request_timeout=nan: must be a finite number."),
        (["--drain_seconds=-inf"], "drain_seconds=-inf: must be a finite number."),
        (["--request_timeout", "1e300"], "request_timeout=1e+300: must be at most 31,622,400."),
        (["--max_items=-1" + 400 * "0"], "must be above 0. Fix: leave it out."),
        (["--max_body_bytes", "1" + 30 * "0"], "must be at most 1,000,000,000,000."),
        (["--port", "1" + 400 * "0"], "must be from 0 to 65535."),
        (["--host", ""], "host='': must not be empty. Fix: leave it out for this machine only"),
        (["--host", " "], "host='': must not be empty."),
    ],
)
def test_numbers_and_hosts_that_no_server_can_keep_to(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(tmp_path), *words]) == 2
    told = capsys.readouterr().err
    assert "rm-scale serve: the options can't be used (1 problem)" in told
    assert part in told


@pytest.mark.parametrize("host", ["nosuch.host.invalid", "a" * 70 + ".b", "a..b"])
def test_a_host_that_cannot_be_resolved_is_told_before_a_model_is_looked_for(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(tmp_path / "nosuch"), "--host", host, "--no_auth"]) == 2
    told = capsys.readouterr().err
    assert "is no address of this machine, and no name that can be resolved" in told
    assert "nosuch:" not in told and "Traceback" not in told


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    assert serve.is_loopback(host) and serve.read_token(options("--host", host)) is None


def test_a_token_and_none_is_a_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--no_auth: a token is given too"):
        serve.read_token(options("--no_auth", "--token_file", "x"))
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
    with pytest.raises(UserError, match=r"--no_auth: a token is given too"):
        serve.read_token(options("--no_auth"))
