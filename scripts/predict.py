"""Classify one image file: `python scripts/predict.py checkpoint=... image=...`."""

import hydra
from omegaconf import DictConfig

from ide_snn.config import run_app, to_config
from ide_snn.run import predict_image
from ide_snn.schemas import PredictConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict")
def main(raw: DictConfig) -> None:
    predict_image(to_config(raw, PredictConfig))


if __name__ == "__main__":
    run_app(main)
