"""Integrations with other libraries, each of which is imported only when it is needed."""

from .registration import register_with_transformers

__all__ = ["register_with_transformers"]
