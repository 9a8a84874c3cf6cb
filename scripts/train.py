"""Train a feedback spiking network; `python scripts/train.py --help` lists the options."""

import logging

import hydra
from omegaconf import DictConfig

from ide_snn.config import how_to_go_on, run_app, run_dir_of_this_job, to_config
from ide_snn.distributed import environment_rank
from ide_snn.reporting import warnings_and_errors_in_log_files
from ide_snn.run import train
from ide_snn.schemas import Config

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(raw: DictConfig) -> None:
    with warnings_and_errors_in_log_files():
        result = train(to_config(raw, Config), run_dir_of_this_job())
    if result.interrupted is not None:
        if environment_rank() == 0:
            log.info("stopped; to go on, repeat the command with: %s", how_to_go_on())
        raise SystemExit(128 + result.interrupted)


if __name__ == "__main__":
    run_app(main)
