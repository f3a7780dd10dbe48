"""`rm-scale plan`, `tiers` and `launch --dry_run` as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rm_scale.cli import main
from rm_scale.errors import ConfigError
from rm_scale.launch.deepspeed_command import check_remote_arguments
from rm_scale.texts import large_number


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_json_has_the_promised_names(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--tier", "13b", "--gpus", "16", "--nodes", "2", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["fits"] is True and answer["predicted"] is True
    assert answer["peak_memory_bytes"] == sum(answer["memory"].values())
    for name in ("step_seconds", "tokens_per_second_per_device", "pairs_per_second", "mfu"):
        assert 0 < answer[name]["low"] <= answer[name]["high"]
    assert answer["load_peak_memory_bytes"] > 0
    assert answer["recommended"]["zero_stage"] in {1, 2, 3}


def test_a_mixture_of_experts_is_planned_as_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a known model by its shape alone: all experts are in memory, few at work, none in 4 bits, none adapted."""
    monkeypatch.setattr("rm_scale.planning.shape._hub_has_an_address", lambda: False)
    words = ["plan", "--model", "Qwen/Qwen3-30B-A3B", "--gpus", "8", "--zero", "3", "--offload", "none"]
    code, out, _ = run(capsys, *words, "--method", "qlora")
    assert code == 0
    assert "30.22B parameters, qlora" in out
    assert "3.04B of the parameters at work for a token, 8 of 128 experts a layer" in out
    assert "LoRA adapts k_proj, o_proj, q_proj, v_proj; not the experts" in out
    assert "58.0 GB of them" in out
    answer = json.loads(run(capsys, *words, "--json")[1])
    assert answer["num_parameters"] == 30_220_957_696 and answer["num_active_parameters"] == 3_041_867_776
    assert answer["memory"]["weights"] == pytest.approx(2 * 30.22e9 / 8, rel=0.01)


def test_the_layers_that_are_adapted_can_be_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of all experts are larger than the attention's, and rank 16 on two layers is less than on all."""
    monkeypatch.setattr("rm_scale.planning.shape._hub_has_an_address", lambda: False)
    words = ["plan", "--model", "Qwen/Qwen3-30B-A3B", "--gpus", "8", "--zero", "3", "--method", "lora", "--json"]
    experts = ["--lora_target_parameters", "experts.gate_up_proj", "experts.down_proj"]
    trained = [
        json.loads(run(capsys, *words, *more)[1])["num_trained_parameters"]
        for more in ([], ["--lora_target_modules", "q_proj", "self_attn.v_proj"], experts)
    ]
    layers, hidden, queries, values, rank = 48, 2048, 4096, 512, 16
    assert trained[1] == layers * rank * (hidden + queries + hidden + values) + hidden  # the head
    width, num_experts = 768, 128
    of_experts = layers * num_experts * rank * ((hidden + 2 * width) + (width + hidden))
    assert trained[1] < trained[0] and trained[2] == trained[0] + of_experts
    code, out, _ = run(capsys, *words[:-1], *experts)
    assert code == 0 and "of the experts experts.gate_up_proj, experts.down_proj" in out


def test_an_unknown_kind_of_model_is_refused_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange_moe", **sizes}))
    code, _, err = run(capsys, "plan", "--model", str(tmp_path))
    assert code == 2
    assert "'strange_moe': the planner's formulas don't know this kind of model" in err and "--exact" in err


@pytest.mark.long
def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--tier", "13b", "--gpus", "1", "--gpu", "4090", "--seq", "2048", "--offload", "none"]
    code, out, _ = run(capsys, *words)
    assert code == 1
    assert "DOES NOT FIT" in out
    assert "--method qlora" in out
    code, out, _ = run(capsys, *words, "--method", "qlora")
    assert code == 0


def test_qlora_loads_the_whole_quantised_model_on_each_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """ZeRO-3 shards full models while they are read, 4-bit ones only afterwards."""
    loads = {}
    for method in ("full", "qlora"):
        words = ["plan", "--tier", "13b", "--gpus", "64", "--zero", "3", "--offload", "none", "--json"]
        loads[method] = json.loads(run(capsys, *words, "--method", method)[1])["load_peak_memory_bytes"]
    assert loads["qlora"] > 7e9
    assert loads["full"] < loads["qlora"]


def test_compare_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "plan", "--tier", "7b", "--compare", "--pairs", "1e5")
    assert [line.split()[0] for line in out.splitlines()[-5:]] == ["full", "lora", "qlora", "close:", "lengths:"]
    _, out, _ = run(capsys, "plan", "--tier", "7b", "--explain", "--gpu_hour_price", "2.5", "--pairs", "1e5")
    assert "ZeRO, arXiv 1910.02054" in out
    assert "activations, " in out
    assert "at 2.5 per device hour" in out


def test_slow_network_binds_and_names_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--tier", "7b", "--gpus", "16", "--nodes", "2", "--node_bandwidth_gbit", "10", "--zero", "3"]
    _, out, _ = run(capsys, *words, "--max_tokens", "8192")
    assert "bound by communication" in out
    assert "--hpz" in out and "--method lora" in out


def test_real_lengths_drive_the_plan(capsys: pytest.CaptureFixture[str], pairs_file: Path, tiny_model: Path) -> None:
    words = ["plan", "--model", str(tiny_model), "--seq", "256", "--gpus", "1", "--json"]
    assumed = json.loads(run(capsys, *words)[1])
    measured = json.loads(run(capsys, *words, "--data", str(pairs_file))[1])
    assert "120 of 120 groups" in measured["lengths"]
    assert measured["pairs_per_second"]["high"] > assumed["pairs_per_second"]["high"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tier", "14b"], "tier='14b': the tiers are 1b, 3b, 7b, 13b. Fix: choose from 1b"),
        (["--tier", "a" * 100_000], f"tier='{'a' * 200}...': the tiers are"),
        (["--tier", "7b", "--gpu", "a" * 100_000], f"gpu='{'a' * 200}...': not a device we know"),
        ([], "tier and model: give one of them"),
        (["--tier", "7b", "--gpu", "h100x"], "gpu='h100x': not a device we know"),
        (["--tier", "7b", "--gpu", "h100x"], "did you mean h100"),
        (["--tier", "7b", "--gpus", "0"], "gpus=0: must be at least 1"),
        (["--tier", "7b", "--gpus", "999999", "--global_batch_size", "9999999"], "gpus=999999: must be at most 100000"),
        (["--tier", "7b", "--gpus", "9" * 30], f"gpus={'9' * 30}: must be at most 100000. Fix: --gpus 100000 or less"),
        (["--tier", "7b", "--gpus", "9" * 4000], f"gpus={'9' * 40}...: must be at most 100000"),
        (["--tier", "7b", "--nodes", "9" * 30], "must be at most 100000"),
        (["--tier", "7b", "--seq", "9" * 30], "must be at most 1000000000. Fix: --seq"),
        (["--tier", "7b", "--global_batch_size", "9" * 30], "must be at most 1000000000. Fix: --global_batch_size"),
        (["--tier", "7b", "--max_tokens", "9" * 30], "must be at most 1000000000. Fix: --max_tokens"),
        (["--tier", "7b", "--micro_batch", "9" * 30], "must be at most 1000000. Fix: --micro_batch"),
        (["--tier", "7b", "--lora_r", "9" * 30], "must be at most 65536. Fix: --lora_r"),
        (["--tier", "7b", "--pairs", "1e30"], "pairs=1e+30: must be at most 1000000000000. Fix: --pairs"),
        (["--tier", "7b", "--pairs", "nan"], "pairs=nan: must be at least 1"),
        (["--tier", "7b", "--gpus", "6", "--nodes", "4"], "nodes must have equally many"),
        (["--tier", "7b", "--gpus", "2", "--nodes", "4"], "a node has at least one"),
        (["--tier", "7b", "--gpus", "256"], "every rank needs a group in each step"),
        (["--tier", "7b", "--nodes", "1", "--hpz"], "hpz with nodes=1"),
        (["--tier", "7b", "--hpz", "--zero", "2"], "hpz with zero=2"),
        (["--tier", "7b", "--zero", "0", "--offload", "optimizer"], "DeepSpeed does the offloading"),
        (["--tier", "7b", "--zero", "2", "--offload", "all"], "weights leave the device under ZeRO-3 only"),
        (["--tier", "7b", "--packing", "none", "--max_tokens", "9000"], "padded rows are sized by --micro_batch"),
        (["--tier", "7b", "--max_tokens", "100"], "a row must hold a sequence"),
        (["--tier", "7b", "--gpu_hour_price", "-1"], "gpu_hour_price=-1: must be a positive number"),
        (["--tier", "7b", "--lora_target_modules", "q_proj"], "with method=full: adapters are LoRA's"),
        (
            ["--tier", "7b", "--method", "lora", "--lora_target_modules", "q_proj", "query"],
            "lora_target_modules=['query']: this model has no such layer. Fix: one of down_proj, gate_proj",
        ),
        (
            ["--tier", "7b", "--method", "lora", "--lora_target_parameters", "experts.down_proj"],
            "a model of type llama has no experts. Fix: leave lora_target_parameters out.",
        ),
        (["--model", "/no/such/folder"], "there is no such folder"),
    ],
)
def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    code, _, err = run(capsys, "plan", *words)
    assert code == 2
    assert text in err


def test_plan_imports_no_torch() -> None:
    code = (
        "import sys, rm_scale.commands.tiers; from rm_scale.cli import main; main(['plan', '--tier', '1b']);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "peak in training" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize(("seq", "rule"), [("0", "must be at least 1"), ("9" * 30, "must be at most 1000000000")])
def test_tiers_of_no_length(capsys: pytest.CaptureFixture[str], seq: str, rule: str) -> None:
    code, out, err = run(capsys, "tiers", "--seq", seq)
    assert (code, out) == (2, "") and f"seq={seq}: {rule}" in err


def test_tiers_name_the_smallest_cluster_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "tiers")
    assert code == 0 and "smallest H100 SXM 80 GB cluster" in out and "full x" in out


def test_devices_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("devices:\n  big:\n    like: h100-80g\n    memory_bytes: 300e9\n")
    code, out, _ = run(
        capsys, "plan", "--tier", "13b", "--gpus", "1", "--gpu", "big", "--hardware", str(file), "--json"
    )
    assert code == 0 and json.loads(out)["memory_limit_bytes"] == int(300e9 * 0.95)
    for text, problem in (
        ("devices:\n  big:\n    memory: 3\n", "memory: no such figure. Fix: did you mean memory_bytes?"),
        ("devices:\n  big:\n    memory_bytes: -3\n", "must be a number, not negative"),
        ("devices:\n  big:\n    memory_bytes: 3\n", "lacks "),
        ("devices:\n  big:\n    like: h999\n", "like='h999': not a device we know"),
        ("devices:\n  big: 3\n", "must be a mapping of figures"),
        ("3\n", "has no devices"),
        ("a: [\n", "can't be read"),
    ):
        file.write_text(text)
        code, _, err = run(capsys, "plan", "--tier", "7b", "--gpu", "big", "--hardware", str(file))
        assert code == 2 and problem in err, text


def test_launch_prints_the_command_it_would_run(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    words = ["launch", "--gpus", "2", "--dry_run", "--model_name_or_path", str(tiny_model)]
    words += ["--dataset_path", str(pairs_file), "--output_dir", str(tmp_path / "run"), "--max_length", "256"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "predicted on a processor: peak" in out
    command = out.splitlines()[-1]
    assert "DS_ACCELERATOR=cpu" in command and "--num_accelerators 2" in command
    assert "--max_tokens_per_device" in command and f"--output_dir {tmp_path / 'run'}" in command
    assert not (tmp_path / "run").exists()


def test_launch_refuses_what_does_not_fit(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("devices:\n  small:\n    like: a100-40g\n    memory_bytes: 1.0e9\n")
    words = ["launch", "--dry_run", "--gpu", "small", "--hardware", str(file), "--model_name_or_path", str(tiny_model)]
    words += ["--dataset_path", str(pairs_file), "--output_dir", str(tmp_path / "run"), "--max_length", "256"]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "the plan needs" in err and "--force plan" in err
    code, out, err = run(capsys, *words, "--force", "plan")
    assert code == 0 and "started all the same" in out + err


def test_words_that_shells_would_change_are_not_sent_to_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    check_remote_arguments(["--output_dir", "/shared/run 1", "--learning_rate", "1e-5", "--run_name=a_b"])
    for word in (
        "",
        "$(reboot)",
        "a;b",
        "`id`",
        'say "yes"',
        "it's",
        "50%n",
        "a|b",
        "a&b",
        "a>b",
        "a\nb",
        "*.jsonl",
        "~/x",
    ):
        with pytest.raises(ConfigError, match="the shells between here and the nodes would change it"):
            check_remote_arguments(["--run_name", word])
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="pdsh, which is not here"):
        check_remote_arguments([])


def test_figures_are_those_that_a_person_would_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No range of one number, no "0M parameters", no "4.21e-05 hours"; close to the limit is marked."""
    tiny = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny |= {"intermediate_size": 64, "vocab_size": 400, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    main(["plan", "--model", str(tmp_path), "--gpus", "1", "--pairs", "1000", "--seq", "512"])
    main(["plan", "--tier", "7b", "--gpus", "8", "--compare", "--pairs", "100000"])
    shown = capsys.readouterr().out
    assert "33k parameters" in shown and "0.00B" not in shown
    assert not re.search(r"\d[.e]\d*e-\d+ (hours|to)", shown)
    assert not re.search(r"(\b[\d.,]+%?(?: m?s)?) (?:to|-) \1(?![\d.,])", shown), shown


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (81_408, "81k"), (134_515_008, "134.5M"), (13_015_864_320, "13.02B")]
)
def test_large_numbers(value: int, text: str) -> None:
    assert large_number(value) == text


MIXTURE = ("plan", "--model", "Qwen/Qwen3-30B-A3B", "--gpus", "8")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_scale.planning.shape._hub_has_an_address", lambda: False)


def test_no_sequence_is_longer_than_the_model_has_positions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, no_network: None
) -> None:
    code, _, err = run(capsys, *MIXTURE, "--max_length", "65536")
    assert code == 2 and "seq=65536: the model has only 40960 positions. Fix: --seq 40960 or less." in err
    tiny = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny |= {"intermediate_size": 64, "vocab_size": 400, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    answer = json.loads(run(capsys, "plan", "--model", str(tmp_path), "--gpus", "1", "--json")[1])
    assert answer["notes"] == ["seq not given: 512, all positions that the model has"]
    assert "every sequence 512 tokens" in answer["lengths"]


def test_methods_side_by_side_say_what_one_says(capsys: pytest.CaptureFixture[str], no_network: None) -> None:
    experts = ["--lora_target_parameters", "gate_up_proj"]
    code, out, _ = run(capsys, *MIXTURE, "--compare", *experts)
    assert code == 0
    for text in ("mixture of experts: 3.04B", "of the experts experts.gate_up_proj", "4 bits: linear layers alone"):
        assert text in out
    assert "lengths: assumed: every sequence 4,096 tokens" in out
    answer = json.loads(run(capsys, *MIXTURE, "--compare", "--json", *experts)[1])
    assert [len(answer[method]["notes"]) for method in ("full", "lora", "qlora")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lora_r", "8"), "lora_r=8 with method=full: adapters are LoRA's. Fix: --method lora."),
        (("--use_bnb_nested_quant",), "with method=full: only QLoRA has 4-bit weights. Fix: --method qlora."),
        (("--method", "lora", "--use_bnb_nested_quant"), "with method=lora: only QLoRA has 4-bit weights."),
        (
            ("--method", "lora", "--lora_target_modules", "gate_proj"),
            "of qwen3_moe models PEFT reads gate_proj as the tensors of all experts",
        ),
        (("--gpu", "5090"), "gpu='5090': not a device we know"),
    ],
)
def test_an_option_that_means_nothing_or_something_else_is_refused(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str], no_network: None
) -> None:
    code, _, err = run(capsys, *MIXTURE, *words)
    assert code == 2 and told in err and "did you mean" not in err


def test_a_known_model_is_planned_by_all_without_a_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, no_network: None
) -> None:
    """As the header of its ready run says; training itself needs the real file."""
    from rm_scale import train
    from rm_scale.planning.shape import _warn_of_known_shape

    _warn_of_known_shape.cache_clear()
    config = str(Path(__file__).parents[3] / "configs" / "qwen3_30b_a3b_lora.yaml")
    words = ["--config", config, "--dataset_path", "none", "--output_dir", str(tmp_path / "out")]
    assert train.main([*words, "--dry_run"]) == 0
    seen = capsys.readouterr()
    assert "LoRA adapts k_proj, o_proj, q_proj, v_proj; not the experts" in seen.out
    assert "the default by size (above 7B)" in seen.out
    assert (seen.out + seen.err).count("planned with the shape that comes with rm_scale") == 1
    code, out, _ = run(capsys, "launch", "--dry_run", "--gpus", "8", "--gpu", "h100-80g", *words)
    assert code == 0 and "mixture of experts: 3.04B" in out
    assert train.main(words) == 2
    assert "(no network). Fix: give a local folder" in capsys.readouterr().err
    _, out, _ = run(capsys, "doctor", "--model", "Qwen/Qwen3-30B-A3B", "--output_dir", str(tmp_path / "out"))
    assert "Qwen/Qwen3-30B-A3B: qwen3_moe, 30.22B parameters" in out
