"""What nested values must not be, wherever they come from: more than they show, or without end, or given twice."""

from collections.abc import Mapping

import yaml

SCHEDULES = ("lr", "momentum", "clustering_lr")
_MOST = 10_000
_ENDLESS = "it is nested too deep, or an alias stands within what it names"


def check_extent(values: object) -> None:
    """Raises ValueError for more than 10 000 values, those that stand in several places counted in each.

    Of a few lines of YAML, or bytes of a pickle, whose every level names the one before ten times, whoever walks
    through them finds billions.
    """
    try:
        extent = _extent(values, {})
    except RecursionError:
        raise ValueError(_ENDLESS) from None
    if extent > _MOST:
        raise ValueError(f"it must hold at most {_MOST} values, got more, those of aliases counted")


def _extent(value: object, known: dict[int, int]) -> int:
    if id(value) not in known:
        known[id(value)] = 1 + sum(_extent(child, known) for child in _children(value))
    return known[id(value)]


def _children(value: object) -> list:
    if isinstance(value, yaml.MappingNode):
        return [part for pair in value.value for part in pair]
    if isinstance(value, yaml.SequenceNode):
        return value.value
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else []


def check_text(text: str, name: str = "", place: str = "") -> None:
    """Raises ValueError for a YAML text that `check_extent` refuses, that has a key twice (YAML lets the last one win)
    or gives a schedule as a number; yaml.YAMLError for what is no YAML."""
    try:
        node = yaml.compose(text)
        check_extent(node)
        _check_node(node, name, place)
    except RecursionError:
        raise ValueError(_ENDLESS) from None


def load_text(text: str) -> object:
    """The plain values of a YAML text. Raises as `check_text`, and yaml.YAMLError for tags of Python's objects."""
    check_text(text)
    return yaml.safe_load(text)


def _check_node(node: yaml.Node | None, name: str, place: str) -> None:
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, child in node.value:
            full = f"{name}.{key.value}" if name else str(key.value)
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"{full} is given twice, in lines {lines[key.value]} and {line}{place}")
            lines[key.value] = line
            _check_node(child, full, place)
    elif isinstance(node, yaml.ScalarNode) and name.removeprefix("optim.") in SCHEDULES:
        raise ValueError(f"{name} is a schedule, of several fields; for its peak set {name}.base {node.value}")
