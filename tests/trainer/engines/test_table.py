"""The table of engines, and what a row must be."""

import inspect
import sys
import types

import pytest

from pipeline.choices import ENGINES, EngineKind, resolve
from pipeline.config import Engine as EngineConfig
from trainer.distributed.ranks import ALONE
from trainer.engines import Engine, build_engine

FUNCTIONS = [name for name, method in vars(Engine).items() if inspect.isfunction(method)]
METHODS = [name for name in FUNCTIONS if not name.startswith("_")]
TARGETS = [kind.engine for kind in ENGINES.values()]
TARGETS += [kind.sharded_head for kind in ENGINES.values() if kind.sharded_head]


@pytest.mark.parametrize("target", TARGETS)
def test_every_engine_of_the_table_has_the_methods_of_the_protocol(target):
    engine = resolve(target)
    assert len(METHODS) == 11
    for name in METHODS:
        parameters = inspect.signature(getattr(engine, name)).parameters
        assert list(parameters) == list(inspect.signature(getattr(Engine, name)).parameters), name


def test_an_engine_may_be_closed_unprepared_and_twice():
    """Whoever made it closes it, whether or not it came to prepare."""
    for target in TARGETS:
        engine = resolve(target)(EngineConfig(device="cpu"), ALONE)
        engine.close()
        engine.close()


def test_a_row_is_all_that_a_further_engine_needs(monkeypatch):
    module = types.ModuleType("an_engine")

    class Scratch:
        def __init__(self, config, ranks):
            self.ranks = ranks

    module.Scratch = Scratch
    monkeypatch.setitem(sys.modules, "an_engine", module)
    monkeypatch.setitem(ENGINES, "scratch", EngineKind("an_engine:Scratch"))
    engine = build_engine(EngineConfig(name="scratch", device="cpu"), ALONE)
    assert isinstance(engine, Scratch) and engine.ranks is ALONE
