"""The journey of a model, top to bottom: load, calibrate, measure, decide, rewrite, save, verify, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.files import check_output
from onnx_lowrank.outcome import finish, report_of, verdict_of
from onnx_lowrank.plan import Plan
from onnx_lowrank.prepare import Progress
from onnx_lowrank.report import Report
from onnx_lowrank.rewrite import check_matches
from onnx_lowrank.run import Clock, decide_plan, start
from onnx_lowrank.settings import Settings
from onnx_lowrank.verify import facts, race_files


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
    del stage, done, total


def analyze(
    model: str | Path, *, data: Any = None, progress: Progress = silent, command: str = "", **choices: Any
) -> Report:
    """What could be won, site by site; writes nothing. The speed-up is the sum of the measured fragments' gains.

    Raises:
        LowRankError: one line that says what is wrong.
    """
    settings, clock = Settings.from_table(choices), Clock(progress)
    run = start(Path(model), data, settings, clock)
    plan = decide_plan(run, _data_names(data))
    race = race_files([run.loaded.file.path] * 2, run.loaded, settings, settings.threads, seconds=5.0)
    reason = f"would rewrite {len(plan.rewritten)} of {len(plan.decisions)} sites"
    verdict = verdict_of(run, "unchanged", reason, None, loss=0.0)
    before = facts(run.loaded.file, run.loaded)
    return report_of(run, plan, verdict, before, before, tuple(race), command)


def optimize(
    model: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    in_place: bool = False,
    external_data: bool | None = None,
    progress: Progress = silent,
    command: str = "",
    **choices: Any,
) -> Report:
    """Write a model that is measured, on the saved file, to be faster within the loss; else the original unchanged.

    Args:
        model: path of an ONNX file.
        out: where the result goes; never partial.
        data: path or paths as on the command line, or an iterable of dicts; None is synthetic.
        external_data: True writes weights beside the model; None does so where the model did.
        choices: fields of `Settings`.

    Raises:
        LowRankError: one line that says what is wrong; nothing was written.
    """
    settings, clock = Settings.from_table(choices), Clock(progress)
    out = Path(out)
    check_output(out, Path(model), in_place=in_place)
    run = start(Path(model), data, settings, clock)
    plan = decide_plan(run, _data_names(data))
    return finish(run, plan, out, external_data, command, give_back=True)


def apply(
    plan: str | Path | Plan,
    model: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    in_place: bool = False,
    external_data: bool | None = None,
    progress: Progress = silent,
    command: str = "",
    **choices: Any,
) -> Report:
    """Replay a plan: same kinds and ranks, factors fitted to the same samples, verified as `optimize` does.

    On the model that the plan was made for the result has the same bytes.

    Raises:
        SettingsError: the plan is for another graph.
        VerificationError: the saved file does not hold the plan's loss, or is not faster.
    """
    if not isinstance(plan, Plan):
        plan = read_plan(Path(plan))
    asked = {name: getattr(plan, name) for name in ("max_loss", "provider", "threads", "seed")}
    settings = Settings.from_table({**asked, "samples": plan.samples, "shapes": dict(plan.shapes), **choices})
    clock, out = Clock(progress), Path(out)
    check_output(out, Path(model), in_place=in_place)
    run = start(Path(model), data if data is not None else list(plan.data) or None, settings, clock,
                 [d.node for d in plan.decisions])  # fmt: skip
    check_matches(plan.decisions, run.loaded.sites)
    if run.loaded.file.sha256 != plan.model_sha256:
        run.warnings.append("the plan was made for another file of this graph: the factors were fitted anew")
    return finish(run, plan, out, external_data, command, give_back=False)


def read_plan(path: Path) -> Plan:
    """A plan file.

    Raises:
        SettingsError: missing, unreadable, or not a plan.
    """
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as fault:
        raise SettingsError(f"{path}: cannot read the plan ({fault})") from None


def _data_names(data: Any) -> tuple[str, ...]:
    if isinstance(data, str | Path):
        return (str(data),)
    if isinstance(data, list | tuple) and all(isinstance(d, str | Path) for d in data):
        return tuple(str(d) for d in data)
    return ()
