"""The routers' auxiliary loss is transformers' to the last digit, whatever recomputes the layers; tokens count once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot
from transformers import AutoTokenizer, PreTrainedModel
from transformers.integrations import integration_utils

from rm_scale.batching.collator import PackedCollator, PaddedCollator
from rm_scale.batching.device_transfer import move_batch
from rm_scale.errors import ModelError
from rm_scale.modeling.experts import routers
from rm_scale.modeling.token_scores import batch_rewards
from rm_scale.training.routing import EXPECTED_TOKENS, Routing, router_coefficient
from tests.support.families import tiny_classifier, write_causal_model
from tests.support.in_process import train_here
from tests.support.launching import read_lines

BALANCED_BY_A_LOSS = ["gpt_oss", "jamba", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next"]
COEFFICIENT = 1.0
NUM_EXPERTS = 4
CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "kept": None,
    "recomputed": {"use_reentrant": False},
    "recomputed_reentrant": {"use_reentrant": True},
}


def _batch() -> dict[str, Any]:
    """Two groups of responses of several lengths, so that rows have padding."""
    torch.manual_seed(1)
    groups = []
    for index, lengths in enumerate([(9, 14), (20, 11)]):
        prompt = torch.randint(3, 60, (6,)).tolist()
        ids = [prompt + torch.randint(3, 60, (length,)).tolist() for length in lengths]
        groups.append({"input_ids": ids, "ranks": [0, 1], "index": index, "margin": None, "soft_label": None})
    return move_batch(PaddedCollator(0, 8)(groups), torch.device("cpu"))


def _model(model_type: str, **extra: Any) -> PreTrainedModel:
    # Drops the noise that some families add to routers in training, which no two passes share.
    noise = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
    return tiny_classifier(model_type, initializer_range=0.3, **{**noise, **extra})


def _expected(
    model: PreTrainedModel, batch: dict[str, Any], scale: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return loss and gradients by transformers' own function, from logits that hooks keep with their graph."""
    found: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda m, i, output: found.append(output[0])) for r in routers(model).values()]
    rewards = batch_rewards(model, batch)
    for hook in hooks:
        hook.remove()
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    top_k = model.config.num_experts_per_tok
    aux = function(tuple(found), NUM_EXPERTS, top_k, batch["attention_mask"])
    (scale * (rewards.sum() + COEFFICIENT * aux)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return aux.detach(), gradients


def _with_loss(
    model: PreTrainedModel, routing: Routing, batch: dict[str, Any], scale: float
) -> dict[str, torch.Tensor]:
    pairs = batch["pair_better"].numel()
    with routing.watching(batch):
        rewards = batch_rewards(model, batch)
    (scale * (rewards.sum() + routing.loss(pairs, pairs))).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("model_type", BALANCED_BY_A_LOSS)
def test_loss_and_gradients_are_those_of_transformers(model_type: str, checkpointing: str) -> None:
    """With a loss that is scaled on its way, as engines do in half precision."""
    batch, scale = _batch(), 8.0
    model = _model(model_type).train()
    aux, expected = _expected(model, batch, scale)
    without = _with_loss(model, Routing(torch.nn.Identity(), COEFFICIENT), batch, scale)
    routing = Routing(model, COEFFICIENT)
    settings = CHECKPOINTING[checkpointing]
    if settings is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model.enable_input_require_grads()
    found = _with_loss(model, routing, batch, scale)
    assert found.keys() == expected.keys()
    for name in expected:
        difference = (found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert difference < 1e-4, name
    figures = routing.read()
    assert figures["router_aux_loss"] == pytest.approx(float(aux), rel=1e-5)
    assert figures["router_aux_loss_coef"] == COEFFICIENT
    for router in routers(model):
        moved = [not torch.allclose(without[n], expected[n], rtol=1e-2) for n in expected if n.startswith(router)]
        assert any(moved), f"the auxiliary loss does not move {router}"


@pytest.mark.parametrize("model_type", ["axk1", "deepseek_v2", "deepseek_v3", *BALANCED_BY_A_LOSS])
def test_the_load_of_every_layer_is_counted(model_type: str) -> None:
    model = _model(model_type).train()
    routing = Routing(model, 0.0)
    batch = _batch()
    _with_loss(model, routing, batch, 1.0)
    load = routing.read()["expert_load"]
    assert len(load["share"]) == NUM_EXPERTS
    assert len(load["layer_max"]) == len(routers(model)) > 0


@pytest.mark.parametrize("model_type", ["doge", "jetmoe"])
def test_routers_of_another_form_are_left_out_and_said(
    model_type: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    caplog.set_level(logging.INFO, "rm_scale")
    model = _model(model_type).train()
    assert router_coefficient(None, model) == 0.0
    said = [record.getMessage() for record in caplog.records]
    assert [f"routers of a {model_type} model choose experts in a way of their own" in line for line in said] == [True]
    with pytest.raises(ModelError, match=f"router_aux_loss_coef=0.1: .* {model_type} models .* in a way of their own"):
        router_coefficient(0.1, model)
    routing = Routing(model, COEFFICIENT)
    gradients = _with_loss(model, routing, _batch(), 1.0)
    assert gradients and routing.read() == {}


def test_a_router_with_unknown_outputs_is_left_out_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    model = _model("qwen3_moe").train()
    known = routers(model)
    unknown = "model.layers.1.mlp"
    found = {**known, unknown: model.get_submodule(unknown)}  # gives one tensor
    monkeypatch.setattr("rm_scale.training.routing.routers", lambda model: found)
    routing = Routing(model, COEFFICIENT)
    for _ in range(2):
        _with_loss(model, routing, _batch(), 1.0)
    assert routing.layers == list(known)
    assert len(routing.read()["expert_load"]["layer_max"]) == len(known)
    assert [unknown in record.getMessage() for record in caplog.records] == [True]


def test_a_pass_that_meets_no_router_has_no_loss() -> None:
    batch = _batch()
    routing = Routing(_model("qwen3_moe").train(), COEFFICIENT)
    with routing.watching(batch):
        pass
    assert routing.loss(2, 2) == 0.0
    assert routing.read() == {}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_tokens_are_counted_once_and_padding_never(checkpointing: str) -> None:
    batch = _batch()
    model = _model("qwen3_moe").train()
    chosen: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda m, i, output: chosen.append(output[2])) for r in routers(model).values()]
    with torch.no_grad():
        batch_rewards(model, batch)
    for hook in hooks:
        hook.remove()
    mask = batch["attention_mask"].reshape(-1, 1, 1)
    counts = torch.stack([(one_hot(layer, NUM_EXPERTS) * mask).sum((0, 1)) for layer in chosen]).double()
    routing = Routing(model, COEFFICIENT)
    settings = CHECKPOINTING[checkpointing]
    if settings is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model.enable_input_require_grads()
    _with_loss(model, routing, batch, 1.0)
    model.eval()
    with torch.no_grad():
        batch_rewards(model, batch)  # an evaluation counts nothing
    load = routing.read()["expert_load"]
    shares = counts / counts.sum(1, keepdim=True)
    assert load["share"] == pytest.approx(shares.mean(0).tolist(), abs=1e-6)
    assert load["layer_max"] == pytest.approx(shares.amax(1).tolist(), abs=1e-6)
    assert load["layer_min"] == pytest.approx(shares.amin(1).tolist(), abs=1e-6)
    assert routing.read() == {}


def test_a_step_is_the_mean_over_its_pairs_and_fillers_count_nothing() -> None:
    batch = _batch()
    model = _model("mixtral").train()
    routing = Routing(model, COEFFICIENT)
    filler = {**batch, "pair_better": batch["pair_better"][:0]}
    for one, pairs in ((batch, 2), (filler, 0), (batch, 2)):
        with routing.watching(one):
            batch_rewards(model, one)
        part = routing.loss(pairs, 4)
        assert routing._current is not None and isinstance(part, torch.Tensor)
        assert part.item() == pytest.approx(COEFFICIENT * pairs / 4 * routing._current.loss().item())
    figures = routing.read()
    with routing.watching(batch):
        batch_rewards(model, batch)
    routing.loss(2, 4)
    again = routing.read()
    assert figures["router_aux_loss"] == pytest.approx(again["router_aux_loss"])
    assert figures["expert_load"] == again["expert_load"]


def test_packed_rows_count_each_token_once_and_no_padding() -> None:
    groups = [
        {"input_ids": [[3, 4, 5, 6], [3, 4, 7]], "ranks": [0, 1], "index": 0, "margin": None, "soft_label": None},
    ]
    batch = PackedCollator(0, True, 16)(groups)
    routing = Routing(_model("qwen3_moe"), 0.0)
    with routing.watching(batch):
        assert routing._current is not None
        assert routing._current.mask.tolist() == [1.0] * 5 + [0.0] * 11


def test_dead_experts_are_named_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    # Alone, since an earlier test may have left a handler through which a line would be seen twice.
    monkeypatch.setattr(logging.getLogger("rm_scale"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", False)
    model = _model("qwen3_moe").train()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2] = 0.0  # logits of 0, where others may be above
        model.model.layers[1].mlp.gate.weight[3] = 0.0
    router = model.model.layers[1].mlp.gate
    router.register_forward_hook(lambda m, i, o: (o[0], o[1], torch.where(o[2] > 1, o[2] - 2, o[2])))
    routing = Routing(model, 0.0)
    batch = _batch()
    tokens = int(batch["attention_mask"].sum()) * 2 / NUM_EXPERTS
    for _ in range(2 * int(EXPECTED_TOKENS / tokens + 1)):
        with routing.watching(batch):
            batch_rewards(model, batch)
        figures = routing.read()
    assert figures["dead_experts"] == 2
    said = [record.getMessage() for record in caplog.records if "[dead_experts]" in record.getMessage()]
    assert len(said) == 1
    assert "2 of 12 experts" in said[0] and "2 of model.layers.1.mlp.gate, 3 of model.layers.1.mlp.gate" in said[0]


def test_loggers_get_figures_and_the_metrics_file_the_whole_load(
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorBoard warned of tables in every line."""
    warned: list[str] = []
    monkeypatch.setattr(integration_utils.logger, "warning", lambda text, *args: warned.append(text))
    model = write_causal_model(tmp_path / "model", "qwen3_moe", AutoTokenizer.from_pretrained(tiny_model))
    output = tmp_path / "run"
    flags = ["--model_name_or_path", str(model), "--dataset_path", str(pairs_file), "--output_dir", str(output)]
    flags += ["--bf16", "false", "--max_length", "128", "--max_steps", "2", "--logging_steps", "1", "--disable_tqdm"]
    done = train_here([*flags, "--sample_scores", "0", "--report_to", "tensorboard"], capfd)
    assert done.code == 0, done.output[-3000:]
    assert warned == []
    lines = [line for line in read_lines(output / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        load = line["expert_load"]
        assert line["num_tokens"]["real"] > 0
        assert line["expert_load_max"] == max(load["layer_max"]) > line["expert_load_min"] == min(load["layer_min"])
    events = b"".join(file.read_bytes() for file in output.rglob("events.out.tfevents*"))
    assert b"train/expert_load_max" in events and b"expert_load/" not in events


def test_coefficient_is_the_models_own_only_where_its_config_trains_with_it() -> None:
    model = _model("qwen3_moe", router_aux_loss_coef=0.02)
    assert router_coefficient(None, model) == 0.0
    assert router_coefficient(0.5, model) == 0.5
    model.config.output_router_logits = True
    assert router_coefficient(None, model) == 0.02
    assert router_coefficient(0.0, model) == 0.0
    assert router_coefficient(None, tiny_classifier("llama")) == 0.0


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("llama", "it has no experts"), ("deepseek_v3", "its routers are balanced in another way")],
)
def test_a_coefficient_without_use_is_refused(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"router_aux_loss_coef=0.1: .*{reason}. Fix: leave"):
        router_coefficient(0.1, tiny_classifier(model_type))
