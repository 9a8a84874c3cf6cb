"""Run experiments of the paper: `python scripts/reproduce.py experiments=[mnist_f64c5_if] seeds=[0,1] data_dir=...`."""

import hydra
from omegaconf import DictConfig

from ide_snn.config import run_app, to_config
from ide_snn.reproduce import reproduce
from ide_snn.schemas import ReproduceConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="reproduce")
def main(raw: DictConfig) -> None:
    code = reproduce(to_config(raw, ReproduceConfig))
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    run_app(main)
