"""A whole comparison: look at the arms, measure their cost, train them, look again, write the page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nfnets.train import hardware
from nfnets.train.compare import board, cost, inspection, workers
from nfnets.train.compare.experiment import Event, claim, run_experiment, settled
from nfnets.train.compare.progress import SweepProgress
from nfnets.train.compare.protocol import ExperimentConfig
from nfnets.train.compare.report import write_report
from nfnets.train.compare.summary import Summary, read_results, summarize
from nfnets.train.compare.tables import plan_table
from nfnets.train.data import load
from nfnets.train.loop.folder import InUse, owned


def sweep(
    config: ExperimentConfig,
    out: Path,
    console: Console,
    *,
    jobs: int = 0,
    patient: bool = True,
    tensorboard: bool = False,
    command: str = "",
) -> Summary:
    """Everything that `nfnets compare` does; what is there already is read back.

    Args:
        config: The experiment.
        out: Its directory.
        console: Told what happens.
        jobs: Runs at once; 0 is one per core, up to 4.
        patient: Wait for runs that other processes hold.
        tensorboard: Write event files, too.
        command: The command line that reproduces it.

    Returns:
        What it says.

    Raises:
        UserError: as `run_experiment`, or TensorBoard is asked for and not installed.
    """
    config = settled(config, out)
    jobs = jobs or min(4, hardware.cores())
    with workers.alone(), hardware.threads(config.run["threads"]):
        boards = board.Boards(out) if tensorboard else None
        data = load(config.first_run())
        arms = list(inspection.arms(config, data))
        claim(config, out)
        with _in_turn(out):  # who comes later must not disturb what is timed
            for name, plan in [(arm.name, arm.plan) for arm in arms]:
                if plan is not None:
                    console.print(plan_table(plan, title=name))
            start = inspection.signal_at_start(config, data, arms)
            plans = inspection.plan_rows(arms)
            arms.clear()  # memory that runs can use
            inspection.save_signal(start, out)
            console.print(Text(f"signal at initialization: {out / 'signal.html'}\n"), soft_wrap=True)
            if (line := idle(config, jobs)) is not None:
                console.print(Text(line), soft_wrap=True)
            with console.status("measuring speed and memory of every arm, alone"):
                costs = cost.measure_all(config, out)
        about = {"plans": plans, "costs": [cost.plain(entry) for entry in costs]}
        with SweepProgress(config, data, console) as progress, boards or nullcontext():

            def watch(event: Event) -> None:
                progress(event)
                if boards is not None:
                    boards(event)

            results = run_experiment(
                config,
                out,
                watch=watch,
                data=data,
                jobs=jobs,
                command=command,
                about=about,
                patient=patient,
            )
        with _in_turn(out):
            after = inspection.signals_of_runs(config, data, results, out)
            if boards is not None:
                board.write_signal(start, out / "start")
                board.write_signal(after, out / "after")
            found = summarize(read_results(out))
            if any(run["final"] for run in results["runs"]):
                write_report(out, found)
    return found


def idle(config: ExperimentConfig, jobs: int) -> str | None:
    """What to say where most cores will have nothing to do."""
    threads, cores = config.run["threads"], hardware.cores()
    if config.run["device"] != "cpu" or 2 * jobs * threads > cores:
        return None
    return (
        f"{jobs} run{'s' if jobs > 1 else ''} at a time with {threads} thread{'s' if threads > 1 else ''} each, on "
        f"{cores} cores: --jobs {cores // threads} is faster (and a new --out with --set threads=N)\n"
    )


@contextmanager
def _in_turn(out: Path) -> Iterator[None]:
    """While entered, no other process that shares the sweep is."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(owned(out))
                break
            except InUse:
                time.sleep(workers.LOOK)
        yield
