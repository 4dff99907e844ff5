"""Families: sites that read one tensor in the same way, so that one first factor can serve them all."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence

from onnx_lowrank.sites import Geometry, Site

Family = tuple[Site, ...]
"""Sites in the order of the graph."""

_MOST = 2400  # entries that a site reads; time grows with the cube


class Apart(enum.Enum):
    """Why a site is in no family."""

    ALONE = "no other site reads its input"
    BRANCH = "the sites that read its input stand in another branch of the model"
    TIED = "its weight is read at other places too, on other inputs"
    LAYOUT = "the sites that read its input have other kernels, strides, sides, biases or activations"
    GROUPED = "its groups read different channels"
    WIDE = "it reads too many channels for one projection of them all"


def families(sites: Sequence[Site]) -> tuple[Family, ...]:
    """The families among some sites, each in the order of the sites."""
    found = ((site, family_of(site, sites)) for site in sites)
    return tuple(family for site, family in found if not isinstance(family, Apart) and family[0] is site)


def family_of(site: Site, sites: Sequence[Site]) -> Family | Apart:
    """The sites that a site shares its input with, itself among them, or why there are none."""
    if site.geometry.groups > 1:
        return Apart.GROUPED
    if site.geometry.inputs > _MOST:
        return Apart.WIDE
    if site.twins:
        return Apart.TIED
    reading = [other for other in sites if other.x == site.x and not other.twins]
    if len(reading) == 1:
        return Apart.ALONE
    if all(other.branch != site.branch for other in reading if other is not site):
        return Apart.BRANCH
    alike = tuple(other for other in reading if common(other) == common(site))
    return alike if len(alike) > 1 else Apart.LAYOUT


def sets(family: Family) -> Iterator[Family]:
    """The parts of a family that may share a factor: all of it, or all but one.

    Any two of them have a site in common, so that one at most is in a plan.
    """
    yield family
    if len(family) > 2:
        yield from (family[:i] + family[i + 1 :] for i in reversed(range(len(family))))


def common(site: Site) -> tuple[str, str, Geometry]:
    """What the sites of one family have in common: the tensor, the branch that they stand in, and how they read."""
    return site.x, site.branch, dataclasses.replace(site.geometry, outputs=0)
