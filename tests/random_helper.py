"""A module that defines no model and has functions of Python's and NumPy's generators by names of its own."""

from __future__ import annotations

import random
from random import random as toss

from numpy.random import laplace

OWN = random.Random(0)


def tossed() -> float:
    return toss()


def spread() -> float:
    return float(laplace())


def of_its_own() -> float:
    return OWN.random()
