"""Bridges to other libraries; none of them is imported before it is needed."""

from nm_act_autoload import register_with_transformers

__all__ = ["register_with_transformers"]
