"""Deriving bases and training cores on pico models, by library and by command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.models.load import load_causal_lm, load_tokenizer
from lorasb_runtime.models.targets import find_targets, weight_of
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.storage.adapter_file import load_adapter
from lorasb_runtime.storage.basis_file import Basis, load_basis, save_basis
from lorasb_runtime.training.data import NO_LOSS, read_data
from lorasb_runtime.training.derive import DeriveConfig, derive_basis
from lorasb_runtime.training.gradients import summed_gradients
from lorasb_runtime.training.rates import learning_rate, rate_factor
from lorasb_runtime.training.trainer import CoreTrainer, TrainConfig

LORASB = (sys.executable, "-c", "from lorasb_tools.cli import main; main()")
QUIET = TrainConfig(epochs=2, batch_size=4)


def silent(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of twelve short completions each."""
    folder = tmp_path_factory.mktemp("data")
    for name, word in (("one", "aye"), ("two", "nay")):
        lines = [json.dumps({"prompt": f"{i}:", "completion": f" {word} {i}"}) for i in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def derive(model: Path, data: list[Path], **options: object) -> Basis:
    config = DeriveConfig(**{"rank": 4, "samples": 10, "batch_size": 3, **options})  # type: ignore[arg-type]
    return derive_basis(str(model), data, config, silent)


@pytest.fixture(scope="module")
def basis_file(pico: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    save_basis(derive(pico, [data]), path)
    return path


@pytest.mark.parametrize("kind", ["pico", "pico_gpt2"])
def test_gradients_are_those_of_plain_autograd(
    kind: str, data: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    codec = TextCodec(load_tokenizer(folder))
    examples = read_data(data / "one.jsonl", codec, 99).examples[:5]
    model = load_causal_lm(folder, torch.float32)
    targets = find_targets(model, 4)
    told: list[int] = []
    found = summed_gradients(model, targets, examples, 2, lambda done, _: told.append(done))
    assert told == [2, 4, 5]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    for example in examples:
        logits = model(input_ids=torch.tensor([example.tokens])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        cross_entropy(logits, labels, ignore_index=NO_LOSS).backward()
    for target in targets:
        module = model.get_submodule(target.module)
        grad = module.get_parameter("weight").grad
        assert grad is not None
        wanted = grad.t() if target.transposed else grad
        assert torch.allclose(found[target.module], wanted, atol=1e-5), target.module


def test_no_gradient_but_the_targets_own_is_ever_kept(pico: Path, data: Path) -> None:
    """While the gradients are gathered, no parameter holds one after its layer's backward."""
    codec = TextCodec(load_tokenizer(pico))
    model = load_causal_lm(pico, torch.float32)
    targets = find_targets(model, 4, "q_proj")
    kept: list[str] = []

    def look(*_: object) -> None:
        kept.extend(name for name, p in model.named_parameters() if p.grad is not None)
        wanting = {name for name, p in model.named_parameters() if p.requires_grad}
        assert wanting == {f"{t.module}.weight" for t in targets}

    examples = read_data(data / "one.jsonl", codec, 99).examples[:3]
    model.requires_grad_(True)
    summed_gradients(model, targets, examples, 1, look)
    assert not kept
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["lora-sb", "lora-xs"])
def test_two_runs_write_the_same_file(method: str, pico: Path, data: Path, tmp_path: Path) -> None:
    for name in "ab":
        command = [*LORASB, "derive", str(pico), "--method", method, "--rank", "4"]
        command += ["--data", str(data)] if method == "lora-sb" else []
        command += ["-o", str(tmp_path / name), "--json"]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        shown = json.loads(result.stdout)
        assert shown["digest"] == load_basis(tmp_path / name).digest
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_basis_says_what_it_is_of(pico: Path, data: Path) -> None:
    basis = derive(pico, [data / "one.jsonl", data / "two.jsonl"])
    assert (basis.method, basis.scaling, len(basis.targets)) == ("lora-sb", 1.0, 14)
    assert basis.targets[0].module == "model.layers.0.self_attn.q_proj"
    assert basis.base_model and basis.base_model.name == "pico"
    assert [d["name"] for d in basis.info["data"]] == ["one.jsonl", "two.jsonl"]
    assert basis.digest == derive(pico, [data]).digest
    assert basis.digest != derive(pico, [data / "one.jsonl"]).digest
    assert all(basis.r0(t.module) is not None for t in basis.targets)


def test_lora_xs_decomposes_the_weights(pico_gpt2: Path) -> None:
    basis = derive(pico_gpt2, [], method="lora-xs", rank=32)
    model = load_causal_lm(pico_gpt2, torch.float32)
    for target in basis.targets:
        assert target.transposed
        weight = weight_of(model.get_submodule(target.module))
        assert torch.allclose(basis.b(target.module) @ basis.a(target.module), weight, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "nothing"}, r"matches none.*model\.layers\.N\.mlp\.down_proj"),
        ({"targets": "("}, "no regular expression"),
        ({"rank": 33}, "found 33, expected at most"),
        ({"rank": 0}, "found 0"),
        ({"samples": 0}, "found 0"),
        ({"method": "lora-xs"}, "takes no --data"),
        ({"method": "svd"}, "expected one of"),
        ({"dtype": "int8"}, "found 'int8'"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, object], message: str, pico: Path, data: Path
) -> None:
    with pytest.raises(InputError, match=message):
        derive(pico, [data], **options)


def test_lora_sb_needs_data(pico: Path) -> None:
    with pytest.raises(InputError, match="needs --data"):
        derive(pico, [])


def test_targets_are_chosen_by_regular_expression(pico: Path, data: Path) -> None:
    basis = derive(pico, [data], targets=r"layers\.1\..*(q|v)_proj")
    assert [t.module for t in basis.targets] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_training_learns_and_repeats(
    pico: Path, data: Path, basis_file: Path, tmp_path: Path
) -> None:
    config = TrainConfig(epochs=8, lr=2e-2, batch_size=4)
    trainer = CoreTrainer(str(pico), basis_file, config)
    one = trainer.read(data / "one.jsonl")
    result = trainer.train(one, tmp_path / "a.safetensors", "a", silent)
    assert result.held_out_before and result.held_out_after
    assert result.held_out_after < 0.8 * result.held_out_before
    assert result.steps == 8 * 3 and (result.examples, result.held_out_examples) == (11, 1)
    adapter = load_adapter(tmp_path / "a.safetensors", load_basis(basis_file))
    assert adapter.cores.dtype == torch.float32
    assert (adapter.version, adapter.name) == (result.version, "a")
    assert adapter.info["complete"] and adapter.info["total_steps"] == 24
    trainer.train(trainer.read(data / "two.jsonl"), tmp_path / "b.safetensors", "b", silent)
    trainer.train(one, tmp_path / "c.safetensors", "a", silent)
    fresh = CoreTrainer(str(pico), basis_file, config)
    fresh.train(one, tmp_path / "d.safetensors", "a", silent)
    written = [(tmp_path / f"{n}.safetensors").read_bytes() for n in "abcd"]
    assert written[0] == written[2] == written[3] != written[1]


def test_a_seed_of_its_own_gives_an_adapter_of_its_own(
    pico: Path, data: Path, basis_file: Path, tmp_path: Path
) -> None:
    versions = set()
    for seed in (0, 1):
        trainer = CoreTrainer(str(pico), basis_file, TrainConfig(epochs=1, seed=seed))
        one = trainer.read(data / "one.jsonl")
        versions.add(trainer.train(one, tmp_path / f"{seed}", "x", silent).version)
    assert len(versions) == 2


def test_conv1d_models_train(pico_gpt2: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "basis.safetensors"
    save_basis(derive(pico_gpt2, [data]), path)
    trainer = CoreTrainer(str(pico_gpt2), path, TrainConfig(epochs=8, lr=2e-2))
    one = trainer.read(data / "one.jsonl")
    result = trainer.train(one, tmp_path / "a.safetensors", "a", silent)
    assert result.held_out_before and result.held_out_after
    assert result.held_out_after < result.held_out_before


def test_where_the_cores_start(pico: Path, basis_file: Path, tmp_path: Path) -> None:
    basis = load_basis(basis_file)
    steps = 30
    for init, init_lr, factor in (
        ("basis", None, learning_rate(QUIET.lr, 0, steps)),
        ("basis", 0.25, 0.25),
        ("zero", None, 0.0),
    ):
        config = TrainConfig(init=init, init_lr=init_lr)
        trainer = CoreTrainer(str(pico), basis_file, config)
        trainer._set_cores(trainer._initial_rate(steps))
        for target, core in zip(basis.targets, trainer._cores, strict=True):
            r0 = basis.r0(target.module)
            assert r0 is not None
            assert torch.allclose(core.core, factor * r0)
    xs = tmp_path / "xs.safetensors"
    save_basis(derive(pico, [], method="lora-xs"), xs)
    trainer = CoreTrainer(str(pico), xs, TrainConfig())
    trainer._set_cores(trainer._initial_rate(steps))
    assert 0 < max(c.core.abs().max().item() for c in trainer._cores) < 1e-4


def test_rates_are_scaled_to_the_size_of_the_step(pico: Path, data: Path) -> None:
    sb, xs = derive(pico, [data]), derive(pico, [], method="lora-xs")
    for target in sb.targets:
        assert rate_factor(sb, target.module) == pytest.approx(1, rel=1e-4)
        rms = xs.a(target.module).norm(dim=1).square().mean().sqrt().item()
        assert rate_factor(xs, target.module) == pytest.approx(1 / rms, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: found 0"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"lr": float("nan")}, "lr: found nan"),
        ({"lr": 0.0}, "lr: found 0.0"),
        ({"held_out": 1.0}, "held-out: found 1.0"),
        ({"init": "kaiming"}, "found 'kaiming'"),
        ({"init": "zero", "init_lr": 0.1}, "init-lr multiplies"),
    ],
)
def test_wrong_settings_are_refused(
    settings: dict[str, object], message: str, pico: Path, basis_file: Path
) -> None:
    with pytest.raises(InputError, match=message):
        CoreTrainer(str(pico), basis_file, TrainConfig(**settings))  # type: ignore[arg-type]


def test_a_basis_of_another_model_is_refused(pico_gpt2: Path, basis_file: Path) -> None:
    with pytest.raises(BasisMismatchError, match="found a basis for the model sha256:"):
        CoreTrainer(str(pico_gpt2), basis_file, TrainConfig())


def test_a_rate_that_is_too_high_is_named(
    pico: Path, data: Path, basis_file: Path, tmp_path: Path
) -> None:
    trainer = CoreTrainer(str(pico), basis_file, TrainConfig(lr=1e30))
    one = trainer.read(data / "one.jsonl")
    with pytest.raises(InputError, match=r"found a loss of nan.*--lr 1e\+30 is too high"):
        trainer.train(one, tmp_path / "a", "a", silent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "."], ".: found a folder"),
        (["-o", "b", "--method", "lora-xs", "--seed", "3"], "lora-xs takes no --seed"),
        (["-o", "b", "--method", "lora-xs", "--max-length", "9"], "takes no --max-length"),
    ],
)
def test_derive_refuses_what_it_cannot_use(
    more: list[str], message: str, pico: Path, tmp_path: Path
) -> None:
    command = [*LORASB, "derive", str(pico), *more]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def train_command(pico: Path, basis_file: Path, *more: object) -> list[str]:
    words = ("train", pico, "--basis", basis_file, *more)
    return [*LORASB, *(str(word) for word in words)]


def test_a_folder_of_data_gives_an_adapter_for_each_file(
    pico: Path, data: Path, basis_file: Path, tmp_path: Path
) -> None:
    command = train_command(pico, basis_file, "--data-dir", data, "-o", tmp_path, "--epochs", 1)
    result = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    shown = json.loads(result.stdout)["adapters"]
    assert [Path(a["output"]).name for a in shown] == ["one.safetensors", "two.safetensors"]
    single = tmp_path / "single.safetensors"
    more = ("--data", data / "two.jsonl", "-o", single, "--epochs", 1, "--name", "two")
    subprocess.run(train_command(pico, basis_file, *more), check=True, capture_output=True)
    assert single.read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_the_last_checkpoint(
    how: signal.Signals, pico: Path, data: Path, basis_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "a.safetensors"
    more = ("--data", data / "one.jsonl", "-o", output, "--epochs", 100000)
    command = train_command(pico, basis_file, *more)
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        deadline = time.monotonic() + 60
        while not output.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(how)
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()  # one that goes on would be waited for without end
    adapter = load_adapter(output, load_basis(basis_file))
    assert not adapter.info["complete"] and adapter.info["steps"] > 0
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert b"Traceback" not in errors
        assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "exactly one of --data and --data-dir"),
        (["--data", "gone.jsonl"], "gone.jsonl: no such data file"),
        (["--data-dir", "."], "found no *.jsonl"),
        (["--data", ".", "--held-out", "0"], ".: found a folder, expected a file"),
        (["--data-dir", ".", "-o", LORASB[0]], "found a file, expected a folder"),
        (["--data", "d", "--eval-data", "e", "--held-out", "0"], "at most one of --eval-data"),
    ],
)
def test_the_command_refuses_in_one_line(
    more: list[str], message: str, pico: Path, basis_file: Path, tmp_path: Path
) -> None:
    command = train_command(pico, basis_file, "-o", tmp_path / "a", *more)
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
