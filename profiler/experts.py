"""Mixtures of experts in a form that can be captured."""

from __future__ import annotations


def register(name: str) -> bool:
    """Register the experts function with transformers; False where this version has no such interface."""
    return False
