"""Every field of the configuration with what may come: one line says what is wrong with it, or the run trains."""

import contextlib
import io
import math
import typing
from dataclasses import asdict, fields, is_dataclass, replace

import pytest
import yaml
from fuzzing import fuzz, within
from hypothesis import example, given, note
from hypothesis import strategies as st
from tiny_runs import TINIEST

from capi.config import Config, config_of, load_config
from capi.config_check import check_config
from capi.masking import check_masking
from capi.train import main

pytestmark = pytest.mark.usefixtures("without_annotations")

FIELDS: dict[str, object] = {}
"""The type of every field by its dotted name."""


def _collect(kind: type, prefix: str) -> None:
    types = typing.get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(types[field.name]):
            _collect(types[field.name], f"{prefix}{field.name}.")
        else:
            FIELDS[f"{prefix}{field.name}"] = types[field.name]


_collect(Config, "")
NAMES = sorted(FIELDS)

TEXTS = ("", "null", "true", "nan", ".inf", "-1", "0", "1e309", "9" * 400, "1_0", "0x10", "1:30", "[1, 2]", "[.5, 1]")
TEXTS += (
    "{a: 1}",
    "{",
    "[",
    "'",
    "*a",
    "&a [*a]",
    "!!python/object/apply:os.mkdir [x]",
    "!x",
    "${HOME}",
    "@x",
    "a: b: c",
)
TEXTS += ("\0", "\x85", "\ud800", "\U0001f642", "x" * 9999, "[" * 2000, "--", "-", "2024-01-01", "=", "<<", "~", "%")
OPTIONS = (
    "--",
    "-",
    "-x",
    "--config",
    "--help=1",
    "--optim",
    "--optim.",
    "--.",
    "--optim.lr",
    "--run.",
    "--x",
    "--config+",
)


@st.composite
def arguments(draw) -> list[str]:
    options = draw(st.lists(st.sampled_from(NAMES).map("--{}".format) | st.sampled_from(OPTIONS), max_size=3))
    values = st.none() | st.sampled_from(TEXTS) | st.text(max_size=9)
    argv = []
    for option in options:
        value = draw(values)
        argv += [option] if value is None else [f"{option}={value}"] if draw(st.booleans()) else [option, value]
    return argv


def assert_loads_or_ends(argv: list[str]) -> None:
    """With a configuration of the right types, or the status 2 and a message."""
    said = io.StringIO()
    try:
        with within(60), contextlib.redirect_stderr(said):
            config = load_config(argv)
    except SystemExit as stop:
        assert stop.code in (0, 2)
        message = said.getvalue().splitlines()
        assert stop.code == 0 or "error: " in said.getvalue()
        # Besides what it was given, which it may say twice.
        assert all(len(line) < 2000 + 2 * sum(map(len, argv)) for line in message)
        assert "Traceback" not in said.getvalue()
    else:
        assert config_of(asdict(config)) == config or "nan" in str(config)


@fuzz(20)
@given(argv=arguments())
def test_a_command_line_is_a_configuration_or_ends_with_a_message(argv, tmp_path_factory) -> None:
    with contextlib.chdir(tmp_path_factory.getbasetemp()):
        assert_loads_or_ends(argv)


KEYS = (
    st.sampled_from(sorted({part for name in NAMES for part in name.split(".")})) | st.text(max_size=3) | st.integers()
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary(max_size=3)
)
NODES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


@st.composite
def files(draw) -> bytes:
    """Of YAML: a configuration with values of any kind, any values, or any bytes."""
    if draw(st.booleans()):
        content = yaml.safe_load(TINIEST)
        for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)):
            *groups, last = name.split(".")
            inner = content
            for group in groups:
                inner = inner.setdefault(group, {}) if isinstance(inner, dict) else {}
            if isinstance(inner, dict):
                inner[last] = draw(NODES)
        return yaml.safe_dump(content, allow_unicode=draw(st.booleans())).encode(errors="surrogatepass")
    text = draw(st.sampled_from(TEXTS) | st.text()).encode(errors="surrogatepass")
    return draw(st.just(text) | NODES.map(lambda x: yaml.safe_dump(x).encode()) | st.binary())


# Every level holds ten of the one before.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


@fuzz(20)
@given(content=files())
@example(content=BOMB.encode())
@example(content=("[" * 100_000).encode())
@example(content=("{a: " * 5_000).encode())
@example(content=b"optim: !!python/object/apply:os.mkdir [marker]")
@example(content=b"\xff\xfeo\x00p\x00")
def test_a_file_is_a_configuration_or_ends_with_a_message(content, tmp_path_factory) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "fuzzed.yaml").write_bytes(content)
    with contextlib.chdir(folder):
        assert_loads_or_ends(["--config", "fuzzed.yaml"])
    assert not (folder / "marker").exists()


INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 17, 2**31, 2**63, 10**30)
FLOATS = (
    -math.inf,
    -1.0,
    -0.0,
    0.0,
    5e-324,
    1e-30,
    1e-8,
    0.1,
    0.5,
    0.65,
    0.999,
    1.0,
    1.5,
    7.0,
    1e4,
    1e30,
    1e308,
    math.inf,
)
FLOATS += (math.nan, 1, 0)
STRINGS = (
    "",
    "synthetic",
    "folder:",
    "folder:nowhere",
    "folder:.",
    "wds:x.tar",
    "wds:{",
    "s3:x",
    "\0",
    "x" * 300,
    "auto",
)
SMALL = tuple(x for x in INTEGERS if x < 32)


def values_of(kind: object, *, small: bool = False) -> st.SearchStrategy:
    """Of this type, but else whatever there is; `small`: those that ask for no more than a moment."""
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.sampled_from(SMALL) if small else st.sampled_from(INTEGERS) | st.integers()
    if kind is float:
        return st.sampled_from(FLOATS) if small else st.sampled_from(FLOATS) | st.floats()
    if kind is str:
        return st.sampled_from(STRINGS) if small else st.sampled_from(STRINGS) | st.text(max_size=9)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is tuple:
        return st.tuples(*(values_of(x, small=small) for x in inner))
    if origin is list:
        return st.lists(values_of(inner[0], small=small), max_size=2)
    if kind is type(None):
        return st.none()
    return st.one_of([values_of(x, small=small) for x in inner])  # of a union


def with_value(config: object, name: str, value: object) -> Config:
    first, _, rest = name.partition(".")
    return replace(config, **{first: with_value(getattr(config, first), rest, value) if rest else value})


@fuzz(150)
@given(data=st.data())
def test_values_of_the_right_types_are_checked_or_refused(data) -> None:
    config = Config()
    config = with_value(config, "data.source", "synthetic")
    for name in data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)):
        config = with_value(config, name, data.draw(values_of(FIELDS[name])))
    try:
        with within(5):
            check_config(config, data.draw(st.sampled_from((1, 4))))
            side = config.data.image_size // config.model.patch_size
            check_masking(config.masking, (side, side))
    except ValueError as error:
        assert "\n" not in str(error)


# What would compile, evaluate or wait, and the number of steps, of which every one takes its time.
LEFT_OUT = {
    "run.compile",
    "run.evaluate",
    "run.evaluate_every",
    "run.evaluate_train",
    "run.evaluate_test",
    "run.profile",
}
LEFT_OUT |= {"optim.steps", "data.num_workers", "run.device", "run.stop_timeout"}


@fuzz(12)
@given(data=st.data())
def test_a_small_run_trains_or_ends_with_a_line(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("run")
    content = yaml.safe_load(TINIEST)
    content["optim"]["steps"] = 2
    content["run"]["output_dir"] = "run"
    changed = {}
    for name in data.draw(st.lists(st.sampled_from(sorted(FIELDS.keys() - LEFT_OUT)), min_size=1, max_size=3)):
        *groups, last = name.split(".")
        inner = content
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = changed[name] = data.draw(values_of(FIELDS[name], small=True))
    note(changed)
    listed = yaml.safe_load(yaml.safe_dump(content, allow_unicode=True).replace("!!python/tuple", ""))
    (folder / "fuzzed.yaml").write_text(yaml.safe_dump(listed, allow_unicode=True))
    said = io.StringIO()
    with within(30), contextlib.chdir(folder), contextlib.redirect_stderr(said):
        try:
            status = main(["--config", "fuzzed.yaml"])
        except SystemExit as stop:
            status = stop.code
    assert status in (0, 1, 2)
    if status:
        assert said.getvalue().splitlines()[-1].partition("error: ")[1]
    assert "Traceback" not in said.getvalue()
