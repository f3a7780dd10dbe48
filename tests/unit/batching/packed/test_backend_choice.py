"""Which attention backend packed rows get, and why one is refused."""

from __future__ import annotations

import pytest
import torch

from rm_scale.batching.packed.backend_choice import choose_backend, has_sinks
from rm_scale.errors import ConfigError
from tests.support.families import tiny_classifier


@pytest.mark.parametrize("has_softcap", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpus_get_matmul(dtype: str, has_softcap: bool) -> None:
    assert choose_backend("auto", "cpu", dtype, has_softcap) == "matmul"
    assert choose_backend("matmul", "cpu", dtype, has_softcap) == "matmul"


@pytest.mark.parametrize(
    ("dtype", "has_softcap", "capability", "head_dim", "expected"),
    [
        ("bfloat16", False, (9, 0), None, "varlen"),
        ("float16", False, (8, 0), None, "varlen"),
        ("bfloat16", False, (7, 5), None, "sdpa"),
        ("float32", False, (9, 0), None, "sdpa"),
        ("bfloat16", True, (9, 0), None, "flex"),
        ("float32", True, (7, 5), None, "flex"),
        *(("bfloat16", False, (8, 0), head_dim, "varlen") for head_dim in (8, 64, 80, 96, 128, 256)),
        ("bfloat16", False, (12, 0), 256, "varlen"),
        ("bfloat16", False, (9, 0), 100, "sdpa"),
        ("bfloat16", False, (9, 0), 264, "sdpa"),
        ("bfloat16", False, (9, 0), 208, "varlen"),
        ("bfloat16", False, (8, 9), 208, "sdpa"),
        ("bfloat16", True, (9, 0), 256, "flex"),
        ("bfloat16", True, (8, 9), 128, "flex"),
        ("bfloat16", True, (8, 6), 256, "flex"),
        ("float32", True, (7, 5), 256, "matmul"),
        ("bfloat16", True, (9, 0), 320, "matmul"),
        ("bfloat16", True, (9, 0), 8, "matmul"),
        ("bfloat16", True, (7, 5), 64, "matmul"),
    ],
)
def test_gpus_get_the_fastest_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    has_softcap: bool,
    capability: tuple[int, int],
    head_dim: int | None,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_backend("auto", "cuda", dtype, has_softcap, head_dim) == expected
    assert choose_backend(expected, "cuda", dtype, has_softcap, head_dim) == expected


def test_a_build_without_flash_attention_gets_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert choose_backend("auto", "cuda", "bfloat16", has_softcap=False) == "sdpa"
    with pytest.raises(ConfigError, match="needs flash attention, which this build of torch was made without"):
        choose_backend("varlen", "cuda", "bfloat16", has_softcap=False)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"), [("bfloat16", 64, "flex"), ("float32", 64, "flex"), ("bfloat16", 8, "sdpa")]
)
def test_sinks_are_left_to_what_has_them(
    monkeypatch: pytest.MonkeyPatch, dtype: str, head_dim: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_backend("auto", "cuda", dtype, False, head_dim, has_sinks=True) == expected
    with pytest.raises(ConfigError, match="packed_attention=varlen: has no attention sinks, which this model needs"):
        choose_backend("varlen", "cuda", "bfloat16", False, 64, has_sinks=True)


def test_sinks_are_found_in_the_model() -> None:
    assert has_sinks(tiny_classifier("gpt_oss")) and not has_sinks(tiny_classifier("llama"))


NEEDS_HALF = "needs a CUDA device of compute capability 8 or more and bfloat16 or float16, here "


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "has_softcap", "capability", "head_dim", "reason"),
    [
        ("varlen", "cpu", "bfloat16", False, (9, 0), None, NEEDS_HALF + "cpu, bfloat16"),
        ("varlen", "cuda", "float32", False, (9, 0), None, NEEDS_HALF + "cuda, float32"),
        ("varlen", "cuda", "bfloat16", False, (7, 5), None, NEEDS_HALF + "cuda, bfloat16"),
        ("varlen", "cuda", "bfloat16", False, (9, 0), 260, "needs heads of at most 256, a multiple of 8, here 260"),
        ("varlen", "cuda", "bfloat16", False, (9, 0), 100, "needs heads of at most 256, a multiple of 8, here 100"),
        (
            "varlen",
            "cuda",
            "bfloat16",
            False,
            (8, 6),
            224,
            "has no backward pass for heads of 193 to 224 on this GPU, here 224",
        ),
        ("flex", "cpu", "float32", False, (9, 0), None, "has no backward pass on a CPU"),
        (
            "flex",
            "cuda",
            "float16",
            True,
            (6, 1),
            64,
            "needs compute capability 7 or more, and 8 for bfloat16, here 6.1, float16",
        ),
        ("flex", "cuda", "bfloat16", True, (9, 0), 8, "needs heads of 16 to 256, here 8"),
        (
            "flex",
            "cuda",
            "float32",
            True,
            (7, 5),
            256,
            "needs more shared memory for heads over 128 in float32 than this GPU has, here 256",
        ),
        ("sdpa", "cpu", "float32", True, (9, 0), None, "can't cap attention scores, as this model does"),
        ("varlen", "cuda", "bfloat16", True, (9, 0), None, "can't cap attention scores, as this model does"),
    ],
)
def test_backends_that_can_not_do_it_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    device: str,
    dtype: str,
    has_softcap: bool,
    capability: tuple[int, int],
    head_dim: int | None,
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ConfigError) as caught:
        choose_backend(asked, device, dtype, has_softcap, head_dim)
    assert f"packed_attention={asked}: {reason}. Fix: leave it out, or use matmul." in str(caught.value)
