"""plan, build and check: the three things that Python users call."""

from __future__ import annotations
