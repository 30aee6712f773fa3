"""The list of faulty launches: every test that it names is there."""

import ast
from functools import cache

import pytest

from tests.faults.campaign import ROOT
from tests.faults.launches import FAULTS


@cache
def functions_of(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_test(fault: str) -> None:
    file, _, name = FAULTS[fault].partition("::")
    assert name in functions_of(file) and name.startswith("test_")


def test_they_are_forty_and_more_and_none_is_told_twice() -> None:
    assert len(set(FAULTS.values())) == len(FAULTS) >= 40
