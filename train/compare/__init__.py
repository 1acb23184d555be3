"""Many runs: arms, searched learning rates and paired seeds, with intervals, tests and a page that shows them.

`protocol` says what is compared, `experiment` runs it, `workers` in processes of their own, `summary` and `statistics`
say what came out; `sweep` is all of that in turn, `report` and `page` what it leaves to read.
"""

from nfnets.train.compare.experiment import Event, run_experiment
from nfnets.train.compare.protocol import Arm, ExperimentConfig, Trial, choose

__all__ = ["Arm", "Event", "ExperimentConfig", "Trial", "choose", "run_experiment"]
