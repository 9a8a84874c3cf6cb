"""Import of the original authors' checkpoints: every file of GOLDEN_DIR/original_checkpoints, and every mistake."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT, golden_files
from torch import Tensor

from ide_snn.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ide_snn.config import ConfigError, build_model, load_config
from ide_snn.original import (
    OriginalCheckpoint,
    compose_config,
    import_original,
    network_from_original,
    read_original,
    split_arguments,
)
from ide_snn.run import evaluate_checkpoint, model_from_checkpoint
from ide_snn.schemas import EvaluateConfig

FILES = golden_files("original_checkpoints/*.pth.tar")
OWN = PROJECT / "tests" / "golden" / "original_checkpoints"
KINDS = ("fc", "conv", "multilayer")
CONSTRAINED = "block.feedback.op.parametrizations.weight"
by_name = pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.removesuffix(".pth.tar"))


@cache
def expected(path: Path) -> dict[str, Any]:
    """x, rates, logits as tensors and the config of a golden file."""
    with np.load(path.with_name(path.name.replace(".pth.tar", "_expected.npz")), allow_pickle=False) as data:
        tensors = {key: torch.from_numpy(data[key]) for key in ("x", "rates", "logits")}
        return {**tensors, "config": json.loads(str(data["config"]))}


def overrides(path: Path) -> list[str]:
    """What the file itself does not say, from the golden config."""
    golden = expected(path)
    config, shape = golden["config"], list(golden["x"].shape[1:])
    options = [
        "dataset=digits",
        f"dataset.input_shape={shape}",
        f"dataset.num_classes={config['num_classes']}",
        "neuron=if" if config["leak"] == 1 else f"neuron=lif neuron.leak={config['leak']}",
        f"neuron.v_threshold={config['v_threshold']}",
        f"time_steps={config['time_steps']}",
    ]
    if config["kind"] == "conv":
        options.append(f"model.stride={config['stride_x']} model.padding={config['padding_x']}")
    if config["kind"] == "multilayer":
        strides = [config["stride_x"], 1, 2, 1, 1]  # as AlexNet-F; the number of stages is fixed in the original
        options.append(f"model.strides={strides}")
    return [word for option in options for word in option.replace(", ", ",").split()]


def power_iteration(original: OriginalCheckpoint) -> tuple[Tensor, Tensor, Tensor]:
    """(W as a matrix, u, v) of a file, in float64."""
    w, u, v = (original.weights[f"{CONSTRAINED}.{name}"].double() for name in ("original", "0.u", "0.v"))
    return w.flatten(1), u, v


def assert_as_expected(model: torch.nn.Module, path: Path) -> None:
    golden = expected(path)
    with torch.no_grad():
        rates = model.block.simulate(golden["x"]).last
        logits = model(golden["x"])
    torch.testing.assert_close(rates, golden["rates"], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-4)


@by_name
def test_golden_original_checkpoint(path: Path) -> None:
    original = read_original(path)
    assert original.kind == expected(path)["config"]["kind"]
    model = network_from_original(original, compose_config(original, overrides(path)))
    assert not model.training
    assert_as_expected(model, path)
    # evaluation leaves u and v as they are in the file
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.weights.items())


@by_name
def test_golden_original_checkpoint_through_a_file(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted.pt"
    report = import_original(path, out, overrides(path))
    model, config, checkpoint = model_from_checkpoint(out, device="cpu")
    assert_as_expected(model, path)
    assert config.model.constraint == "spectral_matrix_first_dim"
    classes = config.dataset.num_classes
    assert checkpoint.data["class_names"] == [str(label) for label in range(classes)]
    assert checkpoint.progress["epoch"] == report["numbers_in_file"]["epoch"]
    assert checkpoint.training is None
    assert "optimizer" in report["ignored"]
    matrix, u, v = power_iteration(read_original(path))
    largest = torch.linalg.matrix_norm(matrix, 2)
    assert report["norm_excess"] == pytest.approx(float(largest / (u @ matrix @ v)) - 1, abs=1e-5)


@by_name
def test_golden_original_checkpoint_continues_as_usual(path: Path) -> None:
    """The imported network trains: one step changes alpha, W, u and v."""
    original = read_original(path)
    model = network_from_original(original, compose_config(original, overrides(path))).train()
    golden = expected(path)
    model(torch.cat([golden["x"], 0.5 * golden["x"]])).square().mean().backward()  # batch norm of a single one has none
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients.values())
    state = model.state_dict()
    matrix, u, _ = power_iteration(original)  # advances once: v = W^T u, u = W v, both of norm 1
    v = F.normalize(u @ matrix, dim=0)
    for part, wanted in {"u": F.normalize(matrix @ v, dim=0), "v": v}.items():
        found = state[f"{CONSTRAINED}.0.{part}"].double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def own(kind: str) -> Path:
    return OWN / f"{kind}.pth.tar"


def content(kind: str) -> dict[str, Any]:
    return torch.load(own(kind), weights_only=True)


def written(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "changed.pth.tar"
    torch.save(value, path)
    return path


def renamed(state: dict[str, Tensor], change: Callable[[str], str | None]) -> dict[str, Tensor]:
    return {new: value for name, value in state.items() if (new := change(name)) is not None}


def in_use(name: str) -> bool:
    return "snn_func_copy" not in name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["without prefix", "one name each", "only inside snn_func"])
def test_other_spellings_of_the_same_network(kind: str, form: str, tmp_path: Path) -> None:
    whole, changed = read_original(own(kind)), content(kind)
    change = {
        "without prefix": lambda n: n.removeprefix("module."),
        "one name each": lambda n: None if "snn_" in n else n,
        "only inside snn_func": lambda n: n if n.startswith(("module.snn_func.", "module.classifier")) else None,
    }[form]
    changed["state_dict"] = renamed(changed["state_dict"], change)
    found = read_original(written(tmp_path, changed))
    assert (found.kind, found.sizes, found.names) == (whole.kind, whole.sizes, whole.names)
    assert all(torch.equal(value, whole.weights[name]) for name, value in found.weights.items())


def test_sizes_come_from_the_shapes() -> None:
    assert read_original(own("fc")).sizes == {"hidden": 16}
    assert read_original(own("conv")).sizes == {"channels": 4, "kernel_size": 3}
    assert read_original(own("multilayer")).sizes == {"channels": [4, 5, 6, 6, 5]}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_in_use_must_agree(kind: str, tmp_path: Path) -> None:
    changed = content(kind)
    names = [n for n in changed["state_dict"] if in_use(n) and n.startswith("module.snn_ide")]
    changed["state_dict"][names[0]] = changed["state_dict"][names[0]] + 1e-3
    with pytest.raises(CheckpointError, match=r"several times.*unclear which to take: network_s\w*\.\w+\.weight"):
        read_original(written(tmp_path, changed))


def test_the_copy_of_the_backward_pass_is_not_read(tmp_path: Path) -> None:
    changed = content("conv")
    for name, value in changed["state_dict"].items():
        if not in_use(name):
            value.fill_(7)
    found = read_original(written(tmp_path, changed))
    assert all(torch.equal(value, found.weights[name]) for name, value in read_original(own("conv")).weights.items())
    assert [text for text in found.ignored if "snn_func_copy" in text]


def test_numbers_made_by_numpy_are_read(tmp_path: Path) -> None:
    numbers = {"acc": np.float64(91.5), "best_acc": np.float32(92.25), "epoch": np.int64(7)}
    found = read_original(written(tmp_path, {**content("fc"), **numbers}))
    assert found.numbers == {"acc": 91.5, "best_acc": 92.25, "epoch": 7}
    assert all(type(value) in (int, float) for value in found.numbers.values())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_the_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    allowed = set(torch.serialization.get_safe_globals())
    path = tmp_path / "evil.pth.tar"
    if zipped:
        torch.save({**content("fc"), "acc": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({**content("fc"), "acc": Evil()}))
    with pytest.raises(CheckpointError, match=r"evil.pth.tar.*could execute code"):
        read_original(path)
    assert not Path("executed").exists()
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_files_that_are_no_original_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.tar: no such file"):
        read_original(tmp_path / "none.tar")
    whole = own("fc").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 100):
        part = tmp_path / "part.tar"
        part.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"part.tar is damaged or truncated"):
            read_original(part)
    model = build_model(load_config(["model.hidden=8"]))
    save_checkpoint(tmp_path / "ours.pt", model, config={}, data={}, progress={})
    with pytest.raises(CheckpointError, match=r"ours.pt is a checkpoint of ide_snn already"):
        read_original(tmp_path / "ours.pt")
    with pytest.raises(CheckpointError, match="no state_dict"):
        read_original(written(tmp_path, model.state_dict()))
    foreign = {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"unknown meaning.*fc\.weight, fc\.bias"):
        read_original(written(tmp_path, {"state_dict": foreign}))
    with pytest.raises(CheckpointError, match="no feedback weight"):
        read_original(written(tmp_path, {"state_dict": {"classifier.bias": torch.zeros(3)}}))


def test_what_is_unknown_or_damaged_in_the_state_is_named(tmp_path: Path) -> None:
    changed = content("multilayer")
    changed["state_dict"]["module.network_s2.conv.scale"] = torch.ones(6)
    changed["state_dict"]["module.network_s2.convT.weight_w"] = torch.ones(6)  # a second feedback
    changed["state_dict"]["module.snn_func.note"] = "text"
    with pytest.raises(CheckpointError, match=r"network_s2.conv.scale, module.network_s2.convT.weight_w, .*func.note"):
        read_original(written(tmp_path, changed))
    changed = content("fc")
    for name, value in changed["state_dict"].items():
        if name.endswith("network_x.bn.bias"):
            value[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinity in network_x.bn.bias"):
        read_original(written(tmp_path, changed))


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("fc", ["neuron.v_threshold", "neuron.leak"]),
        ("conv", ["model.stride", "model.padding", "neuron.v_threshold", "neuron.leak"]),
        ("multilayer", ["model.strides", "neuron.v_threshold", "neuron.leak"]),
    ],
)
def test_what_the_file_does_not_say_is_required(kind: str, missing: list[str]) -> None:
    original = read_original(own(kind))
    with pytest.raises(ConfigError, match=r"required: dataset=\.\.\., neuron=\.\.\., time_steps=\.\.\., "):
        compose_config(original, [])
    with pytest.raises(ConfigError, match=re.escape(f"required: {', '.join(f'{m}=...' for m in missing)}; ")):
        compose_config(original, ["dataset=digits", "neuron=lif", "time_steps=20"])
    with pytest.raises(ConfigError) as raised:
        compose_config(original, ["dataset=digits", "neuron=if", "time_steps=20"])
    assert "neuron.leak" not in str(raised.value)


def paper_file(tmp_path: Path, model: str, *options: str) -> Path:
    """A network of the paper in the original format, as its code names things; one name per tensor."""
    config = load_config([f"model={model}", "model.constraint=spectral_matrix_first_dim", *options])
    net = build_model(config)
    feedback = {"fc": "network_s.fc", "conv": "network_s.conv", "multilayer": "network_s5.convT"}[config.model.network]
    parts = {"original": "w", "0.alpha": "g", "0.u": "u", "0.v": "v"}
    state = {}
    for name, value in net.state_dict().items():
        op = "fc" if config.model.network == "fc" else "conv"
        new = re.sub(r"^block\.input\.op", f"network_x.{op}", name).replace("block.input", "network_x")
        new = re.sub(r"^block\.layers\.(\d)\.(op|bn)", lambda m: f"network_s{int(m[1]) + 1}.{m[2]}", new)
        new = new.replace(".op.w", f".{op}.w").replace(".op.b", f".{op}.b")
        for ours, letter in parts.items():
            new = new.replace(f"block.feedback.op.parametrizations.weight.{ours}", f"{feedback}.weight_{letter}")
        state[f"module.{new}"] = value
    return written(tmp_path, {"epoch": 100, "state_dict": state})


MNIST, COLOUR = ["dataset=mnist"], ["dataset=digits", "dataset.input_shape=[3,8,8]", "dataset.num_classes=10"]


@pytest.mark.parametrize(
    ("model", "data", "leak"),
    [("f400", MNIST, 0.95), ("f64c5", MNIST, 0.95), ("alexnetf", COLOUR, 0.99)],
)
def test_networks_of_the_paper_bring_what_the_file_does_not_say(
    tmp_path: Path, model: str, data: list[str], leak: float
) -> None:
    path = paper_file(tmp_path, model, *data)
    out = tmp_path / "converted.pt"
    import_original(path, out, [*data, "neuron=lif", "time_steps=3"])
    net, config, checkpoint = model_from_checkpoint(out, device="cpu")
    assert config.model == load_config([f"model={model}", "model.constraint=spectral_matrix_first_dim"]).model
    assert (config.neuron.leak, config.neuron.v_threshold, config.time_steps) == (leak, 2.0, 3)
    assert checkpoint.progress["epoch"] == 100
    assert checkpoint.data["input_scale"] == (255.0 if data is MNIST else 16.0)
    assert checkpoint.data["class_names"] == [str(digit) for digit in range(10)]
    assert net.block.time_steps == 3
    original = read_original(path)
    changed = compose_config(original, [*data, "neuron=lif", "time_steps=3", "neuron.leak=0.5", "model.dropout=0"])
    assert (changed.neuron.leak, changed.model.dropout) == (0.5, 0)
    named = compose_config(original, [*data, f"model={model}", "neuron=lif", "time_steps=3"])
    assert named == config
    with pytest.raises(ConfigError, match=r"required: neuron.v_threshold=\.\.\., neuron.leak=\.\.\.; "):
        compose_config(original, [*data, "model=fc", "neuron=lif", "time_steps=3"])


def test_class_names_are_read_from_the_data_where_these_are_at_hand(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        for number, name in enumerate(("ant", "bee", "cow", "dog", "eel")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            image.new("RGB", (2, 2), (number, 9, 9)).save(folder / "0.png")
    own_images = ["dataset=image_folder", "dataset.input_shape=[3,2,2]", "dataset.cache=none", f"data_dir={tmp_path}"]
    options = [*overrides(own("fc"))[2:], *own_images]
    import_original(own("fc"), tmp_path / "converted.pt", options)
    data = load_checkpoint(tmp_path / "converted.pt").data
    assert data["class_names"] == ["ant", "bee", "cow", "dog", "eel"]
    assert (data["input_scale"], data["mean"]) == (255.0, [0.5, 0.5, 0.5])


def test_an_experiment_says_everything(tmp_path: Path) -> None:
    path = paper_file(tmp_path, "f400", *MNIST)
    config = compose_config(read_original(path), ["experiment=mnist_f400_lif"])
    assert config.model.constraint == "spectral_matrix_first_dim"
    same = load_config(["experiment=mnist_f400_lif", "model.constraint=spectral_matrix_first_dim"])
    assert config == same
    network_from_original(read_original(path), config)


def test_a_file_of_another_network_is_refused() -> None:
    original = read_original(own("conv"))
    digits = ["dataset=digits", "neuron=if", "time_steps=5"]
    with pytest.raises(CheckpointError, match=r"of the kind conv \(channels=4, kernel_size=3\).*f400, of the kind fc"):
        network_from_original(original, compose_config(original, [*digits, "model=f400", "neuron.v_threshold=2"]))
    with pytest.raises(CheckpointError) as raised:
        network_from_original(
            original, compose_config(original, [*digits, "model=f64c5", "dataset.input_shape=[1,9,9]"])
        )
    text = str(raised.value)
    assert "network_x.conv.weight: [4, 2, 3, 3] in the file, [64, 1, 5, 5] in the network" in text
    assert "network_s.conv.weight_w: [4, 4, 3, 3] in the file, [64, 64, 5, 5] in the network" in text
    assert "network_s.conv.weight_v: [36] in the file, [1600] in the network" in text
    assert "classifier.weight: [5, 100] in the file, [10, 1600] in the network" in text
    with pytest.raises(ConfigError, match=r"constraint must be spectral_matrix_first_dim.*got none"):
        network_from_original(original, compose_config(original, [*overrides(own("conv")), "model.constraint=none"]))


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    changed = content("multilayer")
    changed["state_dict"] = renamed(changed["state_dict"], lambda n: None if re.search(r"s3\.bn|list\.2\.bn", n) else n)
    original = read_original(written(tmp_path, changed))
    with pytest.raises(CheckpointError, match=r"block.layers.2.bn.weight: missing in the file, \[6\] in the network"):
        network_from_original(original, compose_config(original, overrides(own("multilayer"))))


def test_a_failed_import_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        import_original(own("fc"), tmp_path / "out.pt", [*overrides(own("fc")), "dataset.num_classes=6"])
    copy = tmp_path / "same.tar"
    copy.write_bytes(own("fc").read_bytes())
    with pytest.raises(CheckpointError, match="is the file to read"):
        import_original(copy, tmp_path / ".." / tmp_path.name / "same.tar", overrides(own("fc")))
    assert [path.name for path in tmp_path.iterdir()] == ["same.tar"]
    assert copy.read_bytes() == own("fc").read_bytes()


def test_arguments() -> None:
    parsed = split_arguments(["in=a=b.tar", "dataset=mnist", "out=c d.pt", "neuron.leak=0.9", "+experiment=x"])
    assert parsed == ("a=b.tar", "c d.pt", ["dataset=mnist", "neuron.leak=0.9", "+experiment=x"])
    for arguments, message in (
        (["out=b"], r"required: in=\.\.\.$"),
        (["in=", "out="], r"required: in=\.\.\., out=\.\.\."),
        (["in=a", "uot=b"], "unknown option uot; valid are in, out, experiment, dataset, model, neuron"),
        (["in=a", "out=b", "-m"], "cannot read '-m'"),
        (["a.tar", "b.pt"], "cannot read 'a.tar'"),
    ):
        with pytest.raises(ConfigError, match=message):
            split_arguments(arguments)


def run_script(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "scripts" / f"{script}.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)


def test_the_script_writes_a_checkpoint_that_evaluate_reads(tmp_path: Path) -> None:
    """On the bundled digits: weights of a network of that size, saved in the original format."""
    digits = ["dataset=digits", "neuron=lif", "time_steps=3"]
    path = paper_file(tmp_path, "f400", *digits)
    done = run_script("import_original", f"in={path}", "out=converted.pt", *digits, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["network"], report["hidden"], report["name"]) == ("fc", 400, "digits_f400_lif")
    assert load_checkpoint(tmp_path / "converted.pt").config["time_steps"] == 3
    figures = evaluate_checkpoint(EvaluateConfig(str(tmp_path / "converted.pt"), None, None, None, "cpu", None))
    assert (figures["samples"], figures["epoch"], figures["time_steps"]) == (360, 100, 3)


def test_the_script_explains_mistakes_and_itself(tmp_path: Path) -> None:
    helped = run_script("import_original", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert all(word in helped.stdout for word in ("in=", "out=", "experiment=", "neuron.leak", "model.strides"))
    options = [*overrides(own("fc")), "neuron.leek=1"]
    done = run_script("import_original", f"in={own('fc')}", "out=x.pt", *options, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown option neuron.leek (did you mean neuron.leak?)")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
