"""YAML as recipes and studies use it: patterns need no quotes, and no key may occur twice."""

import re
from collections.abc import Hashable
from typing import Any

from .supported import require

require("yaml", "transformers")
import yaml  # noqa: E402

YAMLError = yaml.YAMLError


def load_yaml(text: str) -> Any:
    """Data of a YAML text in which patterns need no quotes and no key occurs twice; YAMLError otherwise."""
    return yaml.load(text, _Loader)


def dump_yaml(data: Any) -> str:
    """YAML text of plain data, with keys in their given order."""
    return yaml.safe_dump(data, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys, without YAML 1.1's base-60 numbers (2:4 would be read as 124)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Mapping of a node; PyYAML itself would keep the last of several equal keys silently."""
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in (_INTEGER, "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
