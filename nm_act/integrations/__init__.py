"""Integrations with other libraries, each of which is imported only when it is needed."""

from .registration import register

__all__ = ["register"]
