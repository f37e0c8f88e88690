"""CONTRIBUTING's table of faults is that of `tests.fault_table`, and every row has its test."""

from __future__ import annotations

from tests.fault_table import CONTRIBUTING, FAULTS, ROOT, insert, names_of_tests, render


def test_every_fault_has_its_test() -> None:
    assert [f for f in FAULTS if f.test not in names_of_tests(ROOT / "tests" / f.file)] == []
    assert len({f.fault for f in FAULTS}) == len(FAULTS)


def test_there_are_sixty_faults_with_those_of_publishing() -> None:
    publishing = CONTRIBUTING.read_text().split("<!-- faults:")[1].split("<!-- end of faults -->")[0]
    assert len(FAULTS) + publishing.count("\n|") - 2 >= 60


def test_contributing_holds_the_table() -> None:
    page = CONTRIBUTING.read_text()
    assert insert(page, render()) == page
