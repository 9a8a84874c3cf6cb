"""Time of a training step of F400, F64C5 and AlexNet-F, and its ratio to the floor: `steps.py` with these cases.

python benchmarks/train_step.py [--data-dir DATA] [options of steps.py]
"""

import sys

import steps

if __name__ == "__main__":
    steps.main(["f400", "f64c5", "alexnetf", "--stages", "steps", *sys.argv[1:]])
