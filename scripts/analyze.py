"""Rates, cost, accuracy over t and convergence of a checkpoint: `python scripts/analyze.py checkpoint=...`."""

import hydra
from omegaconf import DictConfig

from ide_snn.analysis import analyze_checkpoint
from ide_snn.config import run_app, to_config
from ide_snn.schemas import AnalyzeConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="analyze")
def main(raw: DictConfig) -> None:
    analyze_checkpoint(to_config(raw, AnalyzeConfig))


if __name__ == "__main__":
    run_app(main)
