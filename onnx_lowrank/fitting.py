"""From the sites of a model to their fits: moments over the calibration samples, one factorization for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from onnx_lowrank.calibration import Fit, Fits, collect, factorize
from onnx_lowrank.evidence import ranks_within
from onnx_lowrank.input_fits import input_fits
from onnx_lowrank.prepare import Loaded, Progress
from onnx_lowrank.settings import Settings


def calibrate(
    loaded: Loaded, settings: Settings, progress: Progress, decided: Mapping[str, Sequence[str]] | None = None
) -> Fits:
    """Moments over the calibration samples, then one factorization per site.

    Args:
        decided: kinds by name of the sites that a plan needs fits of; all sites and kinds when None.
    """
    sites = tuple(site for site in loaded.sites if decided is None or site.name in decided)

    moments = collect(
        loaded.file.model,
        loaded.file.folder,
        sites,
        loaded.calibration,
        bytes_of=lambda site: loaded.input_bytes(site) if site.tap == "input" else loaded.output_bytes(site),
        provider=settings.provider,
        progress=lambda done, total: progress("calibrate", done, total),
    )
    allowed = {site.name: settings.kinds if decided is None else decided[site.name] for site in sites}
    read = input_fits(loaded, allowed, settings, lambda done, total: progress("unfold", done, total))
    fits: dict[str, Fit] = {}
    last = {site.taps: place for place, site in enumerate(sites)}  # moments go with their last reader
    for done, site in enumerate(sites):
        progress("factor", done, len(sites))
        fit = factorize(site, moments[site.taps], loaded.metrics.get(site.name))
        evidence = fit.evidence and dataclasses.replace(fit.evidence, ranks=ranks_within(fit.factorization))
        if (known := read.get(site.name)) is not None:
            if evidence is not None and known.nested:
                most = max(one.count for one in known.nested.values())
                evidence = dataclasses.replace(evidence, patches=most)
            fit = dataclasses.replace(fit, nested=known.nested, narrow=known.narrow, shared=known.shared)
        fits[site.name] = dataclasses.replace(fit, evidence=evidence)
        if last[site.taps] == done:
            del moments[site.taps]
    progress("factor", len(sites), len(sites))
    return fits
