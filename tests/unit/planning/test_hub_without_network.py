"""A machine without a network is told so at once, not after the hub's client has tried for a minute."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from rm_scale.errors import ModelError
from rm_scale.known_models import KNOWN_MODELS
from rm_scale.planning.shape import read_model_config


def test_a_hub_model_without_a_network_is_refused_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    asked: list[bool] = []
    real = huggingface_hub.hf_hub_download

    def download(*names: Any, local_files_only: bool, **more: Any) -> Any:
        asked.append(local_files_only)
        return real(*names, local_files_only=True, **more)

    def no_address(*host: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    with pytest.raises(ModelError, match=r"the hub gave no config\.json"):
        read_model_config("nobody/no-such-model")
    assert asked == [True]
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    with pytest.raises(ModelError):
        read_model_config("nobody/no-such-model")
    assert asked == [True, False], "a proxy may know the name"


def test_the_page_names_all_models_that_need_no_network() -> None:
    page = (Path(__file__).parents[3] / "docs" / "planning.md").read_text()
    assert [name for name in KNOWN_MODELS if f"`{name}`" not in page] == []
