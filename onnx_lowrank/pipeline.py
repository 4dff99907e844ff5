"""The journey of a model, top to bottom: load, calibrate, measure, decide, rewrite, save, verify, report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.files import same
from onnx_lowrank.measure import Latency
from onnx_lowrank.outcome import finish, hardware_of, report_of, scope_of, verdict_of
from onnx_lowrank.plan import Plan
from onnx_lowrank.planning import choose, decide_plan
from onnx_lowrank.prediction import predicted
from onnx_lowrank.prepare import Progress
from onnx_lowrank.publishing import check_output
from onnx_lowrank.repair import replayed
from onnx_lowrank.report import Report
from onnx_lowrank.run import Clock, Run, start
from onnx_lowrank.settings import DEFAULT_CONFIDENCE, Settings
from onnx_lowrank.stages import chosen, planned
from onnx_lowrank.verify import facts, race_files


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
    del stage, done, total


def analyze(
    model: str | Path, *, data: Any = None, progress: Progress = silent, command: str = "", **choices: Any
) -> Report:
    """What could be won, site by site; writes nothing. The plan is built and timed in memory.

    Raises:
        LowRankError: one line that says what is wrong.
    """
    settings, clock = Settings.from_table(choices), Clock(progress)
    run = start(Path(model), data, settings, clock)
    plan = _planned(run, data)
    clock("verify", 0, 1)
    path = run.loaded.file.path
    reason = f"would rewrite {len(plan.rewritten)} of {len(plan.decisions)} sites"
    race: tuple[Latency, ...] = ()
    if settings.verify_latency:
        race = race_files([path, run.deployed(plan.decisions)], run.loaded, settings, settings.threads, seconds=5.0)
    else:
        found = predicted(run, plan.decisions)
        reason += f", {found.ratio:.2f}× faster as predicted from the table for {scope_of(found, run)}"
    verdict = verdict_of(run, "unchanged", reason, None, loss=0.0)
    before = facts(run.loaded.file, run.loaded)
    return report_of(run, plan, verdict, before, before, race, command, hardware_of(run, path))


def optimize(
    model: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    in_place: bool = False,
    external_data: bool | None = None,
    keep_fp32: str | Path | None = None,
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
        keep_fp32: with a precision: where the factored model in float32 goes too.
        choices: fields of `Settings`.

    Raises:
        LowRankError: one line that says what is wrong; nothing was written.
    """
    settings, clock = Settings.from_table(choices), Clock(progress)
    out = Path(out)
    check_output(out, Path(model), in_place=in_place)
    beside = _beside(keep_fp32, out, Path(model), settings)
    run = start(Path(model), data, settings, clock, outs=(out, beside) if beside else (out,))
    plan = _planned(run, data)
    return finish(run, plan, out, external_data, command, give_back=True, keep_fp32=beside)


def apply(
    plan: str | Path | Plan,
    model: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    in_place: bool = False,
    external_data: bool | None = None,
    keep_fp32: str | Path | None = None,
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
    settings = Settings.from_table({**_settings_of(plan), **choices})
    clock, out = Clock(progress), Path(out)
    check_output(out, Path(model), in_place=in_place)
    beside = _beside(keep_fp32, out, Path(model), settings)
    source = data if data is not None else list(plan.data) or None
    run = start(Path(model), source, settings, clock, plan, (out, beside) if beside else (out,))
    run.fits = replayed(run, plan.decisions, plan.refits)
    if run.loaded.file.sha256 != plan.model_sha256:
        run.warnings.append("the plan was made for another file of this graph: the factors were fitted anew")
    return finish(run, plan, out, external_data, command, give_back=False, keep_fp32=beside)


def sweep(
    model: str | Path,
    folder: str | Path,
    *,
    losses: Sequence[float] = (0.002, 0.005, 0.01, 0.02, 0.05),
    data: Any = None,
    external_data: bool | None = None,
    progress: Progress = silent,
    command: str = "",
    **choices: Any,
) -> tuple[Report, ...]:
    """Several models along the Pareto frontier from one calibration, each verified on disk as `optimize` does.

    Args:
        folder: where `NAME-LOSS.onnx` go; made when it is not there.
        losses: limits of the metric, one model each.

    Raises:
        LowRankError: one line that says what is wrong.
    """
    if not losses:
        raise SettingsError("sweep needs at least one loss")
    limit = "max_loss" if choices.get("metric", "relative") == "relative" else "max_drop"
    each = [Settings.from_table({**choices, limit: loss}) for loss in sorted(losses)]
    clock, path, folder = Clock(progress), Path(model), Path(folder)
    outs = [folder / f"{path.stem}-{loss:g}.onnx" for loss in sorted(losses)]
    with _made(folder):
        for out in outs:
            check_output(out, path, in_place=False)
        run = start(path, data, each[0], clock, outs=outs)
        choices_of_sites = chosen(run, choose)
        reports = []
        for settings, out in zip(each, outs, strict=True):
            settings = dataclasses.replace(settings, confidence=run.settings.confidence)
            one = dataclasses.replace(run, settings=settings, frontier=[], warnings=list(run.warnings))
            plan = decide_plan(one, _data_names(data), choices_of_sites)
            reports.append(finish(one, plan, out, external_data, command, give_back=True))
    return tuple(reports)


def _planned(run: Run, data: Any) -> Plan:
    names = _data_names(data)
    return planned(run, names, lambda choices: decide_plan(run, names, choices), choose)


def _beside(keep_fp32: str | Path | None, out: Path, model: Path, settings: Settings) -> Path | None:
    """Where the float32 model goes too, refused before the work when it cannot.

    Raises:
        SettingsError: no precision is asked for, or the file would be OUT or MODEL.
    """
    if keep_fp32 is None:
        return None
    path = Path(keep_fp32)
    if settings.precision in (None, "fp32"):
        raise SettingsError("--keep-fp32 goes with --precision fp16 or int8; without it OUT is that model")
    if same(path, out):
        raise SettingsError(f"--keep-fp32 '{path}' is the output itself; choose another name")
    check_output(path, model, in_place=False)
    return path


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder to write to; one that is made here is gone again when nothing came into it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise SettingsError(f"{folder}: cannot be made ({fault.strerror}); give a folder that can be written") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty: something came into it
            for path in new:
                path.rmdir()


def _settings_of(plan: Plan) -> dict[str, Any]:
    """The settings that a plan was made with; a goal of speed or size leaves no limit on the loss."""
    asked = {name: getattr(plan, name) for name in ("provider", "threads", "seed", "samples", "metric", "policy")}
    if plan.confidence != DEFAULT_CONFIDENCE:  # the default gives way where one sample is held out
        asked["confidence"] = plan.confidence
    if plan.max_loss is None:
        asked["speedup"] = 1.0
    else:
        asked["max_loss" if plan.metric == "relative" else "max_drop"] = plan.max_loss
    asked["output_weights"] = dict(plan.output_weights)
    asked["provider_options"] = dict(plan.provider_options)
    asked["precision"] = plan.scheme.precision if plan.scheme else None
    return {**asked, "shapes": tuple(dict(shapes) for shapes in plan.shapes)}


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
