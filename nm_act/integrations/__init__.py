"""Bridges to other libraries; none of them is imported before it is needed."""

from .registration import register_with_transformers

__all__ = ["register_with_transformers"]
