"""Convert an original authors' checkpoint: `python scripts/import_original.py in=... out=... experiment=...`."""

import json
import sys

from ide_snn.config import run_app
from ide_snn.original import import_original, split_arguments

HELP = """\
Convert a checkpoint of the original authors' code into one for evaluate.py, predict.py and analyze.py:

  python scripts/import_original.py in=model_best.pth.tar out=converted.pt experiment=cifar10_alexnetf_lif
  python scripts/import_original.py in=model_best.pth.tar out=converted.pt dataset=cifar10 neuron=lif time_steps=30

  in=, out=      the file to read and the checkpoint to write
  experiment=    the recipe that the file was trained with; or, without it,
  dataset=       its data: input size, number of classes, normalisation
  neuron=        if or lif; neuron.leak and neuron.v_threshold are the paper's for the paper's networks
  time_steps=    T

The network and its sizes are read off the file. For a network that is none of F400, F64C5, AlexNet-F and
CIFARNet-F, say what the file does not: neuron.v_threshold, neuron.leak (lif), model.stride and model.padding
(one convolutional population) or model.strides (several). Every option of train.py can be given, as for train.py;
`python scripts/train.py --help` lists them."""


def main() -> None:
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return
    print(json.dumps(import_original(*split_arguments(arguments)), indent=2))


if __name__ == "__main__":
    run_app(main)
