"""Accuracy and loss of a checkpoint on its test set: `python scripts/evaluate.py checkpoint=... [time_steps=...]`."""

import hydra
from omegaconf import DictConfig

from ide_snn.config import run_app, to_config
from ide_snn.run import evaluate_checkpoint
from ide_snn.schemas import EvaluateConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(raw: DictConfig) -> None:
    evaluate_checkpoint(to_config(raw, EvaluateConfig))


if __name__ == "__main__":
    run_app(main)
