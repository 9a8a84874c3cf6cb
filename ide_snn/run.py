"""What the scripts do: train one configured run in a folder, evaluate a checkpoint, classify an image."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ide_snn import memory
from ide_snn.build import precision_of
from ide_snn.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_weights, write_atomically
from ide_snn.config import (
    ConfigError,
    build_dataset,
    build_encoder,
    build_loaders,
    build_model,
    build_optimizer,
    build_schedule,
    config_from_dict,
    config_to_dict,
    input_normalization,
    load_config,
    resolve_device,
    to_yaml,
)
from ide_snn.data import Dataset, load_image, to_input
from ide_snn.data_record import as_in_training, data_section, normalization_of
from ide_snn.distributed import Ranks, in_job, local_rank, process_group
from ide_snn.dsr_network import DSRClassifier
from ide_snn.evaluation import evaluate
from ide_snn.files import sole_writer
from ide_snn.models import FeedbackClassifier
from ide_snn.precision import round_products
from ide_snn.reporting import record_versions, versions, write_json
from ide_snn.schemas import Config, DSRConfig, EvaluateConfig, EventDatasetConfig, PredictConfig, options
from ide_snn.training import FitResult, fit

__all__ = ["evaluate_checkpoint", "model_from_checkpoint", "predict_image", "train"]

log = logging.getLogger(__name__)


def train(config: Config, run_dir: Path) -> FitResult:
    """Train as configured; checkpoints, metrics.csv, result.json, config.yaml and the rest go to `run_dir`.

    In a process that torchrun started this is one of the ranks of the job, and `run_dir` is that of rank 0.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteLossError: with a message that says what to change.
        FolderInUseError: another process is training in `run_dir`.
        RankLostError, RankError: another process has ended, or has other weights.
    """
    device = _prepare_device(config.device)
    threads = torch.get_num_threads()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    try:
        with process_group(device, config.trainer.process_timeout) as ranks, _quiet_but_first(ranks):
            if not ranks.is_alone:
                run_dir = Path(ranks.from_first(str(run_dir.resolve())))
            with sole_writer(run_dir) if ranks.is_first else nullcontext():
                return _train(config, run_dir, device, ranks)
    finally:
        # for the next run of a sweep, which may be of a smaller network
        memory.release()
        torch.set_num_threads(threads)


def _train(config: Config, run_dir: Path, device: torch.device, ranks: Ranks) -> FitResult:
    schedule = build_schedule(config)
    round_products(precision_of(config))
    torch.manual_seed(config.seed)
    model = build_model(config)
    optimizer = build_optimizer(config, model.to(device))
    dataset = _load_in_turn(config, ranks)
    loaders, data = build_loaders(config, dataset, device), data_section(dataset)
    log.info("%s: %d parameters on %s; everything goes to %s", config.name, _count(model), device, run_dir)
    if ranks.is_first:
        _warn_about_idle_options(config)
        _warn_about_threads()
    result = fit(
        model,
        loaders.train,
        loaders.test,
        validation=loaders.validation,
        optimizer=optimizer,
        schedule=schedule,
        epochs=config.trainer.epochs,
        accumulation=config.trainer.accumulation,
        gradient_clip=config.trainer.gradient_clip,
        label_smoothing=config.trainer.label_smoothing,
        seed=config.seed,
        sync_bn=config.trainer.sync_bn,
        ranks=ranks,
        run_dir=run_dir,
        resume=config.resume == "auto",
        config=config_to_dict(config),
        upgrade=lambda saved: config_to_dict(config_from_dict(saved)),
        data=data,
        begun=lambda resumed: _write_record(config, run_dir, device, resumed),
        log_every=config.trainer.log_every,
        progress=config.trainer.progress,
    )
    if result.interrupted is None and ranks.is_first:
        _write_result(result, config, data, run_dir)
    return result


@contextmanager
def _quiet_but_first(ranks: Ranks) -> Iterator[None]:
    """Ranks other than the first log warnings only."""
    logger = logging.getLogger("ide_snn")
    level = logger.level
    if not ranks.is_first:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_in_turn(config: Config, ranks: Ranks) -> Dataset:
    """The data; on each machine one process downloads, decodes and caches what the others then find."""
    dataset = build_dataset(config) if local_rank() == 0 else None
    ranks.wait()
    return build_dataset(config) if dataset is None else dataset


def _prepare_device(name: str) -> torch.device:
    """The device; on a GPU, with float32 products in full precision: torch by default rounds convolutions to TF32.

    Of several processes each has the GPU of its number on the machine.

    Raises:
        ConfigError: there is no such device, or no GPU of its own for each process.
    """
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    round_products("float32")
    if not in_job():
        return device
    if device.index is not None:
        raise ConfigError(f"device={name} would put all processes on one GPU: with torchrun use device=cuda")
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"there are more processes on this machine than its {torch.cuda.device_count()} GPUs: start torchrun with "
            f"--nproc-per-node {torch.cuda.device_count()}, or use device=cpu"
        )
    return torch.device("cuda", local_rank())


def _warn_about_threads() -> None:
    """Says when the processes of this machine have more threads together than there are processors."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads, available = torch.get_num_threads(), os.cpu_count() or 1
    if processes > 1 and processes * threads > available:
        log.warning(
            "%d processes with %d threads each share %d processors and wait for each other: set trainer.threads=%d",
            processes,
            threads,
            available,
            max(1, available // processes),
        )


def _warn_about_idle_options(config: Config) -> None:
    """Says which groups were set although the method or the data do not use them."""
    idle = {"ide": {"surrogate"}, "bptt": {"gradient", "solver", "precision"}}
    idle["dsr"] = idle["ide"] | idle["bptt"]
    groups = idle[config.method.name] | ({"encoder"} if isinstance(config.dataset, EventDatasetConfig) else set())
    if config.compile and config.method.name == "dsr":
        log.warning("compile=true has no effect with method=dsr")
    method, optimizer = config.method, config.optimizer
    decays = optimizer.name == "adam" and options(optimizer)["weight_decay"] > 0  # which is added to the gradient
    by_scale = optimizer.name == "sgd" or decays or config.trainer.gradient_clip is not None
    if isinstance(method, DSRConfig) and method.v_threshold_grad_scaling != 1 and not by_scale:
        log.warning(
            "method.v_threshold_grad_scaling has no effect with optimizer=%s: its steps do not depend on the scale of "
            "gradients",
            optimizer.name,
        )
    chosen, default = config_to_dict(config), config_to_dict(load_config())
    for group in sorted(groups):
        if chosen[group] != default[group]:
            why = f"method={config.method.name}" if group != "encoder" else f"the events of {config.dataset.name}"
            log.warning("the options of %s have no effect with %s", group, why)


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _write_record(config: Config, run_dir: Path, device: torch.device, resumed: bool) -> None:
    """config.yaml and versions.json: what is needed to repeat the run."""
    write_atomically(run_dir / "config.yaml", lambda file: file.write(to_yaml(config).encode()))
    record_versions(run_dir / "versions.json", versions(device), resumed=resumed)


def _write_result(result: FitResult, config: Config, data: Mapping[str, Any], run_dir: Path) -> None:
    """result.json, unless a finished run has it already."""
    path = run_dir / "result.json"
    if not (result.already_finished and path.exists()):
        content = asdict(result)
        del content["interrupted"], content["already_finished"]
        names = {"experiment": config.name, "dataset": config.dataset.name, "seed": config.seed}
        of_data = {
            "dataset_title": data["title"],
            "train_samples": data["train_samples"],
            "test_samples": data["test_samples"],
            "data_digest": data["digest"],
        }
        write_json(path, {**content, **names, **of_data})
    log.info(
        "test accuracy: last %.2f %%, best %.2f %% (epoch %s, chosen on the %s set); see %s",
        100 * (result.test_accuracy_last or 0.0),
        100 * (result.test_accuracy_best or 0.0),
        result.best_epoch,
        result.best_selected_on,
        path,
    )


def model_from_checkpoint(
    path: str | Path, *, time_steps: int | None = None, device: str = "auto"
) -> tuple[FeedbackClassifier | DSRClassifier, Config, Checkpoint]:
    """Rebuild a network from a checkpoint alone, in evaluation mode; with `time_steps`, for another T.

    Raises:
        CheckpointError: the file is missing, damaged, or holds another model than its configuration says.
        ConfigError: `time_steps` or `device` cannot be used.
    """
    checkpoint = load_checkpoint(path)
    if not checkpoint.config:
        raise CheckpointError(
            f"{path} was written by fit() without a config, so what network it is of is not known: build that in "
            'Python and give it torch.load(path, weights_only=True)["model"]'
        )
    try:
        config = config_from_dict(checkpoint.config)
    except ConfigError as error:
        raise CheckpointError(f"{path} holds a configuration that this version cannot read: {error}") from error
    if time_steps is not None:
        config = replace(config, time_steps=time_steps)
    model = build_model(config)
    load_weights(model, checkpoint)
    return model.to(_prepare_device(device)).eval(), config, checkpoint


def evaluate_checkpoint(request: EvaluateConfig) -> dict[str, Any]:
    """Accuracy, loss and firing rates on the test set of the data the checkpoint was trained on; prints JSON.

    With early exit also the mean number of steps that a sample took. `output` gets the accuracy of each class and the
    confusion matrix, too: rows are labels, columns answers.

    Several processes (torchrun) share the work; rank 0 prints.
    """
    with process_group(_prepare_device(request.device)) as ranks:
        return _evaluate_checkpoint(request, ranks)


def _evaluate_checkpoint(request: EvaluateConfig, ranks: Ranks) -> dict[str, Any]:
    model, config, checkpoint = model_from_checkpoint(
        request.checkpoint, time_steps=request.time_steps, device=request.device
    )
    if request.data_dir is not None:
        config = replace(config, data_dir=request.data_dir)
    # of event recordings, another time_steps takes more or fewer of the frames that the network was trained on
    dataset = _load_in_turn(replace(config, time_steps=checkpoint.config["time_steps"]), ranks)
    dataset = as_in_training(dataset, checkpoint, tell=ranks.is_first)
    if request.batch_size is not None:
        trainer = replace(config.trainer, evaluation_batch_size=request.batch_size)
        config = replace(config, trainer=trainer)
    test = build_loaders(config, dataset, next(model.parameters()).device).test
    options: dict[str, Any] = {"early_exit": request.early_exit, "ranks": ranks}
    options["confusion"] = request.output is not None
    found = evaluate(model, test, progress=None if ranks.is_first else False, **options)
    figures = asdict(found)
    confusion = figures.pop("confusion")
    if request.early_exit is None:
        del figures["mean_steps"]
    report = {
        "checkpoint": str(checkpoint.path),
        "experiment": config.name,
        "dataset": config.dataset.name,
        "epoch": checkpoint.progress["epoch"],
        "time_steps": config.time_steps,
        **figures,
    }
    if not ranks.is_first:
        return report
    print(json.dumps(report, indent=2))
    if request.output is not None:
        classes = {"class_accuracy": found.class_accuracy, "confusion": confusion}
        write_json(Path(request.output), {**report, **classes})
    return report


def predict_image(request: PredictConfig) -> dict[str, Any]:
    """Class and probabilities of one image file; prints JSON, and on stderr whether it was resized."""
    model, config, checkpoint = model_from_checkpoint(
        request.checkpoint, time_steps=request.time_steps, device=request.device
    )
    data = checkpoint.data
    if isinstance(config.dataset, EventDatasetConfig):
        raise CheckpointError(
            f"{checkpoint.path} was trained on event recordings ({config.dataset.name}) and cannot classify an image; "
            "use evaluate.py"
        )
    if not data:
        raise CheckpointError(f"{checkpoint.path} does not say what its data were, so images cannot be read")
    channels, height, width = config.dataset.input_shape
    loaded = load_image(
        request.image, (channels, height, width), input_scale=data["input_scale"], invert=request.invert
    )
    if loaded.resized:
        size = " x ".join(map(str, loaded.original_size))
        print(f"resized from {size} to {height} x {width} pixels", file=sys.stderr)
    normalization = input_normalization(config, normalization_of(data))
    assert normalization is not None  # images have one
    x = to_input(loaded.image, normalization).to(next(model.parameters()).device)
    encoder = build_encoder(config)
    if encoder is not None:
        x = encoder.encode(x, config.time_steps, torch.Generator(x.device).manual_seed(config.seed))
    with torch.no_grad():
        probabilities = model(x).double().softmax(1)[0].tolist()
    names = data["class_names"]
    report = {
        "class": names[probabilities.index(max(probabilities))],
        "probabilities": dict(zip(names, probabilities, strict=True)),
        "resized": loaded.resized,
    }
    print(json.dumps(report, indent=2))
    return report
