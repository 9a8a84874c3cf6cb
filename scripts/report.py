"""Our runs beside the paper, as report.html, report.md and tables in CSV and LaTeX.

python scripts/report.py runs=runs/paper output=report
"""

import hydra
from omegaconf import DictConfig

from ide_snn.config import run_app, to_config
from ide_snn.report import write_report
from ide_snn.schemas import ReportConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="report")
def main(raw: DictConfig) -> None:
    config = to_config(raw, ReportConfig)
    print(write_report(config.runs, config.output, figures=config.figures))


if __name__ == "__main__":
    run_app(main)
